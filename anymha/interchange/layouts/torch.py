"""PyTorch's `torch.nn.MultiheadAttention`: one packed kernel, or three of inputs of other widths.

References:
    PyTorch 2.13, ``torch/nn/modules/activation.py`` and ``torch/nn/functional.py``.
"""

from __future__ import annotations

from anymha.framework.validation import PROJECTIONS
from anymha.interchange.forms import Form
from anymha.interchange.layout import Layout
from anymha.interchange.limits import same_heads, same_widths, square
from anymha.interchange.packing import QKV, Piece, linear

BIAS = Piece("in_proj_bias", QKV, "bias")
OUTPUT = linear("output", "out_proj")
ROW = (
    "it is one more key and one more value after those of the inputs, which no weight of the "
    "canonical form can be. Make the layer with `add_bias_kv=False`."
)

LAYOUTS = (
    Layout(
        "torch.MultiheadAttention",
        (
            Form((Piece("in_proj_weight", QKV, "kernel"), BIAS, *OUTPUT), "packed"),
            Form(
                (
                    *(Piece(f"{name[0]}_proj_weight", (name,), "kernel") for name in QKV),
                    BIAS,
                    *OUTPUT,
                ),
                "separate",
            ),
        ),
        limits=(same_heads, same_widths, square),
        together=PROJECTIONS,
        refused={"bias_k": ROW, "bias_v": ROW},
        reference="torch/nn/modules/activation.py",
    ),
)
