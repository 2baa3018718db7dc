"""Models of ONNX through onnxruntime: a session, or the path of a file."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from anymha.errors import ArgumentError, BackendNotInstalledError
from anymha.parity.adapters.foreign import make_trace
from anymha.parity.stages.trace import STAGES, Arrays, Request, Trace

DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}


class Session:
    """An `onnxruntime.InferenceSession`, or the path of a model.

    Its inputs have the names of the arguments of anymha's layer. Its output is the one called
    "output", else the first; others are compared where they have the name "scores" or that of a
    stage.
    """

    def __init__(self, model: Any) -> None:
        self.session, self.name = model, "the model of ONNX"
        if not isinstance(model, (str, Path)):
            return
        path = Path(model)
        if not path.is_file():
            raise ArgumentError(
                "A text is the file of a model of ONNX, or the name of a backend or of a library's "
                f"layer. Received: {str(path)!r}, which is none of them."
            )
        if importlib.util.find_spec("onnxruntime") is None:
            raise BackendNotInstalledError(
                "A model of ONNX is run by onnxruntime, which is not installed. Install it with: "
                "pip install onnxruntime."
            )
        runtime: Any = importlib.import_module("onnxruntime")
        self.session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.name = path.name

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        del cotangent  # it has no gradients
        feed = self._feed(request)
        outputs = [output.name for output in self.session.get_outputs()]
        if "output" in outputs:
            names = dict.fromkeys(outputs)
        else:
            names = dict(zip(outputs, ("output", *outputs[1:]), strict=True))

        def call() -> Arrays:
            results = dict(zip(outputs, self.session.run(None, feed), strict=True))
            stages = {names[name] or name: np.asarray(array) for name, array in results.items()}
            return {n: a for n, a in stages.items() if n in (*STAGES, "scores")}

        return make_trace(self.name, request, call, None, "onnxruntime gives no gradients")

    def lacking(self, request: Request) -> str:
        """Why it cannot be given the call, in words; empty where it can."""
        lacking, unknown = self._names(request)
        if "value" in lacking:
            return "takes one input alone"
        words = [f"{verb} {', '.join(f'`{name}`' for name in names)}"
                 for verb, names in (("does not take", lacking), ("needs", unknown))
                 if names]  # fmt: skip
        return " and ".join(words)

    def _inputs(self, request: Request) -> dict[str, Any]:
        query, value, key = request.three
        return {**request.arguments(), "query": query, "value": value, "key": key}

    def _names(self, request: Request) -> tuple[list[str], list[str]]:
        """What the call has and the model does not take; what it needs and the call lacks."""
        places = {place.name for place in self.session.get_inputs()}
        needed = {*request.inputs, *request.masks} | {
            name
            for name, value in request.arguments().items()
            if isinstance(value, np.ndarray) or (name != "training" and value)
        }
        return sorted(needed - places), sorted(places - set(self._inputs(request)))

    def _feed(self, request: Request) -> Arrays:
        """The model's inputs by name; an error where it has others than the call."""
        inputs = self._inputs(request)
        places = {place.name: place.type for place in self.session.get_inputs()}
        lacking, unknown = self._names(request)
        if lacking or unknown:
            raise ArgumentError(
                f"The inputs of {self.name} must be named as the arguments of anymha's layer. It "
                f"has: {', '.join(places)}. It lacks: {', '.join(lacking) or 'none'}. The call "
                f"lacks: {', '.join(unknown) or 'none'}."
            )
        return {name: np.asarray(inputs[name], DTYPES.get(kind)) for name, kind in places.items()}
