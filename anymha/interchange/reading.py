"""Read a foreign layer's arrays: find their form, check their dtypes, make their config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anymha.errors import LayoutError, WeightsError
from anymha.framework.dtypes import FLOATING
from anymha.interchange.forms import Extra, Form
from anymha.interchange.leftovers import MLA_REASON, changed_modules, refusal
from anymha.interchange.packing import Arrays
from anymha.interchange.sizes import Shapes
from anymha.options.config import PROJECTIONS, AttentionConfig

MLA = ("kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj")
"""Names of multi-head latent attention."""


def form_of(
    layout: str,
    forms: Sequence[Form],
    extras: Sequence[Extra],
    refused: Mapping[str, str],
    shapes: Shapes,
) -> Form:
    """Find the form that has these names.

    Raises:
        LayoutError: the layer has what cannot be converted.
        WeightsError: a name is missing or unknown.
    """
    for name, reason in refused.items():
        if name in shapes:
            raise LayoutError(f"{layout} with `{name}` cannot be converted: {reason}")
    if any(part in MLA for name in shapes for part in name.split(".")):
        raise LayoutError(MLA_REASON)
    allowed = [extra.array for extra in extras]
    required = [extra.array for extra in extras if extra.required]
    misses = []
    for form in forms:
        missing = [name for name in (*form.required(), *required) if name not in shapes]
        unknown = [name for name in shapes if name not in (*form.names(), *allowed)]
        if not missing and not unknown:
            return form
        misses.append((len(missing) + len(unknown), form, missing, unknown))
    _, form, missing, unknown = min(misses, key=lambda miss: miss[0])
    raise WeightsError(
        f"The layout has the names {', '.join((*form.names(), *required))}. Missing: "
        f"{', '.join(missing) or 'none'}. Unknown: {', '.join(unknown) or 'none'}."
    )


def check_plain(arrays: Mapping[str, np.ndarray]) -> None:
    """Check by their names that the arrays are of no quantised layer and of no adapter.

    Raises:
        LayoutError: they are.
    """
    changed = changed_modules(arrays, {name: array.dtype.name for name, array in arrays.items()})
    if changed:
        raise LayoutError(f"The layer cannot be converted: {refusal(next(iter(changed.values())))}")


def check_floats(arrays: Mapping[str, np.ndarray]) -> None:
    """Check that the arrays are of dtypes that a layer can have.

    Raises:
        LayoutError: one is not, as in quantised layers.
    """
    for name, array in arrays.items():
        if array.dtype.name not in FLOATING:
            raise LayoutError(
                f"`{name}` must be of {', '.join(FLOATING)}. Received: {array.dtype}. Convert a "
                "layer that is not quantised, or turn its values into floats first."
            )


def config_of(weights: Arrays, options: Mapping[str, Any]) -> AttentionConfig:
    """The config of canonical weights, with the options that they do not show."""
    query, key = weights["query.kernel"], weights["key.kernel"]
    value, output = weights["value.kernel"], weights["output.kernel"]
    gate = weights.get("gate.kernel")
    if gate is not None:
        options = {**options, "gate": "head" if gate.ndim == 2 else "elementwise"}
    biased: Any = tuple(name for name in (*PROJECTIONS, "gate") if f"{name}.bias" in weights)
    return AttentionConfig(
        num_heads=query.shape[1],
        key_dim=query.shape[2],
        value_dim=value.shape[2],
        use_bias=biased,
        output_shape=output.shape[2:],
        query_features=query.shape[0],
        value_features=value.shape[0],
        key_features=key.shape[0],
        num_key_value_heads=key.shape[1],
        dtype=query.dtype,
        **options,
    )
