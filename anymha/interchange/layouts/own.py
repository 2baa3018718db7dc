"""anymha's own names and shapes, the canonical form, as in the files of `anymha.save`."""

from __future__ import annotations

import math

import numpy as np

from anymha.framework.validation import PROJECTIONS
from anymha.interchange.compared_options import ALL_OPTIONS
from anymha.interchange.forms import FEATURE_WEIGHTS, Extra, Form, Need
from anymha.interchange.layout import Layout
from anymha.interchange.packing import linear
from anymha.options.config import AttentionConfig

PIECES = tuple(
    piece
    for name in (*PROJECTIONS, "gate")
    for piece in linear(
        name, name, form="heads", parts=(".kernel", ".bias"), optional=name == "gate"
    )
)

LAYOUTS = (
    Layout(
        "anymha",
        (Form(PIECES),),
        extras=tuple(Extra(name, weight=name) for name in FEATURE_WEIGHTS),
        needs=(
            Need(
                "query_key_norm",
                "the norm of queries and keys",
                example="anymha.QueryKeyNorm(...)",
            ),
        ),
        scale="free",
        options=ALL_OPTIONS,
        reference="anymha/options/config.py",
    ),
)


def from_torch_state(
    config: AttentionConfig, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays by canonical name, where they are the `state_dict` of PyTorch's layer of anymha.

    Its projections have matrices as `torch.nn.Linear`, of shape (outputs, inputs). Other arrays,
    and those that do not fit the config, are left as they are.
    """
    matrices = [arrays.get(f"{name}.weight") for name in ("query", "value", "key")]
    widths = [matrix.shape[1] for matrix in matrices if matrix is not None and matrix.ndim == 2]
    if len(widths) < 3:
        return arrays
    shapes, found = config.weight_shapes(*widths), {}
    for name, array in arrays.items():
        full = name.replace(".weight", ".scale")
        full = full if full in shapes else name.replace(".weight", ".kernel")
        value, shape = array.T if full.endswith(".kernel") else array, shapes.get(full, ())
        found[full] = value.reshape(shape) if value.size == math.prod(shape) else value
    return found
