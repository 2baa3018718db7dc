"""Verify a conversion: all bits come back, and anymha's and the libraries' layers agree."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anymha.cli.names import LIVE
from anymha.cli.peers import FAMILIES, output_of, run, run_model
from anymha.errors import AnymhaError, BackendNotInstalledError, LayoutError
from anymha.framework.registry import Backend, backends
from anymha.interchange.convert_model import ConvertedLayer
from anymha.interchange.layers import convert, new_layer
from anymha.interchange.layouts import get_layout
from anymha.interchange.rotary_order import ORDER_OF, reordered, with_order
from anymha.parity.oracle.cases import MatrixCase, OracleProblem, make_problem
from anymha.parity.oracle.truth import expected
from anymha.parity.stages.limits import units_of

BATCH, QUERIES, KEYS = 2, 7, 9
TRANSFORMERS = "transformers."


class Mismatch(AnymhaError):
    """A converted layer has other bits, or another output, than it should."""


class Verifier:
    """Checks layers one by one, and keeps the greatest errors."""

    def __init__(self) -> None:
        self._layout = self._to = ""
        self._errors: dict[str, tuple[float, float, float]] = {}
        self._count = 0
        self._not_run: dict[str, str] = {}

    def check(self, layer: ConvertedLayer) -> None:
        """Convert a layer back, and run it; `Mismatch` where a bit or an output differs."""
        self._layout, self._to = layer.weights.layout, layer.result.layout
        self._check_bits(layer)
        self._count += 1
        if any(not np.isfinite(array).all() for array in layer.weights.values()):
            self._not_run["all"] = "not all weights are finite"
            return
        problem = _problem(layer)
        record = self._recorder(problem)
        for backend in backends().values():
            if backend.installed:
                record(f"anymha in {backend.name}", _ours(backend, problem))
        for layout in dict.fromkeys((self._layout, self._to)):
            if layout == self._layout and layer.model.stated and layout.startswith(TRANSFORMERS):
                self._run_model(layer)
                continue
            if layout in FAMILIES:  # its layers attend to their own inputs alone
                alone = _problem(layer, alone=True)
                output, record_theirs = self._theirs(layout, alone), self._recorder(alone)
            else:
                output, record_theirs = self._theirs(layout, problem), record
            if output is not None:
                record_theirs(f"{layout} itself", output)

    def _run_model(self, layer: ConvertedLayer) -> None:
        """Run the model's own layer, made by its configuration, on the source's arrays."""
        layout, weights = self._layout, layer.weights
        try:
            if weights.needs:
                raise LayoutError(
                    f"its layer needs more than attention: {'; '.join(weights.needs)}"
                )
            if weights["query.kernel"].dtype == np.float64:
                raise LayoutError("it computes parts in float32, and the weights are of float64")
            single = _problem(_in_float32(layer), alone=True, causal=True)
            output = run_model(layout, layer.model, layer.arrays, single.inputs["query"])
        except AnymhaError as error:
            missing = isinstance(error, BackendNotInstalledError)
            self._not_run[layout] = "it is not installed" if missing else str(error)
        else:
            self._recorder(single)(f"{layout} itself", output)

    def _recorder(self, problem: OracleProblem) -> Callable[[str, np.ndarray], None]:
        """A function that compares an output with the exact one, and keeps its error."""
        truth = expected(problem)
        budget, units = units_of(problem, truth)
        unit = units["output"]

        def record(name: str, output: np.ndarray) -> None:
            difference = np.abs(np.asarray(output, np.float64) - truth.output)
            error = float(np.max(difference, initial=0.0))
            units_off = error / unit if unit else 0.0
            if not units_off <= budget:
                raise Mismatch(
                    f"{problem.case.name!r} gives another output in {name}: it is {error:.3g} off, "
                    f"or {units_off:.3g} units of rounding; rounding explains {budget:.3g}."
                )
            measured = (units_off, error, budget)
            self._errors[name] = max(self._errors.get(name, measured), measured)

        return record

    def _check_bits(self, layer: ConvertedLayer) -> None:
        """Check that the arrays of both layouts come back bit for bit."""
        source, target = get_layout(self._layout), get_layout(self._to)
        plain = copy.copy(layer.weights)
        plain.config = None  # stated options are no part of the bits
        _compare(layer, self._layout, layer.arrays, source.from_canonical(plain))
        config, made = layer.config, layer.result.config or layer.config
        sizes = {"num_heads": config.num_heads, "num_key_value_heads": config.num_key_value_heads}
        known = [n for n in ("rotary", "query_key_norm") if getattr(made, n) is not None]
        again, found = target.to_canonical(
            layer.result, **sizes, **{name: getattr(made, name) for name in known}
        )
        again = reordered(again, again.rotary, layer.weights.rotary)
        rotary: Any = config.rotary
        again, _ = with_order(again, found, "" if rotary is None else ORDER_OF[rotary.layout])
        added = [name for name in again if name not in layer.weights and not np.any(again[name])]
        again = {name: array for name, array in again.items() if name not in added}
        _compare(layer, self._to, layer.weights, again)

    def _theirs(self, layout: str, problem: OracleProblem) -> np.ndarray | None:
        """The output of the library's own layer; None where it cannot be made."""
        if layout == "anymha":
            return None
        config = problem.case.config
        try:
            if layout in FAMILIES:
                return run(layout, config, problem.weights, problem.inputs["query"])
            if layout not in LIVE:
                raise LayoutError("its layer needs more than attention, or a whole model")
            ours = new_layer("numpy", config, problem.weights)
            return output_of(convert(ours, to=layout), problem.inputs)
        except BackendNotInstalledError:
            self._not_run[layout] = "it is not installed"
        except AnymhaError as error:
            self._not_run[layout] = str(error)
        return None

    def lines(self) -> list[str]:
        """The results, in words."""
        lines = [f"Verified: {self._count} layers, back to {self._layout} and from {self._to} bit "
                 "for bit. Greatest errors of the output against float64:"]  # fmt: skip
        for name, (units, error, budget) in self._errors.items():
            lines.append(f"  {name}: {error:.1e}, {units:.2f} units of rounding of {budget:.0f}")
        for name, reason in self._not_run.items():
            lines.append(f"  not run: {name}: {reason}")
        lines.append(
            f"This proves the conversion, not the choice of layout: whether the layers are of "
            f"{self._layout}, the model's own outputs must tell."
        )
        return lines


def _in_float32(layer: ConvertedLayer) -> ConvertedLayer:
    """A layer of half precision in float32, which has all its values."""
    weights = copy.copy(layer.weights)
    weights.update({name: array.astype(np.float32) for name, array in weights.items()})
    config = dataclasses.replace(layer.config, dtype="float32")
    return dataclasses.replace(layer, weights=weights, config=config)


def _problem(layer: ConvertedLayer, alone: bool = False, causal: bool = False) -> OracleProblem:
    """The layer on random inputs; on one, where it attends to its queries alone."""
    config, weights = layer.config, layer.weights
    widths = tuple(weights[f"{name}.kernel"].shape[0] for name in ("query", "value", "key"))
    features = ("query_features", "value_features", "key_features")
    options = {name: value for name, value in config.to_dict().items() if name not in features}
    options["output_shape"] = weights["output.kernel"].shape[2:]
    value = None if alone else (BATCH, KEYS)
    call = {"use_causal_mask": True} if causal else {}
    case = MatrixCase(layer.prefix, options, call, (BATCH, QUERIES), value, widths)
    return dataclasses.replace(make_problem(case), weights=dict(weights))


def _ours(backend: Backend, problem: OracleProblem) -> np.ndarray:
    ops = backend.ops
    layer = new_layer(backend.name, problem.case.config, problem.weights)
    arrays = (ops.from_numpy(problem.inputs[name]) for name in ("query", "value", "key"))
    return np.asarray(ops.to_numpy(layer(*arrays)))


def _compare(
    layer: ConvertedLayer,
    layout: str,
    one: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
) -> None:
    wrong = [
        name
        for name in {**one, **other}
        if name not in one or name not in other or one[name].dtype != other[name].dtype
        or one[name].tobytes() != other[name].tobytes() or one[name].shape != other[name].shape
    ]  # fmt: skip
    if wrong:
        raise Mismatch(
            f"{layer.prefix!r} does not come back from {layout} bit for bit: {', '.join(wrong)}."
        )
