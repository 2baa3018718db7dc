"""Decoders without rotary positions: GPT-2, nanoGPT, GPT-BigCode, GPT-Neo, T5, BLOOM, MPT.

References:
    transformers 5.23, ``models/<family>/modeling_<family>.py``; nanoGPT, ``model.py``.
"""

from __future__ import annotations

from anymha.interchange.forms import Extra, Form, Need
from anymha.interchange.layout import Layout
from anymha.interchange.layouts.encoders import family, one_kernel, projections
from anymha.interchange.limits import same_heads
from anymha.interchange.model_needs import AlibiNeed
from anymha.interchange.packing import fused, linear

BUFFERS = (Extra("bias"), Extra("masked_bias"))  # causal masks that old files hold
CLIP = Need(
    "clip",
    "queries, keys and values clipped to +-`clip_qkv` after their projection, where "
    "`attn_config` of the model's configuration has it",
    "clip_qkv",
)

LAYOUTS = (
    # Its `Conv1D` is a matrix (inputs, outputs), unlike every linear layer of torch.
    Layout(
        "transformers.gpt2",
        (
            Form(
                (
                    *fused("c_attn", form="matrix"),
                    *linear("output", "c_proj", form="matrix"),
                ),
                "self",
            ),
            Form(
                (
                    *linear("query", "q_attn", form="matrix"),
                    *fused("c_attn", form="matrix", holds=("key", "value")),
                    *linear("output", "c_proj", form="matrix"),
                ),
                "cross",
            ),
        ),
        extras=BUFFERS,
        limits=(same_heads,),
        reference="models/gpt2/modeling_gpt2.py",
    ),
    # The names of GPT-2, but linear layers of torch: all queries first, or by heads.
    Layout(
        "nanogpt.CausalSelfAttention",
        (one_kernel("c_attn", "c_proj"),),
        extras=BUFFERS,
        limits=(same_heads,),
        reference="github.com/karpathy/nanoGPT, model.py",
    ),
    family(
        "gpt_neo",
        Form(projections("out_proj", ("output",))),
        extras=BUFFERS,
        scale=1.0,
        options=("sliding_window",),
    ),
    Layout(
        "transformers.gpt_bigcode",
        (one_kernel("c_attn", "c_proj", "groups"),),
        extras=BUFFERS,
        reference="models/gpt_bigcode/modeling_gpt_bigcode.py",
    ),
    Layout(
        "transformers.t5",
        (
            Form(
                tuple(
                    piece
                    for projection in ("query", "key", "value", "output")
                    for piece in linear(projection, projection[0], bias=False)
                )
            ),
        ),
        extras=(
            Extra(
                "relative_attention_bias.weight",
                "`relative_attention_bias.weight`, that bias, for all layers of the stack",
                shows=("num_heads", 1),
            ),
        ),
        needs=(
            "in self-attention the learned bias of relative positions, which the first layer of "
            "the stack holds (pass it as `attention_bias`)",
        ),
        limits=(same_heads,),
        scale=1.0,
        reference="models/t5/modeling_t5.py",
    ),
    Layout(
        "transformers.bloom",
        (one_kernel("query_key_value", "dense", "groups"),),
        limits=(same_heads,),
        fixed={"alibi": True},
        reference="models/bloom/modeling_bloom.py",
    ),
    family(
        "mpt",
        one_kernel("Wqkv", "out_proj"),
        needs=(
            AlibiNeed("alibi", "ALiBi, where the model has it", "alibi", default=True),
            CLIP,
            Need(
                "scale", "the factor of the logits, where `attn_config` states it", "softmax_scale"
            ),
        ),
        scale="free",
    ),
)
