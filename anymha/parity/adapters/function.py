"""Functions ``f(query, value, key, **call)``."""

from __future__ import annotations

import importlib
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from anymha.errors import AnymhaError, ArgumentError
from anymha.framework.registry import backend_of
from anymha.parity.adapters.arguments import CalledByNames, Fitted, exits_as_errors, first_that_runs
from anymha.parity.adapters.foreign import LayerDescription, make_trace
from anymha.parity.adapters.module_state import packages_of, unready
from anymha.parity.stages.layer_call import native
from anymha.parity.stages.trace import INPUTS, STAGES, Arrays, Request, Trace, as_numpy, fresh


class Function(CalledByNames):
    """A function, in the framework of the arrays that the user gave.

    It gets the caller's own arrays and the call's other arguments, by its own names where its
    signature has them: see `anymha.parity.adapters.arguments`. It returns the output; or the output
    and the scores; or a dict with "output" and any of "scores" and the stages. Its gradients are
    those of its inputs, where its framework differentiates.
    """

    def __init__(
        self, function: Callable[..., Any], description: LayerDescription | None = None
    ) -> None:
        self.function, self.description = function, description
        kinds: tuple[type, ...] = getattr(type(function), "__mro__", ())
        keras = any(kind.__module__.startswith("keras.") for kind in kinds)
        called: Any = getattr(function, "call", function) if keras else function
        super().__init__(called, function)

    def results(self, request: Request, form: Fitted) -> dict[str, Any]:
        """See `CalledByNames`."""
        inputs = {name: request.originals[name] for name in INPUTS if name in request.originals}
        return self._results(request, form, backend_of(inputs["query"]).ops, inputs)

    def _results(
        self, request: Request, form: Fitted, ops: Any, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The results by name for inputs of a framework; copies, as it may write into them."""
        arguments = native(ops, {n: fresh(value) for n, value in form.arguments.items()})
        own = {name: fresh(array) for name, array in inputs.items()}
        result = form.call(self.function, own, arguments)
        return named_stages(result, self.name, request)

    @exits_as_errors
    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        run, ops = partial(self.results, request), backend_of(request.originals["query"]).ops
        self.settle(request)
        try:
            form, first = first_that_runs(self.parameters.forms(request), run, request)
        except Exception as error:
            about = any(word in str(error) for word in ("ndarray", "Tensor", "tensor", "Array"))
            if ops.name == "numpy" and about and not isinstance(error, AnymhaError):
                error.add_note(
                    f"{self.name} got arrays of NumPy, as the inputs are. If it takes those of "
                    "another framework, give such inputs; on the command line: `--arrays torch`."
                )
            _advise(error)
            raise
        both = [{name: as_numpy(x) for name, x in one.items()} for one in (first, run(form))]
        gradients: Arrays | str = {}
        if cotangent is not None:
            results = partial(self._results, request, form)
            gradients = _gradients(results, first["output"], request, cotangent)
        call = iter(both).__next__
        return make_trace(
            self.name, request, call, self.description, gradients, form.notes, ops.name
        )


def _advise(error: Exception) -> None:
    """Add to an error what to do, where it was raised in a module that is given as it cannot be."""
    frames = traceback.walk_tb(error.__traceback__)
    callers = [next(iter(frame.f_locals.values()), None) for frame, _ in frames]  # `self`, mostly
    notes = [unready(one) for one in callers if "flax" in packages_of(one)]
    if any("equinox" in packages_of(one) for one in callers):
        notes.append("If a module of Equinox takes one example alone, give `jax.vmap(module)`.")
    for note in dict.fromkeys(filter(None, notes)):
        error.add_note(note)


def _gradients(
    results: Callable[[Any, Any], Mapping[str, Any]],
    output: Any,
    request: Request,
    cotangent: np.ndarray,
) -> Arrays | str:
    """The gradients of a function's inputs by the framework of its output; or why there are none.

    `results` takes a framework's functions and the inputs by name.
    """
    try:
        ops = backend_of(output).ops
    except AnymhaError:
        return "its output is of no framework"
    if ops.capabilities.vjp is None:
        return f"its output is of {ops.name}, which does not differentiate"
    if any(array.dtype.kind in "iub" for array in request.inputs.values()):
        return "its inputs are not floating-point numbers"

    def of(arrays: Mapping[str, Any]) -> Any:
        return results(ops, arrays)["output"]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of copies of tensors that have gradients
            inputs = {
                name: ops.from_numpy(array) if isinstance(request.originals[name], np.ndarray)
                else request.originals[name]
                for name, array in request.inputs.items()
            }  # fmt: skip
            to = ops.from_numpy(cotangent.astype(as_numpy(output).dtype))
            vjp = _torch_vjp if ops.name == "torch" else ops.capabilities.vjp
            pulled = vjp(of, inputs, to)[1]
    except Exception as error:  # as of a function that leaves the framework on the way
        words = " ".join(str(error).split())
        return f"{type(error).__name__}: {words[:160]}"
    if all(array is None for array in pulled.values()):
        return "its output is detached from its inputs"
    return {
        name: np.zeros_like(request.inputs[name]) if array is None else as_numpy(array)
        for name, array in pulled.items()
    }


def _torch_vjp(
    function: Callable[[Any], Any], arrays: Mapping[str, Any], to: Any
) -> tuple[Any, dict[str, Any]]:
    """The value and the gradients of a function; None for what the output is detached from."""
    torch: Any = importlib.import_module("torch")
    leaves = {name: array.detach().clone().requires_grad_() for name, array in arrays.items()}
    with torch.enable_grad():
        output = function({name: leaf.clone() for name, leaf in leaves.items()})
    pulled: Any = [None] * len(leaves)
    if output.requires_grad:
        pulled = torch.autograd.grad(
            output, list(leaves.values()), to.to(output.device), allow_unused=True
        )
    return output, dict(zip(leaves, pulled, strict=True))


def _is_array(result: list[Any]) -> bool:
    """Whether nested lists are the numbers of one array, and not several results."""
    if not all(isinstance(part, (list, int, float)) for part in result):
        return False
    try:
        return np.asarray(result).dtype.kind in "iuf"
    except ValueError:  # of lists of several lengths
        return False


def named_stages(result: Any, name: str, request: Request) -> dict[str, Any]:
    """The results of a function by name: stages, "output" and "scores"."""
    if isinstance(result, list) and _is_array(result):  # a list has no dtype of its own
        result = np.asarray(result, request.inputs["query"].dtype)
    if isinstance(result, Mapping):
        stages = dict(result)
    elif isinstance(result, (tuple, list)):
        stages = dict(zip(("output", "scores"), result, strict=False))
    else:
        stages = {"output": result}
    unknown = sorted(set(stages) - {*STAGES, "scores"})
    many = isinstance(result, (tuple, list)) and len(result) > 2
    if stages.get("output") is None or unknown or many:
        received = f"{len(result)} values" if many else ", ".join(stages) if unknown else "None"
        raise ArgumentError(
            f"`{name}` must return the output, or the output and the scores, or a dict of 'output' "
            f"and any of {', '.join((*STAGES[:-1], 'scores'))}. Received: {received}."
        )
    return {key: value for key, value in stages.items() if value is not None}
