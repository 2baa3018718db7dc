"""What the `config.json` beside a model's weights states: its family and the number of heads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from anymha.interchange.compared_options import result_options
from anymha.interchange.layer_config import FULL, SLIDING, LayerConfig, alike
from anymha.interchange.layout import Layout
from anymha.interchange.layouts import SIZES
from anymha.interchange.model_needs import values_of
from anymha.text import shown

NAME = "config.json"
_SYNONYMS = {"text": ("language",), "vision": ("visual", "image"), "audio": ("speech",)}
"""Other words in the names of layers for the parts of a model that have a configuration."""
_MOST_BYTES = 2**20
_MOST_PARTS = 100
"""No model has more parts; each costs a judgement of its layers."""
_KEYS = {
    "num_heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
}  # fmt: skip


def read_config(source: Path) -> dict[str, Any]:
    """The configuration beside a file of weights, or in a folder; empty where there is none."""
    path = (source if source.is_dir() else source.parent) / NAME
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return {}
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def parts_of(config: Mapping[str, Any]) -> dict[str, set[str]]:
    """The configurations within another, as CLIP's, that state a number of heads.

    Returns:
        Their keys by the words in the names of layers that tell them: ``text``, ``language``.
    """
    parts: dict[str, set[str]] = {}
    for key, part in config.items():
        if isinstance(part, dict) and not part.keys().isdisjoint(_KEYS["num_heads"]):
            word = key.removesuffix("_config")
            for one in (word, *_SYNONYMS.get(word, ())):
                parts.setdefault(one, set()).add(key)
    return parts if len(parts) <= _MOST_PARTS else {}


def part_of(parts: Mapping[str, set[str]], prefix: str) -> str:
    """The key in `parts_of` that is about a layer; empty where there is none, or are several."""
    words = set(re.split(r"[._/]", prefix))
    found = {key for word in words for key in parts.get(word, ())}
    return found.pop() if len(found) == 1 else ""


def with_part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A configuration with what one of those within it states, which counts for more."""
    return {**config, **config[key]} if key else config


def family_of(config: Mapping[str, Any]) -> str:
    """The name that the layout of a model has by its configuration; empty where it says nothing."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        return ""
    model_type = shown(model_type)
    name = model_type.replace("-", "_")
    return f"transformers.{alike(name) or name}"


def stated_options(
    config: Mapping[str, Any], layout: Layout, number: int | None = None
) -> dict[str, Any]:
    """The sizes and options of a layout's layers that a configuration states without doubt.

    Args:
        config: The configuration.
        layout: The layout.
        number: The layer's number; None where it is not known.
    """
    layer = LayerConfig(config, number)
    stated = {}
    for size, keys in _KEYS.items():
        values = {layer[key] for key in keys if isinstance(layer.get(key), int)}
        if len(values) == 1 and not isinstance(value := values.pop(), bool):
            stated[size] = value
    if config.get("scale_attn_weights") is False:  # GPT-2
        stated["scale"] = 1.0
    stated |= values_of(layout.needs, layer)
    window, known = _window(layer)
    if window and known and "sliding_window" in layout.supported:
        stated["sliding_window"] = window
    known_names = (*SIZES, *result_options(), *layout.need_options)
    return {name: value for name, value in stated.items() if name in known_names}


def layer_number(prefix: str) -> int | None:
    """The number of a layer, by what its names begin with; None where that does not tell."""
    numbers = re.findall(r"(?<![^./_])\d+(?![^./])", prefix)
    return int(numbers[0]) if len(numbers) == 1 and len(numbers[0]) < 9 else None


def unmet_options(
    config: Mapping[str, Any], layout: Layout, number: int | None = None
) -> dict[str, str]:
    """What a configuration states and the layers made do not do, in words by option's name."""
    unmet = {}
    window, _ = _window(LayerConfig(config, number))
    if window and "sliding_window" not in stated_options(config, layout, number):
        unmet["sliding_window"] = (
            f"The model's {NAME} states a sliding window of {window} keys, and the layers made "
            "have none: which layers have it cannot be told, or the layout has no such option. "
            f"Convert the layers that have it with `sliding_window={window}`."
        )
    if config.get("scale_attn_by_inverse_layer_idx") is True:
        unmet["scale"] = (
            f"The model's {NAME} states `scale_attn_by_inverse_layer_idx`: the logits of layer i "
            "are divided by i + 1, and the layers made do not do it. Convert each layer with its "
            "own `scale`."
        )
    return unmet


def _window(layer: LayerConfig) -> tuple[int | None, bool]:
    """The keys that a query sees where a layer has a window, and whether this one has it.

    None where it has none, or no layer has.
    """
    kind = layer.kind
    window: Any = layer.get("sliding_window")
    if layer.get("use_sliding_window") is False or (
        layer.family.startswith("qwen") and layer.get("use_sliding_window") is not True
    ):
        return None, False
    if layer.family == "gpt_neo":
        window, kind = layer.get("window_size", 256), None
        kinds = layer.get("attention_layers") or layer.get("attention_types")
        if isinstance(kinds, list) and kinds:
            if all(isinstance(one, str) for one in kinds):
                kind = LayerConfig({"layer_types": kinds}, layer.number).kind
            elif "local" not in str(kinds):
                kind = "global"
    elif layer.family == "modernbert":
        local: Any = layer.get("local_attention")
        window = local // 2 + 1 if _is_number(local) else None
    elif kind == FULL and not layer.get("layer_types") and not layer.has_kinds:
        kind = SLIDING
    if not _is_number(window) or window <= 0 or kind in (FULL, "global"):
        return None, False
    return window, kind in (SLIDING, "local")


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
