"""The layer for PyTorch: a `torch.nn.Module` whose projections are `torch.nn.Linear`s."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack, cast

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np
import torch
from torch import nn
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,  # pyright: ignore
    _len_torch_dispatch_stack,  # pyright: ignore
    _len_torch_function_stack,  # pyright: ignore
)
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils import _pytree as pytree  # `torch.export` has no other way for optional arrays

from anymha.errors import WeightsError
from anymha.framework.dtypes import DtypeLike
from anymha.layer.arguments import ARRAYS
from anymha.layer.cache import Cache, Memory, flatten, flatten_linked, unflatten_linked
from anymha.layer.checks import check_call, unpack_inputs
from anymha.layer.forward import Projections, multi_head_attention
from anymha.layer.native import (
    Call,
    CallOptions,
    NativeLayer,
    first_weights,
    held_together,
    shown_as,
    takes_call,
    takes_options,
    typed_as,
    widths_of,
)
from anymha.layer.plan import Plans
from anymha.options.config import AttentionConfig, shown_options
from anymha.options.option import Option
from anymha_torch import ops
from anymha_torch.fused import HALF, mixed_dtype, multiplies
from anymha_torch.projection import (
    NAMES,
    LazyWeight,
    Weights,
    check_biases,
    check_writable,
    dtype_of,
    effective,
    empty_linear,
    linear_shape,
    projections_of,
    to_canonical,
    write,
)

PARTS = {"kernel": "weight", "scale": "weight"}
"""The names of modules' parameters by the canonical ones, where they differ, as torch has them."""


@dataclass(frozen=True, kw_only=True)
class TorchOptions(AttentionConfig):
    """What the constructor takes.

    Args:
        dtype: Dtype of the weights; default torch's default dtype, float32 unless that is set.
        device: Where the weights are made; default torch's default device.
    """

    dtype: Option[DtypeLike | None, str] = cast(Any, None)
    device: torch.device | str | int | None = None


class MultiHeadAttention(NativeLayer, LazyModuleMixin, nn.Module):
    """Multi-head attention as a `torch.nn.Module`, batch first.

    The constructor takes the options of `anymha.AttentionConfig` and torch's `device`; the call
    the arguments of `anymha.multi_head_attention`, where ``training=None`` means
    ``module.training``. The projections `query`, `key`, `value` and `output` are
    `torch.nn.Linear`s: hooks, pruning, parametrisations, adapters, quantisation and whatever
    stands in their place act as on any layer. Without `query_features` their weights get shape and
    values at the first call, compiled or not, or by `load_state_dict`; until then they are
    uninitialised parameters as those of `torch.nn.LazyLinear`, which an optimiser takes.

    Differs from:
        `torch.nn.MultiheadAttention`: the call is ``(query, value, key)``; a boolean mask is True
        where a query may attend; scores come per head and before dropout.

    Example:
        >>> import torch
        >>> from anymha_torch import MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, query_features=8, seed=0)
        >>> tuple(layer(torch.ones(1, 3, 8)).shape)
        (1, 3, 8)
        >>> {name: tuple(tensor.shape) for name, tensor in layer.query.state_dict().items()}
        {'weight': (8, 8), 'bias': (8,)}
    """

    ops = ops
    config: AttentionConfig
    _like: torch.Tensor

    @takes_options(TorchOptions, default_dtype=torch.get_default_dtype)
    def __init__(self, config: AttentionConfig, *, device: Any = None) -> None:
        nn.Module.__init__(self)  # not the mixin's, whose hooks ours does without
        # `torch.fx` takes modules of this name for leaves, and does not look into their calls.
        self.__module__ = "torch.nn"
        self.config = config
        self.plans = Plans()
        self._inference_plans = Plans()  # what is made in inference mode is of no use outside
        self._mixed = {dtype: self._mixed_in(dtype) for dtype in HALF}
        dtype, compute = config.dtype, config.compute_dtype or config.dtype
        rounds = compute != dtype or compute in ("float16", "bfloat16")
        self._rounding_dtype = ops.dtype(compute) if rounds else None
        for name in config.projections:
            self.add_module(name, empty_linear(self._rounding_dtype))
        for name, parts in held_together(config.feature_weights).items():
            if parts:
                self.add_module(name, Weights([PARTS.get(part, part) for part in parts]))
            else:
                self.register_parameter(name, None)
        # What `.to()` or `.double()` says before the weights exist holds for them once they do.
        like = torch.empty(0, dtype=ops.dtype(config.dtype), device=device)
        self.register_buffer("_like", like, persistent=False)
        if config.query_features is not None:
            self._build()
            return
        # An optimiser that is given these trains them, as those of `torch.nn.LazyLinear`.
        self._initialize_hook = True  # torch's compiler calls `_infer_parameters` where this is
        for full in config.weight_shapes(1):
            kind: Any = LazyWeight
            module, part = self._place(full)
            setattr(module, part, kind(device=like.device, dtype=like.dtype))

    def _place(self, full: str) -> tuple[Any, str]:
        """The module that holds a weight, and the parameter's name there."""
        name, _, part = full.partition(".")
        return (self._modules[name], PARTS.get(part, part)) if part else (self, name)

    def _mixed_in(
        self, dtype: torch.dtype
    ) -> tuple[AttentionConfig, AttentionConfig, tuple[Plans, Plans]]:
        """The options, those under `torch.autocast` in a dtype, and the plans of such calls.

        These are as `plans` and `_inference_plans` are for other calls.
        """
        return self.config, self.config.computing_in(NAMES[dtype]), (Plans(), Plans())

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return "_like" not in self._buffers

    def _build(self, widths: Sequence[int] = (), device: Any = None) -> Projections:
        meta = (self._like if device is None else torch.empty(0, device=device)).is_meta
        with torch.inference_mode(False):  # weights of that mode could not be trained later
            values = {} if meta else first_weights(self.config, widths, ops.draw_seed, ops)
            self._allocate(self.config.weight_shapes(*widths), device)
            self._assigned(values)
        return self._with_features(
            projections_of(self._modules, self.config, self._rounding_dtype, None)
        )

    def _with_features(self, projections: Projections) -> Projections:
        """Projections with the weights of the features."""
        own = {full: getattr(*self._place(full)) for full in self.config.feature_weights}
        return projections._replace(weights=own)

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]], device: Any = None) -> None:
        like = self._like
        del self._like
        self.__dict__.pop("_initialize_hook", None)
        for full, shape in shapes.items():
            module, own = self._place(full)
            sizes = linear_shape(self.config, full, shape)
            place = torch.device(like.device if device is None else device)
            lazy = module._parameters[own]
            # A meta tensor cannot become any other.
            if isinstance(lazy, LazyWeight) and lazy.is_meta == (place.type == "meta"):
                lazy.materialize(sizes, place, like.dtype)
            else:
                tensor = like.new_empty(sizes, device=place)
                setattr(module, own, nn.Parameter(tensor))
            if full.endswith(".kernel"):
                module.out_features, module.in_features = sizes

    def reset_parameters(self) -> None:
        """Give the weights initial values, as at the start; after `to_empty`, for example."""
        mine = self.canonical_weights()
        if mine:
            self._assigned(first_weights(self.config, widths_of(mine), ops.draw_seed, ops))

    def _replicate_for_data_parallel(self) -> Any:
        module: Any = nn.Module if self.built else LazyModuleMixin  # which says that it cannot
        return module._replicate_for_data_parallel(self)

    def _infer_parameters(self, module: Any, args: Any, kwargs: Any = None) -> None:
        """Make the weights for a call, before it is compiled."""
        call: dict[str, Any] = dict(zip(("query", "value", "key"), args, strict=False))
        call |= kwargs or {}
        query, *others = unpack_inputs(*map(call.get, ("query", "value", "key")))
        masks = {a.name: call[a.name] for a in ARRAYS if call.get(a.name) is not None}
        inputs = (query, *others)
        check_call(ops, self.config, (None, None, None), inputs, masks)
        self._build([x.shape[-1] for x in inputs], query.device)

    @shown_as(NativeLayer.make_cache)
    def make_cache(self, *args: Any, **sizes: Any) -> Cache:
        if is_compiling():  # which cannot leave inference mode
            return super().make_cache(*args, **sizes)
        with torch.inference_mode(False):  # arrays of that mode could not be written later
            return super().make_cache(*args, **sizes)

    @typed_as[Call[torch.Tensor]]()
    @takes_call
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: torch.Tensor | Sequence[torch.Tensor],
        value: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        **call: Unpack[CallOptions[torch.Tensor]],
    ) -> Any:
        given: Any = call
        if self.config.dropout and given.get("training") is None:
            given["training"] = self.training
        # Nothing is kept of a call that a compiler or a transformation runs.
        tracing = (
            is_compiling()
            or peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or _get_tracing_state() is not None
            or _len_torch_dispatch_stack() > 0
        )
        plans = None
        inference = not tracing and torch.is_inference_mode_enabled()
        if not tracing:
            plans = self._inference_plans if inference else self.plans
        prepared, autocast = plans, _is_any_autocast_enabled()
        config, rounding_dtype = self.config, self._rounding_dtype
        if tracing or autocast:
            # Under autocast a projection may give another dtype than the layer computes in, which
            # the kept ones do not cast.
            prepared = None
            first: Any = query[0] if isinstance(query, (list, tuple)) else query
            dtype = mixed_dtype(first) if torch.is_tensor(first) else None
            if dtype is not None and dtype_of(self._modules["query"]) is not torch.float64:
                if self._mixed[dtype][0] is not config:
                    self._mixed[dtype] = self._mixed_in(dtype)
                _, config, kept = self._mixed[dtype]
                plans = None if tracing else kept[inference]
                if config.compute_dtype == NAMES[dtype]:
                    rounding_dtype = dtype
                    prepared = plans if multiplies(dtype, first.device) else None
        if _len_torch_function_stack():  # what watches torch's functions shall see `linear`
            prepared = None
        projections: Any
        if "_like" in self._buffers:

            def build(widths: Any) -> Projections:
                first: Any = query[0] if isinstance(query, (list, tuple)) else query
                return self._build(widths, first.device)

            projections = build
        else:
            plain = (
                type(query) is torch.Tensor
                and (value is None or type(value) is torch.Tensor)
                and (key is None or type(key) is torch.Tensor)
            )
            projections = projections_of(self._modules, config, rounding_dtype, prepared, plain)
            if config.feature_weights:
                projections = self._with_features(projections)
        return multi_head_attention(
            ops, config, projections, query, value, key, plans=plans, **given
        )

    if TYPE_CHECKING:

        @shown_as(forward)
        def __call__(self) -> Any: ...  # pyright: ignore[reportIncompatibleMethodOverride]

    def _weights_for_memory(self) -> Projections:
        projections = projections_of(self._modules, self.config, self._rounding_dtype, None)
        return self._with_features(projections) if self.config.feature_weights else projections

    def canonical_weights(self) -> dict[str, torch.Tensor]:
        """The weights by canonical name, as views of those of the linear layers.

        Raises:
            WeightsError: something else than a linear layer stands in the place of a projection.
        """
        if not self.built:
            return {}
        modules: Any = self._modules
        arrays = {}
        check_biases(modules, self.config)
        for full, shape in self.config.weight_shapes(*self._widths()).items():
            name, _, part = full.partition(".")
            module, own = self._place(full)
            linear = name in self.config.projections
            weight = effective(name, module, own) if linear else getattr(module, own)
            if weight is not None:
                arrays[full] = to_canonical(weight, part, shape)
        return arrays

    def _widths(self) -> list[Any]:
        """The widths of query, value and key; None of what is no linear layer."""
        modules: Any = self._modules
        return [getattr(modules[n], "in_features", None) for n in ("query", "value", "key")]

    def _places(self) -> dict[str, Any]:
        if not self.built:
            return {}
        found = {}
        for full in self.config.weight_shapes(*self._widths()):
            module, own = self._place(full)
            parameter = module._parameters.get(own)
            if parameter is not None:
                found[full] = id(parameter)
        return found

    @torch.no_grad()
    def _assigned(self, values: Mapping[str, Any]) -> MultiHeadAttention:
        modules: Any = self._modules
        if not self.built:
            self._allocate({name: tuple(value.shape) for name, value in values.items()})
        tensors = []
        check_biases(modules, self.config)
        for full, value in values.items():
            name = full.partition(".")[0]
            module, own = self._place(full)
            if name in self.config.projections:
                effective(name, module, own)  # refuses what is no linear layer any more
            check_writable(name, module, own)
            tensors.append((full, value))
        if any(tensor.is_meta for tensor in self.parameters()) and values:
            self.to_empty(device=torch.get_default_device())
        values_by_part = []
        for full, value in tensors:
            name, _, part = full.partition(".")
            module, own = self._place(full)
            if isinstance(value, np.ndarray):
                # NumPy rounds: torch goes from float64 to half precision by way of float32.
                dtype = dtype_of(module) or ops.dtype(self.config.dtype)
                value = ops.from_numpy(value.astype(NAMES[dtype]))
            shape = linear_shape(self.config, full, value.shape)
            value = value.reshape(shape[::-1]).t() if part == "kernel" else value.reshape(shape)
            value = value.contiguous()  # a parametrisation may keep it as it lies
            values_by_part.append((name, module, own, value))
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        try:
            for name, module, own, value in values_by_part:
                write(name, module, own, value)
        except WeightsError:
            self.load_state_dict(before)
            raise
        return self

    def state_dict(self, *args: Any, **options: Any) -> Any:  # pyright: ignore
        """The weights as in every module; none where they do not exist yet."""
        if self.built:
            return super().state_dict(*args, **options)
        destination = options.get("destination", args[0] if args else None)
        return OrderedDict() if destination is None else destination

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Any, prefix: str, *args: Any
    ) -> None:
        if not self.built:
            try:
                self._allocate_for(state_dict, prefix)
            except WeightsError as error:
                errors: list[str] = args[-1]
                errors.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _allocate_for(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Make the weights that a state dict has, if it has any of this layer's.

        Raises:
            WeightsError: they are not those that the config wants.
        """
        config = self.config
        known = [f"{name}.{part}" for name in config.projections for part in ("kernel", "bias")]
        tensors = {
            full: state_dict[prefix + shown]
            for full in (*known, *config.feature_weights)
            if prefix + (shown := _in_state_dict(full)) in state_dict
        }
        if not tensors:
            return
        missing = [f"{n}.weight" for n in config.projections if f"{n}.kernel" not in tensors]
        if missing:
            received = ", ".join(map(_in_state_dict, tensors))
            raise WeightsError(f"Weights lack {', '.join(missing)}. Received: {received}.")
        widths = [tensors[f"{n}.kernel"].shape[-1] for n in ("query", "value", "key")]
        shapes = config.weight_shapes(*widths)
        for full, shape in shapes.items():
            wanted = linear_shape(config, full, shape)
            received = tuple(tensors[full].shape) if full in tensors else None
            if received != wanted:
                raise WeightsError(
                    f"`{_in_state_dict(full)}` must have shape {wanted}. Received: {received}."
                )
        self._allocate(shapes)

    def extra_repr(self) -> str:
        """The options in `print(layer)`."""
        return shown_options(self.config)


def _flatten(value: Cache | Memory) -> Any:
    return flatten(value) if is_compiling() else flatten_linked(value)


def _flatten_with_keys(value: Cache | Memory) -> Any:
    leaves, static = _flatten(value)
    keys = map(pytree.GetAttrKey, static[0])
    return list(zip(keys, leaves, strict=True)), static


for _kind in (Cache, Memory):
    pytree.register_pytree_node(
        _kind,
        _flatten,
        lambda leaves, static, kind=_kind: unflatten_linked(kind, static, leaves),
        serialized_type_name=f"anymha.{_kind.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=lambda static: tuple(map(tuple, static)),
        flatten_with_keys_fn=_flatten_with_keys,
    )
torch.serialization.add_safe_globals([Cache, Memory])  # for `torch.load` of what it has saved


def _in_state_dict(full: str) -> str:
    """The name of a weight in a state dict, by its canonical name."""
    first, dot, part = full.partition(".")
    return f"{first}{dot}{PARTS.get(part, part)}"
