"""One multi-head attention layer, the same in every framework, and proof that it is."""

from typing import TYPE_CHECKING, Any

from anymha.version import __version__

if TYPE_CHECKING:
    from anymha.public import (
        AnymhaError,
        AttentionConfig,
        Cache,
        Memory,
        MultiHeadAttention,
        QueryKeyNorm,
        Rotary,
        convert,
        convert_file,
        dot_product_attention,
        explain,
        find_layers,
        from_canonical,
        get_weights,
        join_caches,
        layouts,
        load,
        merge_attention,
        multi_head_attention,
        rotate,
        save,
        set_weights,
        to_canonical,
    )

__all__ = [
    "AnymhaError",
    "AttentionConfig",
    "Cache",
    "Memory",
    "MultiHeadAttention",
    "QueryKeyNorm",
    "Rotary",
    "__version__",
    "convert",
    "convert_file",
    "dot_product_attention",
    "explain",
    "find_layers",
    "from_canonical",
    "get_weights",
    "join_caches",
    "layouts",
    "load",
    "merge_attention",
    "multi_head_attention",
    "rotate",
    "save",
    "set_weights",
    "to_canonical",
]


def __getattr__(name: str) -> Any:
    """All names at the first use of one: every run of pytest imports the package, for its plugin.

    The modules that they are in (`anymha.errors`, `anymha.options`) are then there too.
    """
    if not name.startswith("__"):
        import importlib  # noqa: PLC0415

        public = importlib.import_module("anymha.public")
        globals().update({each: getattr(public, each) for each in public.__all__})
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
