"""Modules of torch: called without a trace left in them, listened to, and differentiated."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from anymha.framework.registry import get_backend
from anymha.interchange.layouts import get_layout
from anymha.interchange.packing import Sizes
from anymha.interchange.reading import form_of
from anymha.parity.adapters.foreign import LayerDescription
from anymha.parity.oracle.recipe import Arrays
from anymha.parity.stages.trace import as_numpy


def tensors(module: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays on a module's device; numbers in its dtype, as torch refuses to mix them."""
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    converted = {}
    for name, array in arrays.items():
        tensor = get_backend("torch").ops.from_numpy(np.ascontiguousarray(array))
        if first is not None:
            dtype = first.dtype if tensor.is_floating_point() else tensor.dtype
            tensor = tensor.to(first.device, dtype)
        converted[name] = tensor
    return converted


def array(tensor: Any) -> np.ndarray:
    """A tensor in NumPy, without its history."""
    return as_numpy(tensor.detach())


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
    parameters: Mapping[str, Any],
    function: Callable[[Mapping[str, Any]], Any],
    inputs: Mapping[str, Any],
    cotangent: np.ndarray,
    description: LayerDescription | None,
) -> Arrays:
    """Gradients of the sum of an output times a cotangent; no `.grad` changes.

    Args:
        parameters: By their names in the layout.
        function: The output for the inputs by name.
        inputs: The inputs.
        cotangent: In the shape of the output.
        description: The layout of the parameters; None: gradients of the inputs alone.

    Returns:
        By canonical name, and by the names of the inputs; empty if the output has no gradient.
    """
    torch: Any = importlib.import_module("torch")
    if description is None:
        parameters = {}
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_()
        with torch.enable_grad():
            output = function(leaves)
            if not output.requires_grad:
                return {}
            to = get_backend("torch").ops.from_numpy(cotangent).to(output.device, output.dtype)
            sources = [*parameters.values(), *leaves.values()]
            gradients = torch.autograd.grad(output, sources, to, allow_unused=True)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
    ours = {name: x for name, x in zip(parameters, gradients, strict=False) if x is not None}
    theirs = zip(leaves, gradients[len(parameters) :], strict=True)
    zeros = {name: np.zeros_like(array(x)) for name, x in inputs.items()}
    of_inputs = {name: zeros[name] if x is None else array(x) for name, x in theirs}
    return {**(description.canonical(ours) if description is not None else {}), **of_inputs}


def parameters_of(module: Any) -> dict[str, Any]:
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
                if stage == "value" or not description.needs:
                    recorded[stage] = heads.reshape(*flat.shape[:-1], *heads.shape[1:])

        hooks.append(part.register_forward_hook(record))
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
