"""What the `config.json` beside a model's weights states: its family and the number of heads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anymha.interchange.compared_options import result_options
from anymha.interchange.forms import Need
from anymha.interchange.layout import Layout
from anymha.interchange.layouts import SIZES
from anymha.text import shown

NAME = "config.json"
_ALIKE = {
    name: layout
    for layout, names in {
        "bert": "roberta xlm_roberta camembert electra layoutlm data2vec_text",
        "vit": "deit dinov2 vit_mae yolos",
        "clip": "clip_text_model clip_vision_model siglip_text_model siglip_vision_model",
        "bart": "mbart pegasus marian m2m_100 blenderbot wav2vec2 hubert",
        "opt": "xglm biogpt",
        "gemma3": "gemma3_text",
    }.items()
    for name in names.split()
}
"""Families whose attention is that of another family."""
_ALTERNATING = ("gemma", "gpt_oss", "cohere2")
"""Families where some layers alone have the window, unless `layer_types` says otherwise."""
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
    return f"transformers.{_ALIKE.get(name, name)}"


def stated_options(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The sizes and options of a layout's layers that a configuration states without doubt."""
    stated = {}
    for size, keys in _KEYS.items():
        values = {config[key] for key in keys if isinstance(config.get(key), int)}
        if len(values) == 1 and not isinstance(value := values.pop(), bool):
            stated[size] = value
    needs = [need for need in layout.needs if isinstance(need, Need)]
    stated |= {n.option: config[n.key] for n in needs if n.key and n.key in config}
    if config.get("scale_attn_weights") is False:  # GPT-2
        stated["scale"] = 1.0
    scalar = config.get("query_pre_attn_scalar")  # Gemma
    if isinstance(scalar, (int, float)) and 0 < scalar < _MOST_BYTES and scalar is not True:
        stated["scale"] = float(scalar) ** -0.5
    window, everywhere = _window(config)
    if window and everywhere and "sliding_window" in layout.supported:
        stated["sliding_window"] = window
    known = (*SIZES, *result_options(), *layout.need_options)
    return {name: value for name, value in stated.items() if name in known}


def unmet_options(config: Mapping[str, Any], layout: Layout) -> dict[str, str]:
    """What a configuration states and the layers made do not do, in words by option's name."""
    unmet = {}
    window, _ = _window(config)
    if window and "sliding_window" not in stated_options(config, layout):
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


def _window(config: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The keys that a query sees where layers have a window, and whether all layers have it."""
    family = family_of(config).removeprefix("transformers.")
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    everywhere = not family.startswith(_ALTERNATING)
    if family.startswith("qwen"):
        window = window if config.get("use_sliding_window") is True else None
        everywhere = config.get("max_window_layers") == 0
    elif config.get("use_sliding_window") is False:
        window = None
    if family == "gpt_neo":
        window, kinds = config.get("window_size", 256), config.get("attention_layers")
        kinds = kinds or config.get("attention_types")
        everywhere = False
    elif family == "modernbert" and isinstance(local := config.get("local_attention"), int):
        window = local // 2 + 1
        everywhere = False
    if isinstance(kinds, list) and kinds:
        local_kinds = [any(word in str(kind) for word in ("sliding", "local")) for kind in kinds]
        window = window if any(local_kinds) else None
        everywhere = all(local_kinds) and not any("global" in str(kind) for kind in kinds)
    fits = isinstance(window, int) and not isinstance(window, bool) and window > 0
    return (window, everywhere) if fits else (None, False)
