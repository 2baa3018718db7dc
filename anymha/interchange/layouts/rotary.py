"""Families with rotary positions and a linear layer for each projection.

References:
    transformers 5.23, ``models/<family>/modeling_<family>.py``; Meta's Llama,
    ``llama/model.py``; Su et al. (2021), RoFormer.
"""

from __future__ import annotations

from anymha.framework.validation import PROJECTIONS
from anymha.interchange.forms import Extra, Form, Need
from anymha.interchange.layout import Layout
from anymha.interchange.layouts.encoders import four, head_norms, projections
from anymha.interchange.limits import same_heads

_TURN = "rotary positions on queries and keys, where element "
HALVES = _TURN + "i of a head turns with element i + half of its rotated width"
PAIRS = _TURN + "2i of a head turns with element 2i + 1"


def rotary(words: str, more: str = "", partial: bool = False) -> Need:
    """The need of rotary positions, in halves or in pairs, over all of a head or a part."""
    order = "halves" if words == HALVES else "pairs"
    return Need("rotary", words + more, order=order, partial=partial)


SCALE = Need(
    "scale",
    "the factor of the logits: query_pre_attn_scalar ** -0.5 of the model's configuration, where "
    "that is not the width of a head",
)
SOFTCAP = Need(
    "softcap",
    "a softcap c of the logits: c * tanh(logits / c), where the model has one",
    key="attn_logit_softcapping",
)
INVERSE = Extra("rotary_emb.inv_freq")  # a buffer that old files hold


def norms(how: str) -> tuple[Extra, ...]:
    """Norms of queries and keys, per head."""
    return tuple(
        Extra(
            f"{name[0]}_norm.weight",
            f"an RMS norm of each {name} head, {how} `{name[0]}_norm.weight`, before it is rotated",
            required=True,
            shows=("head_dim", 0),
        )
        for name in ("query", "key")
    )


def family(
    name: str,
    biased: tuple[str, ...] = PROJECTIONS,
    extras: tuple[Extra, ...] = (),
    needs: tuple[Need, ...] = (),
    output: str = "o_proj",
    scale: str | None = None,
    options: tuple[str, ...] = (),
) -> Layout:
    """The layout of a family of transformers."""
    return Layout(
        f"transformers.{name}",
        (Form(projections(output, biased)),),
        extras=(*extras, INVERSE),
        needs=(rotary(HALVES), *needs),
        scale=scale,
        options=options,
        reference=f"models/{name}/modeling_{name}.py",
    )


LAYOUTS = (
    family("llama"),
    family("mistral", (), options=("sliding_window",)),
    family("qwen2", ("query", "key", "value"), options=("sliding_window",)),
    family("qwen3", extras=norms("times"), options=("sliding_window",)),
    family("gemma"),
    # The scale of the next two is not always that of the head's width.
    family(
        "gemma2",
        needs=(
            SCALE,
            SOFTCAP,
        ),
        scale="free",
        options=("sliding_window",),
    ),
    family(
        "gemma3",
        extras=norms("times 1 +"),
        needs=(SCALE,),
        scale="free",
        options=("sliding_window",),
    ),
    family(
        "gpt_oss",
        extras=(
            Extra(
                "sinks",
                "a sink: one more logit per head, `sinks`, in the softmax's sum but of no value",
                required=True,
                shows=("num_heads", 0),
            ),
        ),
        options=("sliding_window",),
    ),
    Layout(
        "transformers.gptj",
        (Form(projections("out_proj", ())),),
        extras=(Extra("bias"), Extra("masked_bias"), Extra("embed_positions")),
        needs=(rotary(PAIRS, ", over the first `rotary_dim` elements", partial=True),),
        limits=(same_heads,),
        reference="models/gptj/modeling_gptj.py",
    ),
    Layout(
        "transformers.phi",
        (Form(projections("dense")),),
        extras=(
            INVERSE,
            *head_norms("{}_layernorm", "a layer norm", ("weight", "bias")),
        ),
        needs=(rotary(HALVES, ", over the share `partial_rotary_factor`", partial=True),),
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
