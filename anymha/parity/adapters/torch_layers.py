"""`torch.nn.MultiheadAttention`, and any `torch.nn.Module`, called without a trace left in them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from anymha.framework.registry import get_backend
from anymha.interchange.layouts import get_layout
from anymha.interchange.packing import Sizes
from anymha.interchange.reading import form_of
from anymha.parity.adapters.arguments import CalledByNames, Fitted, exits_as_errors, first_that_runs
from anymha.parity.adapters.foreign import (
    LayerDescription,
    dense_mask,
    describe_layer,
    make_trace,
    refuse,
)
from anymha.parity.adapters.function import named_stages
from anymha.parity.oracle.cases import trio
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.stages.trace import Request, Trace, as_numpy, fresh


class TorchLayer:
    """torch's own layer, called as its users call it: without scores and gradients.

    One input is passed as one tensor three times, for which torch has another kernel.
    """

    name = "torch.nn.MultiheadAttention"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        torch: Any = importlib.import_module("torch")
        layer, description = self.layer, describe_layer(self.layer)
        refuse(request, "torch")
        mask = _mask(layer, description.recipe(request))
        inputs = tensors(layer, request.inputs)
        first = (lambda x: x) if layer.batch_first else (lambda x: x.transpose(0, 1))

        def results(inputs: Mapping[str, Any], **options: Any) -> Any:
            query, value, key = trio({name: first(x) for name, x in inputs.items()})
            return layer(query, key, value, attn_mask=mask, **options)

        def output(inputs: Mapping[str, Any]) -> Any:
            return first(results(inputs, need_weights=False)[0])

        def call() -> Arrays:
            with torch.no_grad():
                with _recording() as recorded:
                    result = output(inputs)
                scores = results(inputs, need_weights=True, average_attn_weights=False)[1]
            return {**_heads(recorded), "output": array(result), "scores": array(scores)}

        note = ("by default it returns the scores averaged over the heads; they are compared head "
                "by head, with `average_attn_weights=False`")  # fmt: skip
        with restored(layer, request.training):
            gradients = gradients_through(layer, output, inputs, cotangent, description)
            return make_trace(self.name, request, call, description, gradients, (note,))


def _mask(layer: Any, recipe: Recipe) -> Any:
    """Masks and bias as torch takes them: (B * H, T, S), True = may not attend; or added."""
    torch: Any = importlib.import_module("torch")
    seen = dense_mask(recipe)
    mask = None
    if seen is not None:
        mask = torch.from_numpy(~seen.reshape(-1, *seen.shape[2:])).to(layer.out_proj.weight.device)
    if recipe.bias is None:
        return mask
    batch, queries, keys = recipe.lengths
    whole = np.broadcast_to(recipe.bias, (batch, recipe.heads[0], queries, keys))
    bias = tensors(layer, {"bias": whole.reshape(-1, queries, keys)})["bias"]
    return bias if mask is None else bias.masked_fill(mask, -torch.inf)


@contextmanager
def _recording() -> Iterator[list[tuple[Any, ...]]]:
    """Record query, key, value and context of each call of torch's own attention function.

    Where the layer has a kernel of its own, it does not call the function, and nothing is recorded.
    A `TorchFunctionMode` would keep the layer from that kernel.
    """
    functional: Any = importlib.import_module("torch.nn.functional")
    own = functional.scaled_dot_product_attention
    recorded: list[tuple[Any, ...]] = []

    def recording(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        context = own(query, key, value, *args, **options)
        recorded.append((query, key, value, context))
        return context

    functional.scaled_dot_product_attention = recording
    try:
        yield recorded
    finally:
        functional.scaled_dot_product_attention = own


def _heads(recorded: list[tuple[Any, ...]]) -> Arrays:
    """The one recorded call, (B, H, T, d), by stage, (B, T, H, d)."""
    if len(recorded) != 1 or any(x.ndim != 4 for x in recorded[0]):
        return {}
    names = ("query", "key", "value", "context")
    return {name: array(x.transpose(1, 2)) for name, x in zip(names, recorded[0], strict=True)}


class TorchModule(CalledByNames):
    """A module of the user's own, in the mode in which it is, unless the call says `training`.

    It gets the inputs of the call as tensors of its device and dtype, and the call's other
    arguments by name, a bias in float32 beside half precision where it can mix the two. It may
    return the same as a plain function. `description` has its weights, where they are known; `own`
    says that the module's own state has them.
    """

    def __init__(
        self, module: Any, description: LayerDescription | None = None, own: bool = False
    ) -> None:
        self.module, self.description = module, description
        self.state = description if own else None
        super().__init__(module.forward, module)

    def settle(self, request: Request) -> None:
        """See `CalledByNames`."""
        with restored(self.module, None), importlib.import_module("torch").no_grad():
            super().settle(request)

    def results(
        self, request: Request, form: Fitted, inputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """See `CalledByNames`; `inputs` are the request's as tensors."""
        module, inputs = self.module, inputs or tensors(self.module, request.inputs)
        # torch's own layer, and those that have its option, take the time first by default.
        turned = getattr(module, "batch_first", True) is False

        arrays = {n: a for n, a in form.arguments.items() if isinstance(a, np.ndarray)}
        others, rounded = (tensors(module, arrays, at_least) for at_least in ("float32", ""))

        def call(others: Mapping[str, Any]) -> Any:
            given = {n: fresh(x) for n, x in inputs.items()}  # it may write into them
            given = {n: x.transpose(0, 1) if turned else x for n, x in given.items()}
            return form.call(module, given, {**form.arguments, **others})

        try:
            result = call(others)
        except RuntimeError:  # as where it cannot mix dtypes
            if all(others[name].dtype == x.dtype for name, x in rounded.items()):
                raise
            result = call(rounded)
        stages = named_stages(result, self.name, request)
        if turned:
            stages["output"] = stages["output"].swapaxes(0, 1)
        return stages

    @exits_as_errors
    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        module, state = self.module, self.state
        self.settle(request)
        training = request.call.get("training")
        rest = {name: value for name, value in request.call.items() if name != "training"}
        forms = self.parameters.forms(dataclasses.replace(request, call=rest))
        inputs = tensors(module, request.inputs)

        def run(form: Fitted) -> Mapping[str, Any]:
            recording = nullcontext({}) if state is None else recorded_projections(module, state)
            with importlib.import_module("torch").no_grad(), recording as recorded:
                reported = self.results(request, form, inputs)
            return {**recorded, **{name: array(x) for name, x in reported.items()}}

        with restored(module, training):
            form, first = first_that_runs(forms, run, request)
            call = iter((first, run(form))).__next__
            gradients = gradients_through(
                module, lambda x: self.results(request, form, x)["output"], inputs, cotangent, state
            )
            return make_trace(self.name, request, call, self.description, gradients, form.notes)


def tensors(module: Any, arrays: Mapping[str, np.ndarray], at_least: str = "") -> dict[str, Any]:
    """Arrays on a module's device; numbers in its dtype, as torch refuses to mix them.

    With `at_least` they are in that dtype where the module's is narrower.
    """
    torch = importlib.import_module("torch")
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    converted = {}
    for name, array in arrays.items():
        tensor = get_backend("torch").ops.from_numpy(np.ascontiguousarray(array))
        if first is not None:
            dtype = first.dtype if tensor.is_floating_point() else tensor.dtype
            if at_least and tensor.is_floating_point():
                dtype = torch.promote_types(dtype, getattr(torch, at_least))
            tensor = tensor.to(first.device, dtype)
        converted[name] = tensor
    return converted


def array(value: Any) -> np.ndarray:
    """A tensor in NumPy, without its history; or another array, or a number."""
    return as_numpy(value.detach() if hasattr(value, "detach") else value)


@contextmanager
def restored(module: Any, training: bool | None) -> Iterator[None]:
    """Put the module into a mode, and restore all state at the end, random numbers included."""
    torch: Any = importlib.import_module("torch")
    modes = {part: part.training for part in module.modules()}
    buffers = {buffer: buffer.detach().clone() for buffer in module.buffers()}
    places = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[place.index for place in places]):
            if training is not None:
                module.train(training)
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def gradients_through(
    module: Any,
    function: Callable[[Mapping[str, Any]], Any],
    inputs: Mapping[str, Any],
    cotangent: np.ndarray | None,
    description: LayerDescription | None,
) -> Arrays | str:
    """Gradients of the sum of an output times a cotangent, by canonical name; no `.grad` changes.

    They are of the inputs, and of the module's parameters where the layout of these is described;
    the module may also be a mapping of its parameters. There are none without a cotangent. Where
    the output is detached from what it is computed from, all are zero; where it is no tensor, words
    say why there are none.
    """
    if cotangent is None:
        return {}
    torch: Any = importlib.import_module("torch")
    parameters: Mapping[str, Any] = {}
    if description is not None:
        parameters = module if isinstance(module, Mapping) else _parameters_of(module)
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_()
        with torch.enable_grad():
            # Copies may be written into, as inputs in a model may; leaves may not.
            output = function({name: leaf.clone() for name, leaf in leaves.items()})
            if not isinstance(output, torch.Tensor):
                kind = type(output)
                return f"its output is a {kind.__module__}.{kind.__name__}, no tensor of torch"
            sources = [*parameters.values(), *leaves.values()]
            gradients = [None] * len(sources)
            if output.requires_grad:
                to = get_backend("torch").ops.from_numpy(cotangent).to(output.device, output.dtype)
                gradients = torch.autograd.grad(output, sources, to, allow_unused=True)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
    ours = {name: x for name, x in zip(parameters, gradients, strict=False) if x is not None}
    theirs = zip(leaves, gradients[len(parameters) :], strict=True)
    zeros = {name: np.zeros_like(array(x)) for name, x in inputs.items()}
    of_inputs = {name: zeros[name] if x is None else array(x) for name, x in theirs}
    return {**(description.canonical(ours) if description is not None else {}), **of_inputs}


def _parameters_of(module: Any) -> dict[str, Any]:
    """A module's floating-point parameters, by the names of its state."""
    own = {id(parameter) for parameter in module.parameters() if parameter.is_floating_point()}
    return {n: p for n, p in module.state_dict(keep_vars=True).items() if id(p) in own}


@contextmanager
def recorded_projections(module: Any, description: LayerDescription) -> Iterator[Arrays]:
    """Record the results of the module's projections while it runs, by stage.

    Queries and keys are left out where the module rotates or normalizes them after projection.
    """
    layout, config = get_layout(description.layout), description.config
    shapes = {name: tuple(a.shape) for name, a in description.arrays.items()}
    form = form_of(layout.name, layout.forms, layout.extras, layout.refused or {}, shapes)
    width = config.key_dim if config.value_dim is None else config.value_dim
    sizes = Sizes(config.num_heads, config.key_value_heads, config.key_dim, width)
    recorded: Arrays = {}
    hooks = []
    for piece in form.pieces:
        part = dict(module.named_modules()).get(piece.array.rpartition(".")[0])
        if piece.part != "kernel" or part is None or piece.array.rpartition(".")[0] == "":
            continue

        def record(part: Any, inputs: Any, output: Any, piece: Any = piece) -> None:
            if piece.holds == ("output",):
                context = array(inputs[0])
                recorded["context"] = context.reshape(*context.shape[:2], config.num_heads, width)
                return
            # Each position is one more input of a kernel whose outputs lie as the layout says.
            flat = array(output)
            rows = flat.reshape(-1, flat.shape[-1])
            read = piece.read(rows.T if piece.form == "linear" else rows, sizes)
            for name, heads in read.items():
                stage = name.partition(".")[0]
                if stage == "value" or not description.changes_heads:
                    recorded[stage] = heads.reshape(*flat.shape[:-1], *heads.shape[1:])

        hooks.append(part.register_forward_hook(record))
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
