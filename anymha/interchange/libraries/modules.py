"""Attention modules of transformers, timm and x-transformers, all modules of torch."""

from __future__ import annotations

from typing import Any

from anymha.interchange.compared_options import result_options
from anymha.interchange.forms import Need
from anymha.interchange.layer_config import LayerConfig
from anymha.interchange.layouts import get_layout
from anymha.interchange.libraries.torch import arrays_of, writer
from anymha.interchange.live_layer import LiveLayer
from anymha.interchange.model_needs import values_of

HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
DROPOUTS = ("attention_dropout", "attn_dropout", "attn_drop", "attn_pdrop", "dropout")
SCALES = ("scaling", "scale")
ONE_WINDOW = ("mistral", "phi3", "starcoder2")
# x-transformers' options that change the forward pass without arrays of their own.
OPTIONS = ("qk_norm", "laser", "sparse_topk", "data_dependent_alibi", "head_scale")
ATTEND = ("softclamp_logits", "l2_distance", "cog_signed", "selective", "add_zero_kv")


def open_layer(layer: Any, layout: str) -> LiveLayer:
    """Open an attention module; only its `config` may state the number of heads."""
    # BERT's and the older ViT's have their heads in a part of theirs; x-transformers' softmax too.
    inner = (getattr(layer, name, None) for name in ("self", "attention", "attend"))
    parts = [*(part for part in inner if part is not None), layer]
    configs = [part.config for part in parts if hasattr(part, "config")]
    heads, scale = _first_attribute([*parts, *configs], HEADS), _first_attribute(parts, SCALES)
    sizes = {"num_heads": heads, "scale": _number(scale)}
    # A model may have windows in some of its layers only; these have one for all.
    place = layer.config if layout.rpartition(".")[2] in ONE_WINDOW else layer
    window = getattr(place, "sliding_window", None)
    if getattr(layer, "attention_type", None) == "local":  # of GPT-Neo
        window = layer.config.window_size
    if isinstance(window, int) and not isinstance(window, bool):
        sizes["sliding_window"] = window
    dropout = _first_attribute(parts[:1] if layout == "transformers.bert" else parts, DROPOUTS)
    return LiveLayer(
        layout,
        arrays_of(layer),
        writer(layer),
        {n: value for n, value in sizes.items() if value is not None}
        | _needed_options(layer, layout, [*parts[::-1], *configs]),
        {"dropout": _number(getattr(dropout, "p", dropout)) or 0.0},
        _x_transformers(layer) if layout.startswith("x_transformers") else (),
    )


def _needed_options(layer: Any, layout: str, places: list[Any]) -> dict[str, Any]:
    """The options that the family's forward pass needs, where the layer or its config has them.

    The value may be None, where this layer does without.
    """
    needs = get_layout(layout).needs
    keys = [need.key for need in needs if isinstance(need, Need) and need.key]
    own = {
        key: next(getattr(place, key) for place in places if hasattr(place, key))
        for key in keys
        if any(hasattr(place, key) for place in places)
    }
    config: Any = getattr(layer, "config", None)
    family = {"model_type": layout.rpartition(".")[2]}
    values = config.to_dict() if hasattr(config, "to_dict") else family
    number = getattr(layer, "layer_idx", None)
    stated = values_of(needs, LayerConfig({**values, **own}, number))
    return {n: value for n, value in stated.items() if n in result_options() or not value}


def _first_attribute(places: list[Any], names: tuple[str, ...]) -> Any:
    """The first attribute of these names; None where there is none."""
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
