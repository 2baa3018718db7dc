"""The functions that find their backend by the type of the arrays they are given."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

from anymha.attention.dropout import Dropout, draw_seed, rate_threshold
from anymha.attention.features import Alibi, Feature, RotaryPositions, Sinks, Softcap
from anymha.attention.masks import all_of, position_mask
from anymha.attention.merging import merged
from anymha.attention.spec import AttentionSpec
from anymha.errors import ArgumentError, ConfigError, DtypeError, ShapeError
from anymha.execution import path as paths
from anymha.execution.attend import Attended, attend
from anymha.execution.path import AttentionShape, Path, choose_path
from anymha.framework.dtypes import accumulation_dtype, dtype_name, multiplies
from anymha.framework.names import answer, answers, backticked
from anymha.framework.protocol import Array, Index, Ops, Shaped
from anymha.framework.registry import check_named, common_ops
from anymha.framework.shapes import check_broadcast, described, is_known, show
from anymha.framework.validation import (
    checked_flag,
    checked_rate,
    checked_scale,
    checked_size,
    checked_window,
)
from anymha.layer.arguments import BY_NAME, INPUTS, KEYWORDS, call_documentation, call_parameters
from anymha.layer.call_shape import positions_of
from anymha.layer.checks import (
    check_arrays,
    check_offset,
    check_seed,
    check_segments,
    check_weights,
    unpack_inputs,
)
from anymha.layer.forward import multi_head_attention as call_layer
from anymha.layer.native import CallOptions
from anymha.layer.other_names import FUNCTION_PEERS, unexpected
from anymha.layer.plan import Plans, plans_unless_tracing
from anymha.options.config import AttentionConfig


class _NoMore(TypedDict):
    """No further keyword, for type checkers; at run time one gets an answer."""


def dot_product_attention(
    query: Shaped,
    key: Shaped,
    value: Shaped,
    *,
    mask: Shaped | None = None,
    bias: Shaped | None = None,
    query_mask: Shaped | None = None,
    value_mask: Shaped | None = None,
    segment_ids: Shaped | None = None,
    key_segment_ids: Shaped | None = None,
    alibi_slopes: Shaped | None = None,
    sinks: Shaped | None = None,
    positions: Shaped | None = None,
    key_positions: Shaped | None = None,
    is_causal: bool = False,
    query_offset: Index | Shaped = 0,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: Index | Shaped | None = None,
    return_scores: bool = False,
    return_lse: bool = False,
    memory_budget: int | None = None,
    **unknown: Unpack[_NoMore],
) -> Any:
    """Attention of query heads over key and value heads, without projections.

        softmax(mask(softcap(scale * query . key) - slope * distance + bias), sink) . value

    Args:
        query: (B, T, H, d_k) floating.
        key: (B, S, K, d_k); K divides H, query head h reads key head ``h // (H // K)``.
        value: (B, S, K, d_v).
        mask: Booleans that broadcast to (B, H, T, S), True = may attend.
        bias: Floating, added to the logits; broadcasts to (B, H, T, S).
        query_mask: (B, T) booleans; a query that is False attends to nothing.
        value_mask: (B, S) booleans; a position that is False does not influence anything.
        segment_ids: (B, T) signed integers, the sequence in the row that each query is of: it sees
            keys of the same id alone. A negative id is padding, which sees and is seen by nothing.
        key_segment_ids: (B, S) integers, likewise of the keys; default `segment_ids` where T is S.
        alibi_slopes: (H,) floating: the logits are lowered by the slope times the distance of
            positions (ALiBi), before the bias.
        sinks: (H,) floating: a further logit of each row, which joins its softmax and has no value.
        positions: (T,) or (B, T) integers, the queries' positions for `alibi_slopes`; default
            index + `query_offset`.
        key_positions: (S,) or (B, S) integers, likewise of the keys; default their index.
        is_causal: Whether query i sees only keys ``j <= i + query_offset``.
        query_offset: Position of the first query among the keys: an int, or integers (B,).
        window: (left, right), the number of keys visible on each side of the query's own
            position; None in a place leaves that side open.
        scale: Factor of the logits; default ``1/sqrt(d_k)``.
        softcap: ``c > 0``: logits become ``c * tanh(logits / c)`` before bias and mask.
        dropout: Share of the probabilities that is dropped, in [0, 1). It acts wherever it is
            not 0: the function knows of no training mode.
        seed: Seed of the dropout; default one from the framework's own generator.
        return_scores: Whether to return the probabilities too.
        return_lse: Whether to return, last, the log of each row's sum of exponentials, by which the
            softmax divides, its sink included. `anymha.merge_attention` takes it.
        memory_budget: Bytes that the logits of one tile of queries may take; default what the
            backend is fastest with. The results mean the same for any.

    Returns:
        (B, T, H, d_v) in the dtype of the inputs; with `return_scores` also the probabilities
        before dropout, (B, H, T, S); with `return_lse` also (B, H, T), float32 at least, -inf for
        a row that has neither a key to see nor a sink.

    Raises:
        ShapeError: shapes do not fit; the message has the expected and the received.
        DtypeError: a mask is not boolean, ids or positions are not integers, or inputs are not
            floating or not of one dtype.
        ArgumentError: segments of queries or of keys are missing.
        MixedBackendsError: the arrays are of several frameworks.
        ConfigError: an option has a value that it cannot have.

    Differs from:
        torch's `scaled_dot_product_attention` has heads before length;
        `jax.nn.dot_product_attention` gives a fully masked row the mean of the values, this
        gives it zeros.

    Example:
        >>> import numpy as np, anymha
        >>> x = np.ones((1, 3, 2, 4), dtype="float32")
        >>> anymha.dot_product_attention(x, x, x, is_causal=True).shape
        (1, 3, 2, 4)

    References:
        A. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.
    """
    if unknown or query is None or key is None or value is None:
        raise _wrong_names(unknown, query=query, key=key, value=value)
    flags = {"is_causal": is_causal, "return_scores": return_scores, "return_lse": return_lse}
    for name, given in flags.items():
        if given is not True and given is not False:
            checked_flag(given, name)
    named = {
        "query": query, "key": key, "value": value, "mask": mask, "bias": bias,
        "query_mask": query_mask, "value_mask": value_mask, "segment_ids": segment_ids,
        "key_segment_ids": key_segment_ids, "alibi_slopes": alibi_slopes, "sinks": sinks,
        "positions": positions, "key_positions": key_positions,
    }  # fmt: skip
    arrays = {name: array for name, array in named.items() if array is not None}
    ops = common_ops(arrays.items())
    check_arrays(ops, arrays)
    _check_heads(arrays)
    _check_masks(arrays)
    mixed = _mixed_dtype(ops, query)
    if mixed is not None:
        arrays |= {name: ops.astype(arrays[name], mixed) for name in ("query", "key", "value")}
        query = arrays["query"]
    query_offset = check_offset(ops, query_offset, query.shape[0])
    left, right = checked_window(window, "window")
    scale, softcap = checked_scale(scale, "scale"), Softcap.checked(softcap)
    if memory_budget is not None:
        memory_budget = checked_size(memory_budget, "memory_budget")
    threshold = rate_threshold(checked_rate(dropout, "dropout"))
    seed = check_seed(ops, seed)
    if threshold and seed is None:
        seed = draw_seed(ops, query)
    if not threshold:
        seed = None
    dtype = dtype_name(query.dtype)
    working = accumulation_dtype(dtype)
    narrow = multiplies(ops, dtype, ops.device(query))
    spec = AttentionSpec(
        1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        _features(arrays, softcap),
        position_mask(is_causal, (left, right), query_offset),
        Dropout(threshold, seed) if threshold else None,
        memory_budget,
    )
    shape = _attention_shape(ops, arrays, ops.dtype(working), query.dtype if narrow else None)
    path = choose_path(
        ops, spec, shape, observed=False, with_scores=return_scores, with_lse=return_lse
    )
    if paths.explaining:
        paths.report(path)
    values = {"query_offset": query_offset, "seed": seed}
    arrays |= {name: x for name, x in values.items() if x is not None and ops.is_array(x)}

    def forward(arrays: Mapping[str, Array]) -> Any:
        visible = spec.position_mask.at(ops, arrays.get("query_offset", query_offset))
        drop = spec.dropout and replace(spec.dropout, seed=arrays.get("seed", seed))
        own = replace(spec, position_mask=visible, dropout=drop)
        context, *rest = _attend(ops, own, path, arrays, return_scores, return_lse)
        rest = [x for x in rest if x is not None]
        return (context, *rest) if rest else context

    return ops.in_float64(forward, arrays) if dtype == "float64" else forward(arrays)


# `help` shows the arguments that there are; a call that lacks an array reaches `_wrong_names`.
_parameters = list(inspect.signature(dot_product_attention).parameters.values())
dot_product_attention.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
    _parameters[:-1], return_annotation="Any"
)
dot_product_attention.__defaults__ = (None, None, None)


def _wrong_names(unknown: Mapping[str, Any], **inputs: Any) -> ArgumentError:
    """The error for names that `dot_product_attention` does not have, or for inputs it lacks."""
    known = [parameter.name for parameter in _parameters[:-1]]
    told = [f"`{name}`: {answer(name, known, FUNCTION_PEERS)}" for name in unknown]
    lacking = [name for name, array in inputs.items() if array is None]
    if told:
        return ArgumentError(
            f"`dot_product_attention` has no argument {backticked(unknown)}. {' '.join(told)}"
        )
    return ArgumentError(
        f"`query`, `key` and `value` must be arrays. Received: no {backticked(lacking)}. "
        "Pass all three."
    )


def _attention_shape(
    ops: Ops, arrays: Mapping[str, Array], working: Any, narrow: Any
) -> AttentionShape:
    """What the path is chosen by."""
    query, value = arrays["query"], arrays["value"]
    batch, queries, heads, key_dim = query.shape
    _, keys, key_heads, value_dim = value.shape
    bias = arrays.get("bias")
    differentiated = ops.capabilities.is_differentiated
    return AttentionShape(
        batch, heads, key_heads, queries, keys, key_dim, value_dim, working, ops.device(query),
        narrow,
        has_mask=any(n in arrays for n in ("mask", "query_mask", "value_mask", "segment_ids")),
        has_bias=bias is not None,
        per_query="query_mask" in arrays or "segment_ids" in arrays
        or any(
            name in arrays and len(arrays[name].shape) > 1 and arrays[name].shape[-2] != 1
            for name in ("mask", "bias")
        ),
        bias_differentiated=(
            bias is not None and differentiated is not None and differentiated(bias)
        ),
        has_segments="segment_ids" in arrays,
        wide_bias=bias is not None and bias.dtype != query.dtype,
    )  # fmt: skip


def _attend(
    ops: Ops,
    spec: AttentionSpec,
    path: Path,
    arrays: Mapping[str, Array],
    with_scores: bool,
    with_lse: bool,
) -> Attended:
    dtype = arrays["query"].dtype
    working = ops.dtype(accumulation_dtype(dtype_name(dtype)))
    q, k, v = (
        arrays[name] if path.narrow else ops.astype(arrays[name], working)
        for name in ("query", "key", "value")
    )
    query_mask = key_mask = None
    if "query_mask" in arrays:
        batch, length = ops.shape(arrays["query_mask"])
        query_mask = ops.reshape(arrays["query_mask"], (batch, 1, length, 1))
        q = ops.where(ops.reshape(query_mask, (batch, length, 1, 1)), q, 0.0)
    if "value_mask" in arrays:
        batch, length = ops.shape(arrays["value_mask"])
        key_mask = ops.reshape(arrays["value_mask"], (batch, 1, 1, length))
        seen = ops.reshape(key_mask, (batch, length, 1, 1))
        k, v = ops.where(seen, k, 0.0), ops.where(seen, v, 0.0)
    if any(feature.counts_positions for feature in spec.features):
        given = {n: arrays[n] for n in ("positions", "key_positions") if n in arrays}
        given = {n: ops.reshape(x, (-1, ops.shape(x)[-1])) for n, x in given.items()}
        lengths = ops.shape(q)[1], ops.shape(k)[1]
        offset = spec.position_mask.offset
        arrays = {**arrays, **positions_of(ops, given, lengths, offset, q)}
    tiled: dict[str, Array] = {}
    for feature in spec.features:
        q, k = feature.heads(ops, q, k, arrays)
        tiled |= feature.tiled(ops, arrays, q)
    ids = arrays.get("segment_ids")
    context, scores, lse = attend(
        ops, spec, path, q, k, v,
        mask=all_of(ops, [arrays.get("mask"), query_mask, key_mask]),
        bias=ops.astype(arrays["bias"], working) if "bias" in arrays else None,
        with_scores=with_scores,
        tiled=tiled,
        segments=None if ids is None else (ids, arrays.get("key_segment_ids", ids)),
        with_lse=with_lse,
    )  # fmt: skip
    for feature in spec.features:
        context = feature.context(ops, context, arrays)
    scores = None if scores is None else ops.astype(scores, dtype)
    return ops.astype(context, dtype), scores, lse


def _features(arrays: Mapping[str, Array], softcap: float | None) -> tuple[Feature, ...]:
    """The options of a call of `dot_product_attention`, in their order."""
    features = (
        None if softcap is None else Softcap(softcap),
        Alibi() if "alibi_slopes" in arrays else None,
        Sinks() if "sinks" in arrays else None,
    )
    return tuple(feature for feature in features if feature is not None)


def _check_heads(arrays: Mapping[str, Array]) -> None:
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    for name, array in (("query", query), ("key", key), ("value", value)):
        if len(array.shape) != 4:
            raise ShapeError(
                f"`{name}` must have 4 axes, (batch, length, heads, width). "
                f"Received: {described(array)}. Add or take away axes."
            )
        if array.dtype != query.dtype:
            raise DtypeError(
                "`query`, `key` and `value` must have one dtype. Received: query of "
                f"{dtype_name(query.dtype)}, {name} of {dtype_name(array.dtype)}. Cast one."
            )

    def fit(a: Array, b: Array, axis: int) -> bool:
        n, m = a.shape[axis], b.shape[axis]
        return not (is_known(n) and is_known(m)) or n == m

    heads, shared = query.shape[2], key.shape[2]
    grouped = not (is_known(heads) and is_known(shared)) or (shared and heads % shared == 0)
    fits = (
        all(fit(key, value, axis) for axis in (0, 1, 2))
        and all(fit(query, key, axis) for axis in (0, 3))
        and grouped
    )
    if not fits:
        raise ShapeError(
            "`query`, `key` and `value` must have shapes (B, T, H, d_k), (B, S, K, d_k) and "
            "(B, S, K, d_v), H a multiple of K. Received: "
            f"{show(query.shape)}, {show(key.shape)} and {show(value.shape)}. "
            "Move heads after the length if they stand before it."
        )


def _check_masks(arrays: Mapping[str, Array]) -> None:
    batch, queries, heads, _ = arrays["query"].shape
    keys = arrays["key"].shape[1]
    lengths = {
        "mask": (batch, heads, queries, keys),
        "bias": (batch, heads, queries, keys),
        "query_mask": (batch, queries),
        "value_mask": (batch, keys),
    }
    for name in [name for name in lengths if name in arrays]:
        if name.endswith("_mask") and len(arrays[name].shape) != 2:
            raise ShapeError(
                f"`{name}` must have shape {show(lengths[name])}. "
                f"Received: {described(arrays[name])}. Pass what has more axes as `mask`."
            )
        check_broadcast(arrays[name], lengths[name], name)
    shapes = {
        "segment_ids": ((batch, queries),),
        "key_segment_ids": ((batch, keys),),
        "positions": ((queries,), (batch, queries)),
        "key_positions": ((keys,), (batch, keys)),
        "alibi_slopes": ((heads,),),
        "sinks": ((heads,),),
    }
    for name in [name for name in shapes if name in arrays]:
        rank = len(arrays[name].shape)
        fitting = next((shape for shape in shapes[name] if len(shape) == rank), None)
        if fitting is None:
            raise ShapeError(
                f"`{name}` must have shape {' or '.join(map(show, shapes[name]))}. "
                f"Received: {described(arrays[name])}. Pass such an array."
            )
        check_broadcast(arrays[name], fitting, name)
        if fitting == (heads,) and arrays[name].shape[0] == 1 != heads and is_known(heads):
            raise ShapeError(
                f"`{name}` must have shape {show(fitting)}, a number for each query head. "
                f"Received: {described(arrays[name])}. Pass as many as there are heads."
            )
    check_segments(arrays, queries == keys, "where T is S")


def multi_head_attention(
    weights: Mapping[str, Array],
    query: Any,
    value: Array | None = None,
    key: Array | None = None,
    *,
    config: AttentionConfig,
    **call: Unpack[CallOptions[Any]],
) -> Any:
    """The whole layer as a function of its weights, in the framework of its arrays.

    Args:
        weights: Canonical names and arrays, with the shapes of ``config.weight_shapes(...)``.
            A bias that is absent is not added.
        query: (B, T, D_q), or a list ``[query, value]`` or ``[query, value, key]``.
        value: (B, S, D_v); default `query`.
        key: (B, S, D_k); default `value`.
        config: The layer's options.
        {call}

    Returns:
        The output (B, T, *O); with ``return_attention_scores=True`` also the probabilities
        (B, H, T, S); with ``return_activity_loss=True`` also a scalar, last.

    Raises:
        WeightsError: names or shapes of the weights do not fit the config.
        ShapeError: shapes of the inputs do not fit.
        DtypeError: a mask is not boolean, or an input is not floating.
        MixedBackendsError: the arrays are of several frameworks.
        ArgumentError: there is no such argument; the message has the right one.

    Example:
        >>> import numpy as np, anymha
        >>> config = anymha.AttentionConfig(2, 4, query_features=8)
        >>> shapes = config.weight_shapes()
        >>> weights = {name: np.ones(shape, "float32") for name, shape in shapes.items()}
        >>> x = np.ones((1, 3, 8), dtype="float32")
        >>> anymha.multi_head_attention(weights, x, config=config, use_causal_mask=True).shape
        (1, 3, 8)
    """
    for name in call:
        if name not in KEYWORDS:
            raise unexpected(name, ("weights", "config", *BY_NAME))
    query, value, key = unpack_inputs(query, value, key)
    check_named(weights, "weights")
    named = {"query": query, "value": value, "key": key, **weights}
    ops = common_ops(named.items())
    check_weights(ops, config, weights)
    mixed = _mixed_dtype(ops, weights["query.kernel"])
    if mixed is not None:
        config = _mixed(config, dtype_name(mixed))
    plans = plans_unless_tracing(ops, _plans_of(config))
    return call_layer(ops, config, weights, query, value, key, plans=plans, **call)


@answers(contexts="outputs outs", lses="lse")
def merge_attention(contexts: Sequence[Array], lses: Sequence[Array]) -> Any:
    """Attention over all keys, from the results over parts of them.

        lse = log(sum_i exp(lse_i)),    context = sum_i exp(lse_i - lse) * context_i

    It is exact but for rounding, in any order of the parts, and differentiable. With dropout the
    parts draw masks of their own. A sink joins one part alone.

    Args:
        contexts: For each part (B, T, H, d_v) floating, as `anymha.dot_product_attention` gives it
            with ``return_lse=True``.
        lses: For each part (B, H, T) floating, the log of each row's sum of exponentials.

    Returns:
        The context (B, T, H, d_v) in the dtype of the contexts, and the log-sum-exp (B, H, T) in
        float32 at least. Rows that saw nothing in any part are zero and -inf.

    Raises:
        ArgumentError: there is no part, or not one of `lses` for each of `contexts`.
        ShapeError: shapes do not fit.
        DtypeError: arrays are not floating, or contexts or lses not of one dtype.
        MixedBackendsError: the arrays are of several frameworks.

    Example:
        >>> import numpy as np, anymha
        >>> x = np.ones((1, 4, 2, 8), dtype="float32")
        >>> parts = [
        ...     anymha.dot_product_attention(x, x[:, s], x[:, s], return_lse=True)
        ...     for s in (slice(0, 3), slice(3, 4))
        ... ]
        >>> context, lse = anymha.merge_attention(*zip(*parts))
        >>> context.shape, lse.shape
        ((1, 4, 2, 8), (1, 2, 4))

    References:
        M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax" (2018).
    """
    ops, arrays = _checked_parts(contexts, lses)
    dtypes = [accumulation_dtype(dtype_name(several[0].dtype)) for several in (contexts, lses)]
    working = "float64" if "float64" in dtypes else "float32"

    def forward(arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        wide = {name: ops.astype(x, ops.dtype(working)) for name, x in arrays.items()}
        count = range(len(contexts))
        context, lse = merged(
            ops, [wide[f"contexts[{i}]"] for i in count], [wide[f"lses[{i}]"] for i in count]
        )
        return ops.astype(context, contexts[0].dtype), lse

    return ops.in_float64(forward, arrays) if working == "float64" else forward(arrays)


def _checked_parts(contexts: Any, lses: Any) -> tuple[Ops, dict[str, Array]]:
    """The backend of the parts of `merge_attention`, and its arrays by name, such as "lses[0]"."""
    parts = {"contexts": contexts, "lses": lses}
    for name, several in parts.items():
        empty = isinstance(several, (list, tuple)) and not several
        if empty or not isinstance(several, (list, tuple)):
            raise ArgumentError(
                f"`{name}` must be a list or tuple of arrays, one for each part of the keys. "
                f"Received: {'an empty ' * empty}{type(several).__name__}. "
                "Pass the results for each part."
            )
    if len(contexts) != len(lses):
        raise ArgumentError(
            "`contexts` and `lses` must have a member for each part of the keys. "
            f"Received: {len(contexts)} and {len(lses)}. Pass both of each part."
        )
    arrays = {f"{name}[{i}]": x for name, several in parts.items() for i, x in enumerate(several)}
    ops = common_ops(arrays.items())
    check_arrays(ops, arrays)
    first = contexts[0]
    if len(first.shape) != 4:
        raise ShapeError(
            "`contexts[0]` must have 4 axes, (batch, length, heads, width). "
            f"Received: {described(first)}. Add or take away axes."
        )
    batch, queries, heads, width = first.shape
    wanted = {"contexts": (batch, queries, heads, width), "lses": (batch, heads, queries)}
    for name, array in arrays.items():
        kind = name.partition("[")[0]
        fit = zip(array.shape, wanted[kind], strict=False)
        if len(array.shape) != len(wanted[kind]) or any(
            is_known(n) and is_known(m) and n != m for n, m in fit
        ):
            raise ShapeError(
                f"`{name}` must have shape {show(wanted[kind])}. Received: {described(array)}. "
                "Pass the results for the same queries."
            )
        if array.dtype != parts[kind][0].dtype:
            raise DtypeError(
                f"`{kind}` must have one dtype. Received: {dtype_name(parts[kind][0].dtype)} and "
                f"{dtype_name(array.dtype)}. Cast one."
            )
    return ops, arrays


@answers({"Pass `rotary=anymha.Rotary(base=...)`.": "base theta"}, positions="position_ids")
def rotate(x: Array, positions: Array, rotary: Any, *, length: int | None = None) -> Any:
    """Queries or keys, turned by rotary positions, as the layer's option `rotary` turns them.

    Args:
        x: (B, T, H, d), in any framework.
        positions: Integers (T,) or (B, T), an array of the same framework.
        rotary: An `anymha.Rotary`, the dict of its fields, or True for its defaults.
        length: The length of the sequence, for scalings that depend on it; default T.

    Returns:
        An array of the shape and the dtype of `x`; angles are float32 at least.

    Raises:
        ConfigError: `rotary` has a value that it cannot have, or does not fit d.
        ShapeError: shapes do not fit.
        DtypeError: `x` is not floating, or `positions` are not integers.
        MixedBackendsError: the arrays are of several frameworks.

    Example:
        >>> import numpy as np, anymha
        >>> x = np.ones((1, 3, 2, 4), dtype="float32")
        >>> anymha.rotate(x, np.arange(3), anymha.Rotary()).shape
        (1, 3, 2, 4)
    """
    arrays = {"x": x, "positions": positions}
    ops = common_ops(arrays.items())
    check_arrays(ops, arrays)
    option = RotaryPositions.checked(rotary)
    if option is None:
        raise ConfigError("`rotary` must be an `anymha.Rotary`. Received: none. Pass one.")
    length = None if length is None else checked_size(length, "length")
    if len(x.shape) != 4:
        raise ShapeError(
            "`x` must have 4 axes, (batch, length, heads, width). "
            f"Received: {described(x)}. Add or take away axes."
        )
    if len(positions.shape) not in (1, 2):
        raise ShapeError(
            f"`positions` must have shape ({x.shape[1]},) or {show(x.shape[:2])}. "
            f"Received: {described(positions)}. Pass one position for each of `x`."
        )
    check_broadcast(positions, x.shape[:2], "positions")
    feature = RotaryPositions.of_heads(option, x.shape[-1])

    def forward(arrays: Mapping[str, Array]) -> Array:
        x, places = arrays["x"], arrays["positions"]
        places = ops.reshape(places, (-1, ops.shape(places)[-1]))
        tables = feature.tables(ops, places, ops.shape(x)[1] if length is None else length, x)
        return feature.turned(ops, x, *tables)

    return ops.in_float64(forward, arrays) if dtype_name(x.dtype) == "float64" else forward(arrays)


def _mixed_dtype(ops: Ops, x: Array) -> Any:
    """The dtype of the framework's region of mixed precision; None outside, and for float64."""
    own = ops.capabilities.mixed_dtype
    return None if own is None or dtype_name(x.dtype) == "float64" else own(x)


def _mixed(config: AttentionConfig, dtype: str) -> AttentionConfig:
    """The options in a region of mixed precision; the same object for the same options."""
    place = (config, dtype)
    if place not in _MIXED:
        if len(_MIXED) >= 16:
            _MIXED.clear()
        _MIXED[place] = config.computing_in(dtype)
    return _MIXED[place]


def _show_call(function: Any) -> None:
    """Show the arguments of a layer's call, each with its meaning, as those of the function."""
    weights, *_ = inspect.signature(function).parameters.values()
    config = inspect.signature(function).parameters["config"]
    first = [p for p in call_parameters() if p.kind is p.POSITIONAL_OR_KEYWORD]
    others = [p for p in call_parameters() if p.kind is p.KEYWORD_ONLY]
    function.__signature__ = inspect.Signature(
        [weights, *first, config, *others], return_annotation="Any"
    )
    function.__defaults__ = (None, None, None)
    if function.__doc__:
        inputs = [argument.name for argument in INPUTS]
        shown = call_documentation(without=inputs)
        function.__doc__ = inspect.cleandoc(function.__doc__).replace("    {call}", shown)


_show_call(multi_head_attention)

# TensorFlow's AutoGraph does not convert a function that has this attribute. Without it, a
# `tf.function` that calls one of these converts all the code below it, which takes seconds.
for _function in (dot_product_attention, multi_head_attention, merge_attention, rotate):
    vars(_function)["autograph_info__"] = {}

_PLANS: dict[AttentionConfig, Plans] = {}
_MIXED: dict[tuple[AttentionConfig, str], AttentionConfig] = {}


def _plans_of(config: AttentionConfig) -> Plans:
    """The plans of calls with these options, of which the latest few are kept."""
    plans = _PLANS.get(config)
    if plans is None:
        if len(_PLANS) >= 16:
            _PLANS.clear()
        plans = _PLANS[config] = Plans()
    return plans
