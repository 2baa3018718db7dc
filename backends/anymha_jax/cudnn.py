"""Attention in half precision by cuDNN's kernel: when it is taken, and how it is called.

The kernel has neither a second derivative, nor forward differentiation, nor a meaning for rows that
see nothing. Derivatives that it lacks are those of the written formula. A row that sees nothing is
shown all keys, and its result and its cotangent are replaced by zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from anymha.attention.formula import formula
from anymha.attention.masks import PositionMask, TileOrigin
from anymha.attention.spec import AttentionSpec
from anymha.execution.path import AttentionShape
from anymha.framework.protocol import Ops
from anymha_jax.products import HALF
from anymha_jax.transposed import alike, linear

PLATFORM = "cuda"
"""Where the kernel is; a program for another platform takes the written formula."""

HIDDEN = -(2.0**41)
"""What is added to a logit that is masked, as JAX itself does: cuDNN has no -inf."""


class Accelerator(NamedTuple):
    """What the choice of the kernel depends on beside the call.

    Args:
        platform: "cuda", "rocm", "cpu", ..
        capability: The compute capability of CUDA's devices.
        is_shared: Whether arrays may be shared out among several devices, which JAX decides later.
    """

    platform: str = "cpu"
    capability: tuple[int, ...] = ()
    is_shared: bool = False


def accelerator() -> Accelerator:
    """Where JAX computes by default."""
    if jax.default_backend() != "gpu":
        return Accelerator(jax.default_backend())
    first: Any = jax.local_devices()[0]
    platform = "cuda" if "cuda" in first.client.platform_version else "rocm"
    number = str(getattr(first, "compute_capability", "0"))
    capability = tuple(int(part) for part in number.split(".") if part.isdecimal())
    return Accelerator(platform, capability, jax.device_count() > 1 and not _is_manual())


def _is_manual() -> bool:
    """Whether this is inside of `jax.shard_map` over all axes, where arrays are on one device."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return bool(kinds) and all(kind == jax.sharding.AxisType.Manual for kind in kinds)


def why_not_fused(
    spec: AttentionSpec, shape: AttentionShape, /, on: Accelerator | None = None
) -> str | None:
    """Why the kernel cannot do a call on an accelerator, by default this one; None where it can."""
    on = accelerator() if on is None else on
    if on.platform != PLATFORM:
        return "jax has no kernel here with the written meaning"
    if shape.dtype not in HALF:
        return f"cuDNN's kernel takes half precision, not {jnp.dtype(shape.dtype).name}"
    if on.capability < (8, 0):
        return "cuDNN's kernel needs a GPU of compute capability 8.0 or later"
    if on.is_shared:
        return "JAX may share out axes among its devices that cuDNN's kernel wants in one piece"
    if spec.dropout is not None:
        return "cuDNN's kernel has no dropout of that kind"
    widest = 256 if on.capability >= (9, 0) else 128
    if shape.key_dim != shape.value_dim or shape.key_dim % 8 or shape.key_dim > widest:
        return f"cuDNN's kernel wants one width of heads, a multiple of 8 up to {widest}"
    lengths = (shape.batch, shape.queries, shape.keys)
    if not all(isinstance(n, int) for n in lengths):
        return "the lengths are not known before the program runs"
    if 1 in lengths[1:]:
        return "cuDNN's kernel wants two queries and two keys at least"
    if shape.wide_bias:
        return "cuDNN's kernel would round the bias to half precision"
    if shape.dtype == jnp.float16 and _is_masked(spec, shape):
        return "a mask in float16 would not hide keys whose logits are great"
    return None


def makes_window(spec: AttentionSpec, shape: AttentionShape, /) -> bool:
    """Whether the kernel makes the window of a call: a causal one, and nothing else is masked."""
    return not _is_masked(spec, shape)


def _is_masked(spec: AttentionSpec, shape: AttentionShape) -> bool:
    """Whether the kernel gets a mask or a bias as an array."""
    positions = spec.position_mask
    if shape.has_mask or shape.has_bias:
        return True
    if positions.is_open:
        return False
    plain = positions.right == 0 and isinstance(positions.offset, int) and positions.offset == 0
    return not plain or shape.queries != shape.keys


class Call(NamedTuple):
    """What is static of a call of the kernel.

    Args:
        ops: The backend, for the written formula.
        scale: Factor of the logits.
        positions: What a query sees by its position: all, or what is causal, with a window or not.
    """

    ops: Ops
    scale: float
    positions: PositionMask


def fused_attention(
    ops: Ops, spec: AttentionSpec, arrays: Mapping[str, Any], /, *, causal: bool
) -> Any:
    """The context (B, H, T, d_v) by the kernel."""
    query, key, value = (jnp.swapaxes(arrays[n], 1, 2) for n in ("query", "key", "value"))
    positions = PositionMask(spec.position_mask.left, 0) if causal else PositionMask()
    mask, bias = arrays.get("mask"), arrays.get("bias")
    queries, keys = query.shape[1], key.shape[1]
    if causal and queries != keys:
        mask = positions.mask(ops, TileOrigin(), queries, keys, like=query)
        positions = PositionMask()
    call, inputs, seen = Call(ops, spec.scale, positions), [query, key, value], None
    if bias is not None:
        hidden = bias == -jnp.inf
        mask = ~hidden if mask is None else mask & ~hidden
        bias = jnp.where(hidden, 0.0, bias)
    if mask is not None:
        # A key that nobody sees is no number whose product could outweigh what hides it.
        some_see = jnp.swapaxes(mask.any((1, 2), keepdims=True), 1, 3)  # [B, S, 1, 1]
        inputs[1] = jnp.where(some_see, key, 0.0)
        any_seen = mask.any(-1, keepdims=True)
        added = jnp.where(mask | ~any_seen, 0.0 if bias is None else bias, HIDDEN)
        added = jnp.broadcast_to(added, (*added.shape[:2], queries, keys)).astype(query.dtype)
        inputs = _even([*inputs, added])
        seen = jnp.swapaxes(any_seen, 1, 2)  # [B, T, H, 1]
    context = _compiled(call, *alike(inputs))[:, :queries]
    if seen is not None:
        context = jnp.where(seen, context, 0.0)
    return jnp.swapaxes(context, 1, 2)


def _even(arrays: Sequence[Any]) -> list[Any]:
    """The arrays with one more query and one more key, hidden, where lengths are odd.

    The kernel has no gradients of odd lengths where something is added to the logits.
    """
    query, key, value, added = arrays
    queries, keys = (0, query.shape[1] % 2), (0, key.shape[1] % 2)
    none = (0, 0)
    return [
        *(jnp.pad(x, (none, more, none, none))
          for x, more in ((query, queries), (key, keys), (value, keys))),
        jnp.pad(added, (none, none, queries, keys), constant_values=HIDDEN),
    ]  # fmt: skip


def kernel(call: Call, query: Any, key: Any, value: Any, bias: Any = None) -> Any:
    """CuDNN's kernel, by JAX's function for it, of (B, length, heads, width)."""
    positions = call.positions
    window = None if positions.left is None else (positions.left, 0)
    return jax.nn.dot_product_attention(
        query, key, value, bias, scale=call.scale, is_causal=positions.right == 0,
        local_window_size=window, implementation="cudnn",
    )  # fmt: skip


def _written(call: Call, query: Any, key: Any, value: Any, bias: Any = None) -> Any:
    """The same by the written formula."""
    spec = AttentionSpec(call.scale, (), call.positions)
    arrays = {"query": query, "key": key, "value": value}
    arrays = {name: jnp.swapaxes(x, 1, 2) for name, x in arrays.items()}
    if bias is not None:
        arrays["bias"] = bias.astype(jnp.float32)
    context = formula(call.ops, spec, arrays, TileOrigin(), None, False)["context"]
    return jnp.swapaxes(context, 1, 2).astype(query.dtype)


# --- Derivatives ---------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(call: Call, *inputs: Any) -> Any:
    return _forward(call, False, *inputs)[0]


@partial(_attention.defjvp, symbolic_zeros=True)
def _(call: Call, primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    context, *kept = _kept(call, *primals)
    moving = tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero))
    if not moving:
        return context, jnp.zeros_like(context)
    count = len(primals)
    push, pull = partial(_push, call, count, moving), partial(_pull, call, count, moving)
    return context, linear(push, pull, [*primals, *kept], [tangents[i] for i in moving])


# Outside of a compiler each call would be a new program.
_compiled: Any = jax.jit(_attention, static_argnums=0, inline=True)


def _push(call: Call, count: int, moving: Sequence[int], *args: Any) -> Any:
    """The written formula's derivative along `moving`."""
    primals, changes = args[:count], args[len(args) - len(moving) :]
    every = [jnp.zeros_like(x) for x in primals]
    for i, change in zip(moving, changes, strict=True):
        every[i] = change
    return jax.jvp(partial(_written, call), primals, tuple(every))[1]


def _pull(call: Call, count: int, moving: Sequence[int], *args: Any) -> Sequence[Any]:
    """The kernel's gradients by `moving`."""
    every = _backward(call, count, *args)
    return [every[i] for i in moving]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _kept(call: Call, *inputs: Any) -> Sequence[Any]:
    """The context, and what the kernel keeps for its gradients."""
    return _forward(call, True, *inputs)


@_kept.defjvp
def _(call: Call, primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    results = _kept(call, *primals)
    tangent = jax.jvp(partial(_attention, call), tuple(primals), tuple(tangents))[1]
    return results, [tangent, *map(_constant, results[1:])]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _backward(call: Call, count: int, *args: Any) -> Sequence[Any]:
    """The gradients by the inputs, from these, from what is kept, and from the cotangent."""
    return _pulled(call, count, *args)


@_backward.defjvp
def _(call: Call, count: int, primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    def written(*args: Any) -> Sequence[Any]:
        return _pulled_by(_written, call, args[:-1], args[-1])

    own, changes = ((*each[:count], each[-1]) for each in (primals, tangents))
    return _backward(call, count, *primals), jax.jvp(written, own, changes)[1]


def _constant(x: Any) -> Any:
    """The tangent of a constant."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros_like(x) if floating else np.zeros(x.shape, jax.dtypes.float0)


def _pulled_by(
    function: Callable[..., Any], call: Call, inputs: Sequence[Any], cotangent: Any
) -> Sequence[Any]:
    return list(jax.vjp(partial(function, call), *inputs)[1](cotangent))


# --- On the device -------------------------------------------------------------------------------
# JAX's own rules for batches of cuDNN's calls want all arrays batched on the first axis. Here the
# axis of `vmap` becomes a part of the kernel's batch.


def _forward(call: Call, keeping: bool, *inputs: Any) -> Sequence[Any]:
    """The context; if `keeping`, also the arrays of the kernel's pullback."""
    shapes = jax.tree.leaves(_pullback_shape(call, inputs)) if keeping else []

    @custom_vmap
    def run(*inputs: Any) -> Sequence[Any]:
        if not keeping:
            return [_on_device(partial(kernel, call), partial(_written, call), *inputs)]

        def by_kernel(*inputs: Any) -> Sequence[Any]:
            context, pullback = jax.vjp(partial(kernel, call), *inputs)
            return alike([context, *jax.tree.leaves(pullback)])

        def by_formula(*inputs: Any) -> Sequence[Any]:
            zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]
            return alike([_written(call, *inputs), *zeros])

        return _on_device(by_kernel, by_formula, *inputs)

    @run.def_vmap
    def _(size: int, batched: Sequence[bool], *inputs: Any) -> Any:
        context, *kept = _forward(call, keeping, *_folded(size, inputs, batched))
        kept = [_unfolded(size, x, s.shape) for x, s in zip(kept, shapes, strict=True)]
        own = [x.ndim > len(s.shape) for x, s in zip(kept, shapes, strict=True)]
        return [context.reshape(size, -1, *context.shape[1:]), *kept], [True, *own]

    return run(*inputs)


def _pulled(call: Call, count: int, *args: Any) -> Sequence[Any]:
    """The gradients of the kernel."""
    shapes = [x.shape for x in args[:count]]

    @custom_vmap
    def run(*args: Any) -> Sequence[Any]:
        inputs, kept, cotangent = args[:count], args[count:-1], args[-1]

        def by_kernel(*args: Any) -> Sequence[Any]:
            structure = jax.tree.structure(_pullback_shape(call, inputs))
            return list(jax.tree.unflatten(structure, args[:-1])(args[-1]))

        def by_formula(*args: Any) -> Sequence[Any]:
            return _pulled_by(_written, call, inputs, args[-1])

        return _on_device(by_kernel, by_formula, *kept, cotangent)

    @run.def_vmap
    def _(size: int, batched: Sequence[bool], *args: Any) -> Any:
        inputs = _folded(size, args[:count], batched[:count])
        kept = [
            _fitted(size, x, own, s.shape)
            for x, own, s in zip(
                args[count:-1],
                batched[count:-1],
                jax.tree.leaves(_pullback_shape(call, inputs)),
                strict=True,
            )
        ]
        context = (*inputs[0].shape[:-1], inputs[2].shape[-1])
        cotangent = _fitted(size, args[-1], batched[-1], context)
        results = _pulled(call, count, *inputs, *kept, cotangent)
        results = [x.reshape(size, -1, *x.shape[1:]) for x in results]
        # A bias that all members of the batch share was widened.
        return [
            x.sum(1, keepdims=True) if shape[0] != x.shape[1] else x
            for x, shape in zip(results, shapes, strict=True)
        ], [True] * count

    return run(*args)


def _folded(size: int, inputs: Sequence[Any], batched: Sequence[bool]) -> list[Any]:
    """Arrays (size, B, ..) as (size * B, ..), after those that lack the first axis get it."""
    members = inputs[0].shape[1 if batched[0] else 0]
    return [
        _fitted(size, x, own, (size * members, *x.shape[2 if own else 1 :]))
        for x, own in zip(inputs, batched, strict=True)
    ]


def _fitted(size: int, x: Any, batched: bool, shape: Sequence[int]) -> Any:
    """An array (B, ..), or (size, B, ..) if it is batched, in a shape (size * B, ..)."""
    if not batched:
        if x.shape == shape:  # it has no batch axis
            return x
        x = jnp.broadcast_to(x, (size, *x.shape))
    return jnp.broadcast_to(x, (size, shape[0] // size, *shape[1:])).reshape(shape)


def _unfolded(size: int, x: Any, shape: Sequence[int]) -> Any:
    """An array (size * B, ..) as (size, B, ..), `shape` being (B, ..) or (1, ..); else itself."""
    if x.shape == shape:
        return x
    return x.reshape(size, -1, *x.shape[1:])[:, : shape[0]]


def _pullback_shape(call: Call, inputs: Sequence[Any]) -> Any:
    """The kernel's pullback, with shapes in the place of arrays."""
    return jax.eval_shape(lambda *inputs: jax.vjp(partial(kernel, call), *inputs)[1], *inputs)


def _on_device(by_kernel: Callable[..., Any], by_formula: Callable[..., Any], *args: Any) -> Any:
    return jax.lax.platform_dependent(*args, default=by_formula, **{PLATFORM: by_kernel})
