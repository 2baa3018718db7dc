"""Live layers of other libraries: recognise them, open them, and make new ones.

No library is imported unasked.

A layer is known by the package and the name of its class, or of a class that it inherits from;
parameters that are nested dicts (Flax's linen, Haiku) by their names.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import ArgumentError, BackendNotInstalledError, LayoutError, UnknownBackendError
from anymha.framework.registry import BUILT_IN, LAYERS, homes
from anymha.interchange.compared_options import check_supported
from anymha.interchange.layer_config import alike
from anymha.interchange.layouts import get_layout, layouts, unknown_name
from anymha.interchange.live_layer import LiveLayer
from anymha.options.config import AttentionConfig

CLASSES: dict[tuple[str, str], tuple[str, str]] = {
    ("torch", "MultiheadAttention"): ("torch", "torch.MultiheadAttention"),
    ("keras", "MultiHeadAttention"): ("keras", "keras.MultiHeadAttention"),
    ("keras", "GroupedQueryAttention"): ("keras", "keras.GroupQueryAttention"),
    ("equinox", "MultiheadAttention"): ("equinox", "equinox.MultiheadAttention"),
    ("flax", "MultiHeadAttention"): ("flax", "flax.nnx.MultiHeadAttention"),
    ("x_transformers", "Attention"): ("modules", "x_transformers.Attention"),
    ("timm", "Attention"): ("modules", "timm.vit"),
    **{
        ("transformers", f"{name}Attention"): ("modules", f"transformers.{layout}")
        for name, layout in {
            "Bart": "bart", "Bert": "bert", "Bloom": "bloom", "CLIP": "clip", "CodeGen": "codegen",
            "Falcon": "falcon", "Gemma": "gemma", "Gemma2": "gemma2",
            "Gemma3": "gemma3", "GPT2": "gpt2",
            "GPTBigCode": "gpt_bigcode", "GPTJ": "gptj", "GPTNeoX": "gpt_neox",
            "GptOss": "gpt_oss", "Llama": "llama", "Mistral": "mistral", "OPT": "opt",
            "Phi3": "phi3", "Qwen2": "qwen2", "Qwen3": "qwen3", "T5": "t5", "ViT": "vit",
            "Whisper": "whisper", "Albert": "albert", "DistilBertSelf": "distilbert",
            "MPNetSelf": "mpnet", "Deberta": "deberta", "DebertaV2": "deberta_v2",
            "Wav2Vec2BertSelf": "wav2vec2_bert", "Blip": "blip", "GPTNeoSelf": "gpt_neo",
            "Mpt": "mpt", "ModernBert": "modernbert", "NomicBert": "nomic_bert", "Dbrx": "dbrx",
            "Phi": "phi", "Cohere": "cohere", "Cohere2": "cohere2", "Glm": "glm", "Olmo2": "olmo2",
            "Llama4Text": "llama4", "SmolLM3": "smollm3", "Granite": "granite",
            "Starcoder2": "starcoder2", "Exaone4": "exaone4", "Glm4Moe": "glm4_moe",
            "HunYuanDenseV1": "hunyuan_v1_dense", "HunYuanMoEV1": "hunyuan_v1_dense",
            "Qwen3Next": "qwen3_next", "Qwen3_5": "qwen3_next", "Qwen3_5Moe": "qwen3_next",
            "Afmoe": "afmoe", "HrmText": "hrm_text",
        }.items()
    },
}  # fmt: skip
"""The module here and the layout of each class, by its package and its name."""

MAKERS = {
    "torch.MultiheadAttention": ("torch", "torch"),
    "keras.MultiHeadAttention": ("keras", "keras"),
    "keras.GroupQueryAttention": ("keras", "keras"),
    "flax.nnx.MultiHeadAttention": ("flax", "flax"),
    "equinox.MultiheadAttention": ("equinox", "equinox"),
    "flax.linen.MultiHeadDotProductAttention": ("params", "jax"),
    "haiku.MultiHeadAttention": ("params", "jax"),
}
"""The module here that makes a live layer of a layout, and the library that it needs."""

WITHOUT_WEIGHTS = {
    ("flax", "MultiHeadDotProductAttention"): "`module.init(...)['params']`",
    ("haiku", "MultiHeadAttention"): "the result of `hk.transform(...).init(...)`",
}


def open_layer(layer: Any) -> LiveLayer:
    """Open a live layer of another library.

    Raises:
        ArgumentError: the layer is of no known kind.
        WeightsError: parameters by name are not those of one attention layer.
    """
    if isinstance(layer, Mapping):
        return _module("params").open_layer(layer)
    for kind in type(layer).__mro__:
        known = (kind.__module__.partition(".")[0], kind.__name__)
        found = known_class(kind)
        if found is not None:
            module, layout = found
            return _module(module).open_layer(layer, layout)
        if known in WITHOUT_WEIGHTS:
            raise ArgumentError(
                f"A {kind.__module__}.{kind.__name__} holds no weights. Pass its parameters, "
                f"{WITHOUT_WEIGHTS[known]}."
            )
    libraries = {layout for _, layout in CLASSES.values()} | set(MAKERS)
    alone = sorted(name for name in libraries if not name.startswith("transformers."))
    raise ArgumentError(
        f"`layer` must be a layer of anymha, a live layer of {', '.join(alone)}, an attention "
        "module of transformers, or parameters of Flax's linen or Haiku. Received: "
        f"{type(layer).__module__}.{type(layer).__qualname__}. Bring the arrays of another module "
        "under the names of a layout, and pass them to `anymha.to_canonical`."
    )


def known_class(kind: type) -> tuple[str, str] | None:
    """The module here and the layout of a library's class; None where it has none.

    The attention of a family of transformers that is that of another family has its layout.
    """
    package, _, path = kind.__module__.partition(".")
    known = CLASSES.get((package, kind.__name__))
    if known is not None or package != "transformers":
        return known
    family = path.rpartition(".")[2].removeprefix("modeling_")
    name = kind.__name__.removesuffix("Attention").removesuffix("Text").lower()
    same = alike(family) if name == family.replace("_", "") else None
    return None if same is None else ("modules", f"transformers.{same}")


def check_target(to: Any) -> None:
    """Raise an error where `to` is no backend, and no layout whose layers stand alone."""
    if to in (*MAKERS, *(one.name for one in (*BUILT_IN, *LAYERS))):
        return  # to look for those of others takes longer than to convert
    known = [*homes(), *MAKERS]
    if to in layouts() and to not in known:
        raise LayoutError(
            f"A layer of {to} is part of a model: make the model and pass its layer to "
            "`anymha.set_weights`. `to` may be a backend or a layer that stands alone."
        )
    if to not in known:
        raise UnknownBackendError(unknown_name("to", to, known))


def make_layer(layout: str, arrays: Mapping[str, np.ndarray], config: AttentionConfig) -> Any:
    """Make a new live layer of another library.

    Args:
        layout: The name of its layout.
        arrays: Its arrays.
        config: Its options.

    Returns:
        The layer; for Flax's linen and Haiku its parameters, as nested dicts of JAX's arrays.

    Raises:
        LayoutError: layers of this layout lack an option.
        BackendNotInstalledError: the library is not installed.
    """
    module, library = MAKERS[layout]
    if importlib.util.find_spec(library) is None:
        raise BackendNotInstalledError(
            f"A layer of {layout} needs {library}, which is not installed. Install it with: pip "
            f"install {library}."
        )
    check_supported(layout, config, get_layout(layout).supported, training=True)
    return _module(module).make_layer(layout, arrays, config)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
