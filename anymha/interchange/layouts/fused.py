"""Families of transformers with rotary positions and one kernel for query, key and value.

Packings of one shape differ in their order: GPT-NeoX's rows are query, key and value of each head
in turn, Phi-3's are all queries first.

References:
    transformers 5.23, ``models/<family>/modeling_<family>.py``.
"""

from __future__ import annotations

from anymha.interchange.forms import Extra, Form, Need
from anymha.interchange.layout import Layout
from anymha.interchange.layouts.rotary import HALVES, PAIRS
from anymha.interchange.limits import same_heads
from anymha.interchange.packing import fused, linear

LAYOUTS = (
    Layout(
        "transformers.gpt_neox",
        (Form((*fused("query_key_value", "groups"), *linear("output", "dense"))),),
        extras=(Extra("bias"), Extra("masked_bias"), Extra("rotary_emb.inv_freq")),
        needs=(Need("rotary", HALVES + ", over the share `rotary_pct` of its width"),),
        limits=(same_heads,),
        reference="models/gpt_neox/modeling_gpt_neox.py",
    ),
    # One formula for its three kinds: a key head for each query head, for all, or for each group.
    Layout(
        "transformers.falcon",
        (Form((*fused("query_key_value", "groups"), *linear("output", "dense"))),),
        extras=(Extra("rotary_emb.inv_freq"),),
        needs=(
            Need("rotary", HALVES + "; or, with `alibi`, ALiBi added before the logits are scaled"),
        ),
        reference="models/falcon/modeling_falcon.py",
    ),
    Layout(
        "transformers.phi3",
        (Form((*fused("qkv_proj", bias=False), *linear("output", "o_proj", bias=False))),),
        extras=(Extra("rotary_emb.inv_freq"),),
        options=("sliding_window",),
        needs=(Need("rotary", HALVES),),
        reference="models/phi3/modeling_phi3.py",
    ),
    Layout(
        "transformers.codegen",
        (
            Form(
                (
                    *fused("qkv_proj", "codegen", bias=False),
                    *linear("output", "out_proj", bias=False),
                )
            ),
        ),
        extras=(Extra("causal_mask"), Extra("embed_positions")),
        needs=(Need("rotary", PAIRS + ", over the first `rotary_dim` elements"),),
        limits=(same_heads,),
        reference="models/codegen/modeling_codegen.py",
    ),
)
