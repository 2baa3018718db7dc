"""A projection as a `torch.nn.Linear`: how it is made, computed, read and written.

The canonical kernel (D, H, d) is the transposed weight (H * d, D) with its last axis split; that of
the output (H, d_v, *O) is the transposed weight (prod(O), H * d_v).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import addmm, is_grad_enabled, mm, nn
from torch._C import _get_tracing_state
from torch.nn.functional import linear
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from anymha.errors import ShapeError, WeightsError
from anymha.layer.forward import Projections
from anymha.layer.plan import Plans, WeightsKind
from anymha.options.config import AttentionConfig
from anymha_torch import products
from anymha_torch.fused import HALF, multiplies

NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}

GLOBAL_HOOKS = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)


_FORWARD = nn.Linear.forward


class WorkingLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever that of its weights.

    Attributes:
        rounding_dtype: The dtype to which weights are rounded first; None for their own. (By the
            name `compute_dtype`, peft would take it for the dtype of its adapters.)
    """

    rounding_dtype: torch.dtype | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input . weight^T + bias`` in the dtype of the input."""
        return in_dtype_of_input(input, self.weight, self.bias, self.rounding_dtype)


def in_dtype_of_input(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rounding_dtype: torch.dtype | None,
) -> torch.Tensor:
    """``x . weight^T + bias`` in the dtype of `x`, weights rounded to `rounding_dtype` first."""
    rounded = rounding_dtype or weight.dtype
    weight = weight.to(rounded).to(x.dtype)
    bias = None if bias is None else bias.to(rounded).to(x.dtype)
    return products.linear(x, weight, bias)


class Weights(nn.Module):
    """Holds the weights of a feature of the attention; the layer computes with them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, None)


class LazyWeight(nn.UninitializedParameter):
    """A weight without a shape; what `.to` and its kin do to a module does not need one."""

    _allowed_methods = (
        *nn.UninitializedParameter._allowed_methods,  # pyright: ignore
        torch.Tensor.bfloat16,
        torch.Tensor.requires_grad_,
        torch.empty_like,
    )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.requires_grad, self.data.device, self.data.dtype)


def empty_linear(rounding_dtype: torch.dtype | None) -> nn.Linear:
    """A linear layer that has no weights yet."""
    cls = nn.Linear if rounding_dtype is None else WorkingLinear
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.in_features = module.out_features = 0
    module.register_parameter("weight", None)
    module.register_parameter("bias", None)
    if isinstance(module, WorkingLinear):
        module.rounding_dtype = rounding_dtype
    return module


def is_plain(module: Any) -> bool:
    """Whether calling a projection is no more than one product with its two parameters."""
    kind = type(module)
    return (
        ((kind is nn.Linear and kind.forward is _FORWARD) or kind is WorkingLinear)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and "weight" in module._parameters
        and "bias" in module._parameters
    )


_HELD = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_parameters"
)
_PARAMETERS = itemgetter("weight", "bias")


class Part(NamedTuple):
    """A plain projection, and what shows in a later call that it still is one.

    It does not hold the weight: what is moved or replaced does not stay in memory.

    Args:
        name: The projection's name.
        module: Its linear layer.
        kind: The class of that.
        bias: Its bias.
        address: Where the values of the weight lie, in order.
        size: The number of elements of the weight.
        dtype: Its dtype.
    """

    name: str
    module: nn.Linear
    kind: type
    bias: nn.Parameter | None
    address: int
    size: int
    dtype: torch.dtype


class Prepared(NamedTuple):
    """Projections that are all plain.

    Args:
        config: The options of the layer.
        parts: The projections.
        projections: What computes them; None after the first call, which may be the only one.
        key: What the key is computed by where gradients are recorded; None where by the same.
        small: What computes them where no gradients are recorded; None where by the same.
    """

    config: AttentionConfig
    parts: list[Part]
    projections: Projections | None = None
    key: Callable[[], Callable[[torch.Tensor], torch.Tensor]] | None = None
    small: Projections | None = None

    def hold(self, modules: Mapping[str, Any], config: AttentionConfig) -> bool:
        """Whether the layer's options and projections are the same, and these still plain."""
        for name, module, kind, bias, address, size, dtype in self.parts:
            if modules[name] is not module or type(module) is not kind:
                return False
            own = module.__dict__  # a module's attributes are slow to find
            forward, before, backward, before_backward, parameters = _HELD(own)
            if forward or before or backward or before_backward or "forward" in own:
                return False
            try:
                weight, own_bias = _PARAMETERS(parameters)
            except KeyError:  # pruned, or parametrised
                return False
            if type(weight) is not nn.Parameter or own_bias is not bias:
                return False
            if (  # `.half()`, say, gives a parameter other values
                weight.data_ptr() != address
                or weight.dtype is not dtype
                or weight.numel() != size
                or not weight.is_contiguous()
            ):
                return False
        return config is self.config and nn.Linear.forward is _FORWARD and not any(GLOBAL_HOOKS)

    def now(self, plain: bool) -> Projections:
        """The kept projections, the key's with what only this call can have.

        Args:
            plain: Whether the inputs are of torch's own class.
        """
        found: Any = self.projections
        if not is_grad_enabled():
            return self.small if plain and self.small is not None else found
        if self.key is None:
            return found
        return found._replace(functions={**found.functions, "key": self.key()})


def _part(name: str, module: Any) -> Part | None:
    """A plain projection as it is now; None where it is not to be kept."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if type(weight) is not nn.Parameter or (bias is not None and type(bias) is not nn.Parameter):
        return None
    if not weight.is_contiguous():
        return None
    place = (weight.data_ptr(), weight.numel(), weight.dtype)
    return Part(name, module, type(module), bias, *place)


def projections_of(
    modules: Mapping[str, Any],
    config: AttentionConfig,
    rounding_dtype: torch.dtype | None,
    plans: Plans | None,
    plain: bool = False,
) -> Projections:
    """What computes the projections of a call.

    A plain linear layer is computed from its parameters; any other is called, so that hooks,
    parametrisations, adapters, and whatever stands in its place, act.

    Args:
        modules: The projections by name.
        config: The layer's options.
        rounding_dtype: The dtype to which weights are rounded first; None for their own.
        plans: Where they are kept; None for nowhere.
        plain: Whether the inputs are of torch's own class.

    Raises:
        ShapeError: the output's projection takes another width than the heads have.
    """
    kept = None if plans is None else plans.prepared
    repeated = False
    if kept is not None and kept.hold(modules, config):
        if kept.projections is not None:
            return kept.now(plain)
        repeated = True
    hooked = any(GLOBAL_HOOKS)
    dtype = dtype_of(modules["query"]) or getattr(torch, config.dtype)
    working = torch.float64 if (rounding_dtype or dtype) is torch.float64 else torch.float32
    if rounding_dtype is None and dtype is not working:
        rounding_dtype = dtype
    carried = working  # the dtype of what goes from stage to stage, as in a plan
    if rounding_dtype in HALF and multiplies(rounding_dtype, modules["query"].weight.device):
        carried = rounding_dtype
    functions, widths, key_bias, parts, key_once = {}, [], None, [], None
    all_plain = True
    for name in config.projections:
        module = modules[name]
        widths.append(getattr(module, "in_features", None))
        if hooked or not is_plain(module):
            all_plain = False
            functions[name] = (
                module
                if isinstance(module, WorkingLinear)
                else partial(_called, module, dtype_of(module) or working)
            )
            continue
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if plans is not None:
            parts.append(_part(name, module))
        free = name == "key" and bias is not None and any(config.free_columns)
        if bias is not None and free and config.activity_regularizer is not None:
            key_bias = bias.reshape(config.key_value_heads, config.key_dim)
        exact = weight.dtype is carried and rounding_dtype in (None, carried)
        small = module.in_features * module.out_features <= SMALL
        product = linear if small else products.linear
        how = (product, module._parameters, None if exact else rounding_dtype or weight.dtype)
        never = None
        if bias is not None and free:
            never = torch.zeros_like(bias, dtype=torch.bool) if repeated else None
            if not all(config.free_columns):
                held = [not column for column in config.free_columns] * config.key_value_heads
                never = torch.tensor(held, device=bias.device)
            key_once = partial(_once, *how, free=True, never=never)
        functions[name] = _repeated(*how) if repeated else _once(*how, free=free, never=never)
    query, key, value, context, *_ = widths
    value_dim: Any = config.value_dim
    if context not in (None, config.num_heads * value_dim):
        raise ShapeError(
            f"The projection `output` must take {config.num_heads * value_dim} features, the "
            f"width of all heads. Received: one that takes {context}. Put a projection there that "
            "takes them, or make the layer anew."
        )
    kind = WeightsKind(NAMES[dtype], (query, value, key))
    projections = Projections(functions, kind, key_bias, plain=all_plain)
    if plans is None:
        return projections
    if len(parts) < len(config.projections) or None in parts or key_bias is not None:
        plans.prepared = None
        return projections
    if not repeated:
        plans.prepared = Prepared(config, parts, key=key_once)
        return projections
    projections = projections._replace(of_rows=True)
    small = _of_small(modules, carried, projections) if rounding_dtype in (None, carried) else None
    plans.prepared = Prepared(config, parts, projections, key_once, small)
    return plans.prepared.now(plain)


def _once(
    product: Callable[..., torch.Tensor],
    parameters: Mapping[str, Any],
    rounding_dtype: torch.dtype | None,
    *,
    free: bool,
    never: torch.Tensor | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What computes a plain projection in this call.

    Args:
        product: Computes it where nothing is rounded.
        parameters: Its weight and its bias, by "weight" and "bias".
        rounding_dtype: The dtype to which they are rounded before they get that of the input; None
            where they have that of the input.
        free: Whether the gradient of the bias is exactly zero, where `never` is False.
        never: A boolean for each number of the bias; None for False everywhere.
    """
    weight, bias = parameters["weight"], parameters["bias"]
    # A trace is checked without gradients and shall be the same; its bias gets one of about zero.
    if free and bias.requires_grad and is_grad_enabled() and _get_tracing_state() is None:
        # `anymha.layer.numerics.without_gradient` by torch's own functions
        never = torch.zeros_like(bias, dtype=torch.bool) if never is None else never
        bias = torch.where(never, bias, bias.detach())
    if rounding_dtype is None:
        return partial(product, weight=weight, bias=bias)
    return partial(in_dtype_of_input, weight=weight, bias=bias, rounding_dtype=rounding_dtype)


def _repeated(
    product: Callable[..., torch.Tensor],
    parameters: Mapping[str, Any],
    rounding_dtype: torch.dtype | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What computes a plain projection in all calls, of rows; as `_once` in one."""
    if rounding_dtype is None:
        return lambda rows: product(rows, parameters["weight"], parameters["bias"])
    return lambda rows: in_dtype_of_input(
        rows, parameters["weight"], parameters["bias"], rounding_dtype
    )


SMALL = products.NUMBERS
"""Of weights of at most so many numbers a transposed view is kept: of larger ones the product takes
much longer than the view, and the view would keep their memory after they have moved."""


def _of_small(
    modules: Mapping[str, Any], dtype: torch.dtype, projections: Projections
) -> Projections | None:
    """The projections by transposed views of their weights.

    None where a weight is large, or is not of the dtype in which the layer computes.
    """
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for name in projections.functions:
        parameters = modules[name]._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if weight.numel() > SMALL or weight.dtype is not dtype:
            return None
        turned = weight.detach().t()
        functions[name] = (
            partial(mm, mat2=turned) if bias is None else partial(addmm, bias, mat2=turned)
        )
    return projections._replace(functions=functions)


def _called(module: Any, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return module(x if x.dtype == dtype else x.to(dtype))


def dtype_of(module: Any) -> torch.dtype | None:
    """The dtype of a projection's weights; None where it has no floating parameter."""
    parameter = module._parameters.get("weight", module.__dict__.get("weight"))  # of a replica
    if parameter is None:
        parameter = next(module.parameters(), None)
    if parameter is None or not parameter.dtype.is_floating_point:
        return None
    return parameter.dtype


def effective(name: str, module: Any, part: str) -> torch.Tensor | None:
    """The weight or the bias that a call of a projection multiplies with or adds now.

    Args:
        name: The projection's name, for error messages.
        module: The projection.
        part: "weight" or "bias".

    Raises:
        WeightsError: the projection is no linear layer any more.
    """
    forward = getattr(type(module), "forward", None)
    if forward not in (_FORWARD, WorkingLinear.forward) or "forward" in module.__dict__:
        raise WeightsError(
            f"`{name}` must compute as a torch.nn.Linear for its weights to be read or written. "
            f"Received: {type(module).__module__}.{type(module).__qualname__} with a `forward` of "
            "its own. Merge or remove what wraps it first (`merge_and_unload` of peft, "
            "`remove_hook_from_module` of accelerate), or put a torch.nn.Linear there."
        )
    made = made_parts(module).get(part)
    return getattr(module, part) if made is None else made()


def check_biases(modules: Mapping[str, Any], config: AttentionConfig) -> None:
    """Refuse a projection that adds a bias which the options do not have.

    Raises:
        WeightsError: there is one.
    """
    for name in config.projections:
        bias = getattr(modules[name], "bias", None)
        if name not in config.biased and isinstance(bias, torch.Tensor):
            raise WeightsError(
                f"`{name}.bias` must not be there: the layer's options have no bias there, and "
                f"its weights would leave it out. Received: a bias of shape {tuple(bias.shape)}. "
                f"Make the layer with `use_bias`, or set `layer.{name}.bias = None`."
            )


def made_parts(module: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """What makes the tensors of a module, by name, that parametrisations or hooks make."""
    makers: dict[str, Callable[[], torch.Tensor]] = {}
    if parametrize.is_parametrized(module):
        makers = {part: partial(getattr, module, part) for part in module.parametrizations}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            makers[hook._tensor_name] = partial(hook.apply_mask, module)
        elif isinstance(hook, WeightNorm):
            makers[hook.name] = partial(hook.compute_weight, module)
        elif isinstance(hook, SpectralNorm):
            makers[hook.name] = partial(hook.compute_weight, module, do_power_iteration=False)
    return makers


def check_writable(name: str, module: Any, part: str) -> None:
    """Refuse a tensor that is not a parameter, nor made by a parametrisation.

    Raises:
        WeightsError: a hook makes it.
    """
    if part in module._parameters or parametrize.is_parametrized(module, part):
        return
    raise WeightsError(
        f"`{name}.{part}` cannot be set: a hook makes it of other parameters at each call, as "
        "`prune`, `weight_norm` and `spectral_norm` do. Remove it first: `prune.remove`, "
        "`remove_weight_norm`, `remove_spectral_norm`."
    )


def write(name: str, module: Any, part: str, value: torch.Tensor) -> None:
    """Set a weight; through a parametrisation by its right inverse.

    Raises:
        WeightsError: the parametrisation does not give the value.
    """
    if not parametrize.is_parametrized(module, part):
        parameter: Any = module._parameters[part]
        if hasattr(parameter, "device_mesh"):  # a DTensor: each process keeps its part
            distributed = importlib.import_module("torch.distributed.tensor")
            value = distributed.distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, parameter.placements
            )
        parameter.copy_(value)
        return
    try:
        value = value.to(getattr(module, part).device)
        setattr(module, part, value)
        written = getattr(module, part)
        close = torch.allclose(written, value, rtol=1e-4, atol=1e-5 * value.abs().max().item())
        problem = "" if close else "it gives another value"
    except (NotImplementedError, RuntimeError, ValueError) as error:
        problem = str(error)
    if problem:
        raise WeightsError(
            f"`{name}.{part}` cannot be set through its parametrisation: {problem}. Remove it "
            "first with `torch.nn.utils.parametrize.remove_parametrizations`."
        )


def to_canonical(weight: torch.Tensor, part: str, shape: Sequence[int]) -> torch.Tensor:
    """A view of a weight or a bias in its canonical shape; of a DTensor the whole tensor."""
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()  # pyright: ignore
    return weight.t().reshape(shape) if part == "kernel" else weight.reshape(shape)


def linear_shape(config: AttentionConfig, full: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a weight of a canonical shape in its linear layer, or in a holder."""
    name, _, part = full.partition(".")
    if part == "bias" and name in config.projections:
        return (math.prod(shape),)
    if part != "kernel":
        return tuple(shape)
    split = 2 if name == "output" else 1
    return math.prod(shape[split:]), math.prod(shape[:split])
