"""Families with rotary positions and a linear layer for each projection.

References:
    transformers 5.23, ``models/<family>/modeling_<family>.py``; Meta's Llama,
    ``llama/model.py``; Su et al. (2021), RoFormer.
"""

from __future__ import annotations

from typing import Any

from anymha.attention.features.query_key_norm import QueryKeyNorm
from anymha.framework.validation import PROJECTIONS
from anymha.interchange.forms import Extra, Form, Need
from anymha.interchange.layout import Layout
from anymha.interchange.layouts.encoders import four, norm_need, norm_weights, projections
from anymha.interchange.limits import same_heads
from anymha.interchange.model_needs import RotaryNeed, ScaleNeed, TemperatureNeed
from anymha.interchange.packing import Piece, fused, linear
from anymha.interchange.rotary_order import LAYOUT_OF

_TURN = "rotary positions on queries and keys, where element "
HALVES = _TURN + "i of a head turns with element i + half of its rotated width"
PAIRS = _TURN + "2i of a head turns with element 2i + 1"


def rotary(
    words: str, more: str = "", share: float | None = None, key: str = "", order: str | None = None
) -> RotaryNeed:
    """The need of rotary positions, over all of a head or a part.

    Args:
        words: `HALVES` or `PAIRS`.
        more: What follows these words.
        share: The share that turns where the configuration states none; None for always all.
        key: The name of the number of columns in the configuration of GPT-J and CodeGen.
        order: The order of the elements, where the words do not tell it.
    """
    order = ("halves" if words.startswith(HALVES) else "pairs") if order is None else order
    partial = share is not None or bool(key)
    fields = "dim=..., " * partial + "base=..." * (not key)
    layout = f"layout={LAYOUT_OF[order]!r}"
    example = f"anymha.Rotary({fields.removesuffix(', ')}, {layout})"
    return RotaryNeed(
        "rotary", words + more, key, order=order, partial=partial, example=example, share=share
    )


SCALE = ScaleNeed(
    "scale",
    "the factor of the logits: query_pre_attn_scalar ** -0.5 of the model's configuration, where "
    "that is not the width of a head",
    "query_pre_attn_scalar",
)
SOFTCAP = Need(
    "softcap",
    "a softcap c of the logits: c * tanh(logits / c), where the model has one",
    key="attn_logit_softcapping",
)
INVERSE = Extra("rotary_emb.inv_freq")  # a buffer that old files hold
NORMS = norm_weights("{}_norm", shows=("head_dim", 0), required=True)
WIDE_NORMS = norm_weights("{}_norm", required=True)
RMS = "rms_norm_eps"


def family(
    name: str,
    biased: tuple[str, ...] = PROJECTIONS,
    extras: tuple[Extra, ...] = (),
    needs: tuple[Need, ...] = (),
    output: str = "o_proj",
    turned: RotaryNeed | None = None,
    gate: tuple[Piece, ...] = (),
    **options: Any,
) -> Layout:
    """The layout of a family of transformers; the arrays of its `gate` may hold its queries too."""
    pieces = projections(output, biased)
    if gate:
        names = {piece.array for piece in gate}
        pieces = (*gate, *(piece for piece in pieces if piece.array not in names))
        options["fixed"] = {"gate": "elementwise"}
    return Layout(
        f"transformers.{name}",
        (Form(pieces),),
        extras=(*extras, INVERSE),
        needs=(rotary(HALVES) if turned is None else turned, *needs),
        reference=f"models/{name}/modeling_{name}.py",
        **options,
    )


WINDOW: dict[str, Any] = {"options": ("sliding_window",)}
LAYOUTS = (
    family("llama"),
    family("mistral", (), **WINDOW),
    family("qwen2", ("query", "key", "value"), **WINDOW),
    family("qwen3", extras=NORMS, needs=(norm_need(QueryKeyNorm(), RMS),), **WINDOW),
    family(
        "qwen3_next",
        extras=NORMS,
        needs=(norm_need(QueryKeyNorm(scale="one_plus_weight"), RMS),),
        turned=rotary(HALVES, ", over a share", share=0.25),
        gate=fused("q_proj", "alternate", holds=("query", "gate")),
    ),
    family(
        "afmoe",
        extras=NORMS,
        needs=(norm_need(QueryKeyNorm(), RMS),),
        turned=rotary(HALVES, ", in the layers that have a window"),
        gate=linear("gate", "gate_proj", bias=False),
        **WINDOW,
    ),
    family("hrm_text", limits=(same_heads,), gate=linear("gate", "gate_proj")),
    family("gemma"),
    # The scale of the next two is not always that of the head's width.
    family("gemma2", needs=(SCALE, SOFTCAP), scale="free", **WINDOW),
    family(
        "gemma3",
        extras=NORMS,
        needs=(SCALE, norm_need(QueryKeyNorm(scale="one_plus_weight"), RMS)),
        scale="free",
        **WINDOW,
    ),
    family(
        "gpt_oss",
        extras=(Extra("sinks", required=True, shows=("num_heads", 0), weight="sinks"),),
        **WINDOW,
    ),
    family(
        "granite",
        needs=(Need("scale", "the factor of the logits", key="attention_multiplier"),),
        scale="free",
    ),
    family("smollm3", turned=rotary(HALVES, ", in the layers that have them"), **WINDOW),
    family(
        "olmo2", extras=WIDE_NORMS, needs=(norm_need(QueryKeyNorm(over="width"), RMS),), **WINDOW
    ),
    family("starcoder2", **WINDOW),
    family(
        "exaone4",
        extras=NORMS,
        needs=(norm_need(QueryKeyNorm(), RMS),),
        turned=rotary(HALVES, ", where some layers have windows in these alone"),
        **WINDOW,
    ),
    family(
        "glm4_moe",
        extras=norm_weights("{}_norm", shows=("head_dim", 0)),
        needs=(norm_need(QueryKeyNorm(), RMS, switch="use_qk_norm"),),
        turned=rotary(HALVES, ", over a share", share=0.5),
    ),
    family(
        "hunyuan_v1_dense",
        extras=norm_weights("{}_layernorm", letters=False, shows=("head_dim", 0), required=True),
        needs=(norm_need(QueryKeyNorm(after_rotary=True), RMS),),
    ),
    family(
        "cohere",
        extras=norm_weights("{}_norm"),
        needs=(
            norm_need(QueryKeyNorm("layer", over="heads"), "layer_norm_eps", switch="use_qk_norm"),
        ),
        turned=rotary(PAIRS),
    ),
    family("cohere2", turned=rotary(PAIRS, ", in the layers that have a window"), **WINDOW),
    family("glm", ("query", "key", "value"), turned=rotary(PAIRS, ", over a share", share=0.5)),
    family(
        "llama4",
        needs=(
            norm_need(
                QueryKeyNorm(scale="none", after_rotary=True),
                RMS,
                switch="use_qk_norm",
                rotating=True,
            ),
            TemperatureNeed(
                "temperature",
                "queries multiplied by a number for each position, in the layers that do not "
                "rotate (`attn_temperature_tuning`)",
                "attn_temperature_tuning",
            ),
        ),
        turned=rotary(PAIRS, ", in the layers that have them"),
    ),
    Layout(
        "transformers.gptj",
        (Form(projections("out_proj", ())),),
        extras=(Extra("bias"), Extra("masked_bias"), Extra("embed_positions")),
        needs=(rotary(PAIRS, ", over the first `rotary_dim` elements", key="rotary_dim"),),
        limits=(same_heads,),
        reference="models/gptj/modeling_gptj.py",
    ),
    Layout(
        "transformers.phi",
        (Form(projections("dense")),),
        extras=(INVERSE, *norm_weights("{}_layernorm", ("weight", "bias"), shows=("head_dim", 0))),
        needs=(
            rotary(HALVES, ", over the share `partial_rotary_factor`", share=0.5),
            norm_need(
                QueryKeyNorm("layer", use_bias=True), "layer_norm_eps", switch="qk_layernorm"
            ),
        ),
        reference="models/phi/modeling_phi.py",
    ),
    # The same model as in transformers, whose rows of queries and keys lie in another order.
    Layout(
        "meta.llama",
        (Form(four("wq", "wk", "wv", "wo", biased=())),),
        needs=(rotary(PAIRS),),
        reference="github.com/meta-llama/llama, llama/model.py",
    ),
)
