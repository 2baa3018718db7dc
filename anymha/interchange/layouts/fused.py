"""Families with rotary positions and one kernel for query, key and value.

Packings of one shape differ in their order: GPT-NeoX's rows are query, key and value of each head
in turn, Phi-3's are all queries first.

References:
    transformers 5.23, ``models/<family>/modeling_<family>.py``; Megatron-Core,
    ``transformer/attention.py``; gpt-fast, ``model.py``; InternLM2, ``modeling_internlm2.py``.
"""

from __future__ import annotations

from anymha.attention.features.query_key_norm import QueryKeyNorm
from anymha.interchange.forms import Extra, Form, Need
from anymha.interchange.layout import Layout
from anymha.interchange.layouts.decoders import CLIP
from anymha.interchange.layouts.encoders import (
    four,
    norm_need,
    norm_weights,
    one_kernel,
    projections,
)
from anymha.interchange.layouts.rotary import HALVES, PAIRS, rotary
from anymha.interchange.limits import same_heads
from anymha.interchange.model_needs import AlibiNeed

LAYOUTS = (
    Layout(
        "transformers.gpt_neox",
        (one_kernel("query_key_value", "dense", "groups"),),
        extras=(Extra("bias"), Extra("masked_bias"), Extra("rotary_emb.inv_freq")),
        needs=(rotary(HALVES, ", over the share `rotary_pct` of its width", share=0.25),),
        limits=(same_heads,),
        reference="models/gpt_neox/modeling_gpt_neox.py",
    ),
    # One formula for its three kinds: a key head for each query head, for all, or for each group.
    Layout(
        "transformers.falcon",
        (one_kernel("query_key_value", "dense", "groups"),),
        extras=(Extra("rotary_emb.inv_freq"),),
        needs=(
            rotary(HALVES, "; or, with `alibi`, none"),
            AlibiNeed(
                "alibi",
                "ALiBi, where the model has it, added before the logits are scaled: slopes times "
                "the scale",
                "alibi",
                scaled=True,
            ),
        ),
        reference="models/falcon/modeling_falcon.py",
    ),
    Layout(
        "transformers.phi3",
        (one_kernel("qkv_proj", "o_proj", bias=False),),
        extras=(Extra("rotary_emb.inv_freq"),),
        options=("sliding_window",),
        needs=(rotary(HALVES, share=1.0),),
        reference="models/phi3/modeling_phi3.py",
    ),
    Layout(
        "transformers.codegen",
        (one_kernel("qkv_proj", "out_proj", "codegen", bias=False),),
        extras=(Extra("causal_mask"), Extra("embed_positions")),
        needs=(rotary(PAIRS, ", over the first `rotary_dim` elements", key="rotary_dim"),),
        limits=(same_heads,),
        reference="models/codegen/modeling_codegen.py",
    ),
    Layout(
        "transformers.modernbert",
        (one_kernel("Wqkv", "Wo"),),
        options=("sliding_window",),
        needs=(rotary(HALVES),),
        limits=(same_heads,),
        reference="models/modernbert/modeling_modernbert.py",
    ),
    Layout(
        "transformers.nomic_bert",
        (
            Form(projections("o_proj"), "module"),
            one_kernel("Wqkv", "out_proj", name="published"),
        ),
        needs=(rotary(HALVES),),
        limits=(same_heads,),
        reference="models/nomic_bert/modeling_nomic_bert.py",
    ),
    Layout(
        "transformers.dbrx",
        (one_kernel("Wqkv", "out_proj", bias=False),),
        needs=(rotary(HALVES), CLIP),
        reference="models/dbrx/modeling_dbrx.py",
    ),
    Layout(
        "internlm.internlm2",
        (one_kernel("wqkv", "wo", "groups"),),
        needs=(rotary(HALVES),),
        reference="huggingface.co/internlm/internlm2-7b, modeling_internlm2.py",
    ),
    Layout(
        "gpt_fast.Attention",
        (one_kernel("wqkv", "wo", bias=False),),
        needs=(rotary(PAIRS),),
        reference="github.com/pytorch-labs/gpt-fast, model.py",
    ),
    Layout(
        "megatron.SelfAttention",
        (one_kernel("linear_qkv", "linear_proj", "groups"),),
        extras=(
            *(
                Extra(f"linear_qkv.layer_norm_{part}", "a norm of the inputs, in `linear_qkv`")
                for part in ("weight", "bias")
            ),
            *(
                Extra(
                    f"{name[0]}_layernorm.{part}",
                    f"a norm of each {name} head",
                    shows=("head_dim", 0),
                )
                for name in ("query", "key")
                for part in ("weight", "bias")
            ),
        ),
        needs=(Need("rotary", "rotary positions on queries and keys, where the model has them"),),
        reference="megatron/core/transformer/attention.py",
    ),
    # llama.cpp's names; its files of Llama and Mistral have the rows of Meta's.
    *(
        Layout(
            f"gguf.{name}",
            (
                Form(four("attn_q", "attn_k", "attn_v", "attn_output"), "separate"),
                one_kernel("attn_qkv", "attn_output", name="fused"),
            ),
            extras=norm_weights("attn_{}_norm", shows=("head_dim", 0)),
            needs=(
                rotary(order, "; or none, where the architecture has other positions", share=1.0),
                norm_need(QueryKeyNorm(), "rms_norm_eps"),
            ),
            scale="free",
            options=("sliding_window",),
            reference="gguf-py/gguf/tensor_mapping.py; llama_model_rope_type of llama.cpp",
        )
        for name, order in (("llama", PAIRS), ("qwen2", HALVES))
    ),
)
