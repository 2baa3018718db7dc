"""Attention modules of transformers, timm and x-transformers, which are modules of torch."""

from __future__ import annotations

from typing import Any

from anymha.interchange.libraries.torch import arrays_of, writer
from anymha.interchange.opened import Opened

HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
DROPOUTS = ("attention_dropout", "attn_dropout", "attn_drop", "attn_pdrop", "dropout")
SCALES = ("scaling", "scale")
# x-transformers' options that change the forward pass without arrays of their own.
OPTIONS = ("qk_norm", "laser", "sparse_topk", "data_dependent_alibi", "head_scale")
ATTEND = ("softclamp_logits", "l2_distance", "cog_signed", "selective", "add_zero_kv")


def opened(layer: Any, layout: str) -> Opened:
    """An attention module; what it does not say of itself, its `config` may."""
    # BERT's and the older ViT's have their heads in a part of theirs; x-transformers' softmax too.
    inner = (getattr(layer, name, None) for name in ("self", "attention", "attend"))
    parts = [*(part for part in inner if part is not None), layer]
    sizes = {"num_heads": _found(parts, HEADS), "scale": _number(_found(parts, SCALES))}
    window = _found(parts, ("sliding_window",))
    if layout in ("transformers.mistral", "transformers.phi3"):
        window = getattr(layer.config, "sliding_window", None)
    if isinstance(window, int) and not isinstance(window, bool):
        sizes["sliding_window"] = window
    dropout = _found(parts[:1] if layout == "transformers.bert" else parts, DROPOUTS)
    return Opened(
        layout,
        arrays_of(layer),
        writer(layer),
        {name: value for name, value in sizes.items() if value is not None},
        {"dropout": _number(getattr(dropout, "p", dropout)) or 0.0},
        _x_transformers(layer) if layout.startswith("x_transformers") else (),
    )


def _found(parts: list[Any], names: tuple[str, ...]) -> Any:
    """The first attribute of these names, of the parts or their `config`; None where none is."""
    places = [*parts, *(part.config for part in parts if hasattr(part, "config"))]
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if value is not None:
                return value
    return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _x_transformers(layer: Any) -> tuple[str, ...]:
    pairs = [(layer, name) for name in OPTIONS]
    pairs += [(layer.attend, name) for name in ATTEND]
    on = [name for place, name in pairs if getattr(place, name, None) not in (None, False, 0)]
    return (f"x-transformers' {', '.join(f'`{name}`' for name in on)}",) if on else ()
