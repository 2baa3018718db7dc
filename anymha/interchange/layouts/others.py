"""x-transformers, timm, vit-pytorch, diffusers, flash-attn, Whisper, ONNX Runtime's operator.

References:
    x-transformers 2.31, ``x_transformers.py`` and ``attend.py``; timm 1.0, ``layers/attention.py``;
    vit-pytorch 1.9, ``vit.py``; diffusers 0.35, ``models/attention_processor.py``; flash-attn 2.8,
    ``modules/mha.py``; Whisper, ``whisper/model.py``; ONNX Runtime 1.32,
    ``docs/ContribOperators.md``, com.microsoft.MultiHeadAttention.
"""

from __future__ import annotations

from anymha.interchange.forms import Extra, Form, Need
from anymha.interchange.layout import Layout
from anymha.interchange.layouts.encoders import four, one_kernel
from anymha.interchange.layouts.rotary import HALVES
from anymha.interchange.limits import gate_of_each_element, same_heads
from anymha.interchange.packing import QKV, Piece, fused, linear

# Query heads are dealt out to the key heads one by one, so that h belongs to h % K.
X_TRANSFORMERS = (
    *linear("query", "to_q", bias=False, tiled=True),
    *linear("key", "to_k", bias=False),
    *linear("value", "to_v", bias=False),
    *linear("output", "to_out", bias=False, tiled=True),
)
TIMM_NORM = "norms of queries and keys, per head, before the logits (`qk_norm`)"
TIMM_SCALE = "a norm of the heads' outputs, before the output projection (`scale_norm`)"

LAYOUTS = (
    Layout(
        "x_transformers.Attention",
        (Form(X_TRANSFORMERS),),
        reference="x_transformers/x_transformers.py",
    ),
    Layout(
        "timm.vit",
        (Form((*one_kernel("qkv", "proj").pieces, *linear("gate", "gate", optional=True))),),
        extras=tuple(
            Extra(f"{name}.{part}", TIMM_NORM, shows=("head_dim", 0))
            for name in ("q_norm", "k_norm")
            for part in ("weight", "bias")
        )
        + tuple(Extra(f"norm.{part}", TIMM_SCALE) for part in ("weight", "bias")),
        limits=(same_heads, gate_of_each_element),
        options=("gate",),
        reference="timm/layers/attention.py",
    ),
    # Its norm of the inputs is in the same module.
    Layout(
        "vit_pytorch.Attention",
        (one_kernel("to_qkv", "to_out.0", bias=False, output_bias=True),),
        extras=tuple(
            Extra(f"norm.{part}", "a layer norm of the inputs, `norm`")
            for part in ("weight", "bias")
        ),
        limits=(same_heads,),
        reference="vit_pytorch/vit.py",
    ),
    Layout(
        "diffusers.Attention",
        (Form(four("to_q", "to_k", "to_v", "to_out.0")),),
        extras=(
            *(
                Extra(f"norm_{name}.weight", f"a norm of the {word}, `norm_{name}` (`qk_norm`)")
                for name, word in (("q", "queries"), ("k", "keys"))
            ),
            *(
                Extra(f"{name}.{part}", f"a norm of the inputs, `{name}`")
                for name in ("group_norm", "norm_cross")
                for part in ("weight", "bias")
            ),
        ),
        refused={
            f"add_{name}_proj.weight": "it projects a second sequence, with which it attends."
            for name in "qkv"
        },
        reference="diffusers/models/attention_processor.py",
    ),
    Layout(
        "flash_attn.MHA",
        (
            one_kernel("Wqkv", "out_proj", name="self"),
            Form(
                (
                    *linear("query", "Wq"),
                    *fused("Wkv", holds=("key", "value")),
                    *linear("output", "out_proj"),
                ),
                "cross",
            ),
        ),
        needs=(
            Need(
                "rotary",
                f"{HALVES} (or with the next one, with `rotary_emb_interleaved`), where "
                "`rotary_emb_dim` is not 0",
            ),
        ),
        options=("sliding_window",),
        reference="flash_attn/modules/mha.py",
    ),
    Layout(
        "openai.whisper",
        (Form(four("query", "key", "value", "out", biased=("query", "value", "output"))),),
        limits=(same_heads,),
        reference="whisper/model.py",
    ),
    # The operator itself has the bias alone; the kernels are the products before and after it.
    Layout(
        "onnxruntime.MultiHeadAttention",
        (
            Form(
                (
                    *(Piece(f"{name}_weight", (name,), "kernel", "matrix") for name in QKV),
                    Piece("bias", QKV, "bias"),
                    *linear("output", "output", form="matrix", parts=("_weight", "_bias")),
                )
            ),
        ),
        limits=(same_heads,),
        reference="com.microsoft.MultiHeadAttention",
    ),
)
