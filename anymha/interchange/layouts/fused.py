"""Families with rotary positions and one kernel for query, key and value.

Packings of one shape differ in their order: GPT-NeoX's rows are query, key and value of each head
in turn, Phi-3's are all queries first.

References:
    transformers 5.23, ``models/<family>/modeling_<family>.py``; Megatron-Core,
    ``transformer/attention.py``; gpt-fast, ``model.py``; InternLM2, ``modeling_internlm2.py``.
"""

from __future__ import annotations

from anymha.interchange.forms import Extra, Form, Need
from anymha.interchange.layout import Layout
from anymha.interchange.layouts.decoders import CLIP
from anymha.interchange.layouts.encoders import projections
from anymha.interchange.layouts.rotary import HALVES, PAIRS, rotary
from anymha.interchange.limits import same_heads
from anymha.interchange.packing import fused, linear

LAYOUTS = (
    Layout(
        "transformers.gpt_neox",
        (Form((*fused("query_key_value", "groups"), *linear("output", "dense"))),),
        extras=(Extra("bias"), Extra("masked_bias"), Extra("rotary_emb.inv_freq")),
        needs=(rotary(HALVES, ", over the share `rotary_pct` of its width", partial=True),),
        limits=(same_heads,),
        reference="models/gpt_neox/modeling_gpt_neox.py",
    ),
    # One formula for its three kinds: a key head for each query head, for all, or for each group.
    Layout(
        "transformers.falcon",
        (Form((*fused("query_key_value", "groups"), *linear("output", "dense"))),),
        extras=(Extra("rotary_emb.inv_freq"),),
        needs=(rotary(HALVES, "; or, with `alibi`, ALiBi added before the logits are scaled"),),
        reference="models/falcon/modeling_falcon.py",
    ),
    Layout(
        "transformers.phi3",
        (Form((*fused("qkv_proj", bias=False), *linear("output", "o_proj", bias=False))),),
        extras=(Extra("rotary_emb.inv_freq"),),
        options=("sliding_window",),
        needs=(rotary(HALVES),),
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
        needs=(rotary(PAIRS, ", over the first `rotary_dim` elements", partial=True),),
        limits=(same_heads,),
        reference="models/codegen/modeling_codegen.py",
    ),
    Layout(
        "transformers.modernbert",
        (Form((*fused("Wqkv"), *linear("output", "Wo"))),),
        options=("sliding_window",),
        needs=(rotary(HALVES),),
        limits=(same_heads,),
        reference="models/modernbert/modeling_modernbert.py",
    ),
    Layout(
        "transformers.nomic_bert",
        (
            Form(projections("o_proj"), "module"),
            Form((*fused("Wqkv"), *linear("output", "out_proj")), "published"),
        ),
        needs=(rotary(HALVES),),
        limits=(same_heads,),
        reference="models/nomic_bert/modeling_nomic_bert.py",
    ),
    Layout(
        "transformers.dbrx",
        (Form((*fused("Wqkv", bias=False), *linear("output", "out_proj", bias=False))),),
        needs=(rotary(HALVES), CLIP),
        reference="models/dbrx/modeling_dbrx.py",
    ),
    Layout(
        "internlm.internlm2",
        (Form((*fused("wqkv", "groups"), *linear("output", "wo"))),),
        needs=(rotary(HALVES),),
        reference="huggingface.co/internlm/internlm2-7b, modeling_internlm2.py",
    ),
    Layout(
        "gpt_fast.Attention",
        (Form((*fused("wqkv", bias=False), *linear("output", "wo", bias=False))),),
        needs=(rotary(PAIRS),),
        reference="github.com/pytorch-labs/gpt-fast, model.py",
    ),
    Layout(
        "megatron.SelfAttention",
        (Form((*fused("linear_qkv", "groups"), *linear("output", "linear_proj"))),),
        extras=(
            *(
                Extra(f"linear_qkv.layer_norm_{part}", "a norm of the inputs, in `linear_qkv`")
                for part in ("weight", "bias")
            ),
            *(
                Extra(
                    f"{name}_layernorm.{part}",
                    f"a norm of each {word} head, `{name}_layernorm`, before it is rotated",
                    shows=("head_dim", 0),
                )
                for name, word in (("q", "query"), ("k", "key"))
                for part in ("weight", "bias")
            ),
        ),
        needs=(Need("rotary", "rotary positions on queries and keys, where the model has them"),),
        reference="megatron/core/transformer/attention.py",
    ),
)
