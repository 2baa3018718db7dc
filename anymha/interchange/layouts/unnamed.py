"""Fused kernels under any name, in either order of their rows: for models of no known library.

Many models give their fused kernel one of a few names, and the names do not tell the order. So
wherever a kernel may be of a known family, its twin in the other order is listed beside it.
"""

from __future__ import annotations

from anymha.interchange.forms import Form, Need
from anymha.interchange.layout import Layout
from anymha.interchange.limits import same_heads
from anymha.interchange.packing import fused, linear

KERNELS = (
    "qkv", "c_attn", "query_key_value", "qkv_proj", "Wqkv", "wqkv", "to_qkv", "linear_qkv",
    "in_proj",
)  # fmt: skip
OUTPUTS = (
    "proj", "c_proj", "dense", "o_proj", "out_proj", "Wo", "wo", "to_out", "to_out.0",
    "linear_proj", "projection", "out", "o",
)  # fmt: skip


def layout(name: str, packing: str) -> Layout:
    """The layout of all these names in one order."""
    return Layout(
        name,
        tuple(
            Form(
                (*fused(kernel, packing), *linear("output", output)),
                f"{kernel}, {output}",
                # Mamba's `in_proj` would pass for grouped heads.
                (same_heads,) if kernel == "in_proj" else (),
            )
            for kernel in KERNELS
            for output in OUTPUTS
        ),
        needs=(
            Need("rotary", "rotary positions or other steps, where the model has them: these names "
                 "do not tell"),
        ),
        options=("sliding_window",),
        scale="free",
        reference="no library: the order alone",
    )  # fmt: skip


LAYOUTS = (layout("fused.blocks", "blocks"), layout("fused.groups", "groups"))
