"""The projections of a call: by arrays or by functions, and the dtypes before and after them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from anymha.errors import ShapeError
from anymha.framework.protocol import Array, Ops
from anymha.framework.shapes import product
from anymha.layer.call_shape import CallShape
from anymha.layer.numerics import cast_to, without_gradient, without_subnormals
from anymha.layer.plan import Plan, WeightsKind

Weights = Mapping[str, Array]
"""Canonical names (``query.kernel``) and arrays; a bias that is absent is not there."""


class Projections(NamedTuple):
    """Projections that are called, in the place of kernels and biases as arrays.

    Args:
        functions: By "query", "key", "value", "output" and the names of the features' projections
            a function of (B, length, width in) that gives (B, length, width out), heads side by
            side.
        kind: What a plan depends on of their weights.
        key_bias: The key's bias (K, d_k), for the activity penalty; None where there is none.
        of_rows: Whether the functions take and give matrices instead, (B * length, width), in the
            dtype in which the layer computes.
        weights: The features' weights by canonical name, if there are any.
    """

    functions: Mapping[str, Callable[[Array], Array]]
    kind: WeightsKind
    key_bias: Array | None = None
    of_rows: bool = False
    weights: Weights | None = None


def rows_of(ops: Ops, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Query, key and value (B, length, D) as matrices (B * length, D); one array as one."""
    rows = ops.reshape(query, (-1, query.shape[-1]))
    value_rows = rows if value is query else ops.reshape(value, (-1, value.shape[-1]))
    if key is query:
        return rows, rows, value_rows
    if key is value:
        return rows, value_rows, value_rows
    return rows, ops.reshape(key, (-1, key.shape[-1])), value_rows


def in_compute_dtype(plan: Plan, x: Array) -> Array:
    """An array rounded to the compute dtype, in the dtype of what goes from stage to stage."""
    if x.dtype == plan.carried and not plan.rounds:
        return x
    return cast_to(plan.ops, cast_to(plan.ops, x, plan.compute_dtype), plan.carried)


def rounded(plan: Plan, x: Array) -> Array:
    """A result in the dtype of the results."""
    if x.dtype == plan.result:
        return x
    if plan.double and plan.result == plan.ops.float32:
        x = without_subnormals(plan.ops, x)
    return plan.ops.astype(x, plan.result)


def project(ops: Ops, x: Array, kernel: Array, bias: Array | None, contracted: int) -> Array:
    """``x . kernel + bias`` over the last `contracted` axes of `x`, as one matrix product.

    Args:
        ops: The backend.
        x: (B, T, *I), I being the `contracted` first axes of the kernel.
        kernel: (*I, *O).
        bias: (*O), or None.
        contracted: Number of axes that are summed over, 1 or 2.

    Returns:
        (B, T, *O).
    """
    shape, reshape = kernel.shape, ops.reshape
    outer = shape[contracted:]
    inner = shape[0] if contracted == 1 else shape[0] * shape[1]
    width = outer[0] if len(outer) == 1 else product(outer)
    lengths = ops.shape(x)[:2]
    linear = ops.capabilities.linear
    if len(shape) != 2 or contracted != 1:
        kernel = reshape(kernel, (inner, width))
    if linear is not None:
        if bias is not None and len(outer) != 1:
            bias = reshape(bias, (width,))
        y = linear(reshape(x, (lengths[0] * lengths[1], inner)), kernel, bias)
    else:
        if contracted != 1:
            x = reshape(x, (*lengths, inner))
        y = ops.tensordot(x, kernel, axes=1)
        y = y if bias is None else y + reshape(bias, (1, 1, width))
    return reshape(y, (*lengths, *outer))


def computed(
    plan: Plan, arrays: Mapping[str, Array], name: str, x: Array, shape: tuple[Any, ...]
) -> Array:
    """What a projection gives, by its kernel and its bias.

    Args:
        plan: The plan.
        arrays: The weights by canonical name, among others.
        name: The projection's name.
        x: (B, length, D), or the context (B, T, H, d_v).
        shape: The shape of what it gives, which the kernel tells as well.
    """
    bias = arrays.get(f"{name}.bias")
    if bias is not None:
        bias = in_compute_dtype(plan, bias)
        if name == "key":
            bias = without_gradient(plan.ops, bias, plan.config.free_columns)
    kernel = in_compute_dtype(plan, arrays[f"{name}.kernel"])
    return project(plan.ops, x, kernel, bias, 2 if name == "output" else 1)


def called(
    plan: Plan,
    functions: Mapping[str, Callable[[Array], Array]],
    name: str,
    x: Array,
    shape: tuple[Any, ...],
) -> Array:
    """What a projection gives that is called.

    Args:
        plan: The plan.
        functions: The projections by name.
        name: The projection's name.
        x: (B, length, D), or the context (B, T, H, d_v).
        shape: The shape of what it gives; of the output without O where that is not known.
    """
    ops = plan.ops
    if name == "output":
        x = ops.reshape(x, (shape[0], shape[1], plan.context_width))
    y = functions[name](x)
    width, wanted = y.shape[-1], math.prod(shape[2:])
    if len(shape) > 2 and isinstance(width, int) and width != wanted:
        raise ShapeError(
            f"The projection `{name}` must give {wanted} features, as the layer's options say. "
            f"Received: {width}. Put a projection of that width there, or make the layer anew."
        )
    y = ops.reshape(y, with_width(shape, y))
    if y.dtype == plan.carried:
        return y
    if plan.double:
        return ops.in_float64(lambda arrays: ops.astype(arrays["y"], plan.carried), {"y": y})
    return ops.astype(y, plan.carried)


def with_width(shape: tuple[Any, ...], y: Array) -> tuple[Any, ...]:
    """The shape of what a projection gives, with its own width where that was not known."""
    return shape if len(shape) > 2 else (*shape, y.shape[-1])


def further(
    plan: Plan,
    shape: CallShape,
    projections: Projections | None,
    functions: Any,
    query: Array,
    of_rows: bool,
) -> dict[str, Array]:
    """What the features' own projections of the query input give, (B, T, *axes), by name.

    Args:
        plan: The plan.
        shape: The call's lengths.
        projections: The projections, where they are called.
        functions: Those by name, or the arrays.
        query: (B, T, D_q), or (B * T, D_q) where it is `of_rows`.
        of_rows: Whether projections take and give matrices.
    """
    project, found = computed if projections is None else called, {}
    for name, axes in plan.config.further_projections.items():
        full = (*shape.folded[:2], *axes)
        if of_rows:
            found[name] = plan.ops.reshape(functions[name](query), full)
        else:
            found[name] = project(plan, functions, name, query, full)
    within = projections is not None and plan.double

    def activated(found: Mapping[str, Array]) -> dict[str, Array]:
        every = dict(found)
        for feature in plan.spec.features:
            every = {name: feature.activated(plan.ops, name, y) for name, y in every.items()}
        return every

    return plan.ops.in_float64(activated, found) if within else activated(found)


def weights_of_features(plan: Plan, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays by name, the features' weights rounded to the compute dtype, in the working dtype."""
    ops, config, own = plan.ops, plan.config, dict(arrays)
    for name in config.feature_weights:
        if name in own:
            weight = cast_to(ops, cast_to(ops, own[name], plan.compute_dtype), plan.working)
            free = config.without_gradient.get(name)
            if free is not None:
                free *= weight.shape[-1] // len(free)  # of all heads side by side
                weight = without_gradient(ops, weight, free)
            own[name] = weight
    return own
