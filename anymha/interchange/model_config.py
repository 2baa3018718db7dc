"""What the `config.json` beside a model's weights states: its family and the number of heads."""

from __future__ import annotations

import json
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
_MOST_BYTES = 2**20
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
    known = (*SIZES, *result_options(), *layout.need_options)
    return {name: value for name, value in stated.items() if name in known}
