"""x-transformers, timm, and ONNX Runtime's operator.

References:
    x-transformers 2.31, ``x_transformers.py`` and ``attend.py``; timm 1.0, ``layers/attention.py``;
    ONNX Runtime 1.32, ``docs/ContribOperators.md``, com.microsoft.MultiHeadAttention.
"""

from __future__ import annotations

from anymha.interchange.forms import Extra, Form
from anymha.interchange.layout import Layout
from anymha.interchange.limits import same_heads
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
TIMM_GATE = "a gate on the heads' outputs, before the output projection (`gated`)"

LAYOUTS = (
    Layout(
        "x_transformers.Attention",
        (Form(X_TRANSFORMERS),),
        reference="x_transformers/x_transformers.py",
    ),
    Layout(
        "timm.vit",
        (Form((*fused("qkv"), *linear("output", "proj"))),),
        extras=tuple(
            Extra(f"{name}.{part}", TIMM_NORM, shows=("head_dim", 0))
            for name in ("q_norm", "k_norm")
            for part in ("weight", "bias")
        )
        + tuple(Extra(f"norm.{part}", TIMM_SCALE) for part in ("weight", "bias"))
        + tuple(Extra(f"gate.{part}", TIMM_GATE) for part in ("weight", "bias")),
        limits=(same_heads,),
        reference="timm/layers/attention.py",
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
