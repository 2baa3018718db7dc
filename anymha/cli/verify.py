"""Proof of a conversion: bits there and back; outputs of ours and of the libraries' own layers."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anymha.cli.peers import FAMILIES, run
from anymha.errors import AnymhaError, BackendNotInstalledError, LayoutError
from anymha.framework.registry import Backend, backends, get_layer
from anymha.interchange.convert_model import Converted
from anymha.interchange.layers import convert, set_weights
from anymha.interchange.layouts import get_layout
from anymha.parity.oracle.cases import MatrixCase, OracleProblem, make_problem
from anymha.parity.oracle.truth import expected
from anymha.parity.stages.units import units_of

BATCH, QUERIES, KEYS = 2, 7, 9


class Mismatch(AnymhaError):
    """A converted layer is not the one that it should be."""


def _torch(layer: Any, query: np.ndarray, value: np.ndarray, key: np.ndarray) -> np.ndarray:
    torch: Any = importlib.import_module("torch")
    with torch.no_grad():
        q, v, k = (torch.from_numpy(x) for x in (query, value, key))
        first = (lambda x: x) if layer.batch_first else (lambda x: x.transpose(0, 1))
        return first(layer.eval()(first(q), first(k), first(v), need_weights=False)[0]).numpy()


def _keras(layer: Any, query: np.ndarray, value: np.ndarray, key: np.ndarray) -> np.ndarray:
    keras: Any = importlib.import_module("keras")
    return np.asarray(keras.ops.convert_to_numpy(layer(query, value, key, training=False)))


def _flax(layer: Any, query: np.ndarray, value: np.ndarray, key: np.ndarray) -> np.ndarray:
    return np.asarray(layer(query, key, value, deterministic=True))


def _equinox(layer: Any, query: np.ndarray, value: np.ndarray, key: np.ndarray) -> np.ndarray:
    ones = zip(query, key, value, strict=True)
    return np.stack([np.asarray(layer(*one, inference=True)) for one in ones])


LIBRARIES: dict[str, Callable[..., np.ndarray]] = {
    "torch.MultiheadAttention": _torch,
    "keras.MultiHeadAttention": _keras,
    "keras.GroupQueryAttention": _keras,
    "flax.nnx.MultiHeadAttention": _flax,
    "equinox.MultiheadAttention": _equinox,
}
"""How the layer of each library that can be made here is called."""


class Verifier:
    """Checks layers one by one, and keeps the greatest errors.

    Args:
        layout: The layout that they have.
        to: The layout that they get.
        sizes: What was told of them beside their shapes.
    """

    def __init__(self, layout: str, to: str, sizes: Mapping[str, Any]) -> None:
        self._layout, self._to, self._sizes = layout, to, dict(sizes)
        self._errors: dict[str, tuple[float, float, float]] = {}
        self._count = 0
        self._untried: dict[str, str] = {}

    def check(self, layer: Converted) -> None:
        """Convert a layer back, and run it.

        Raises:
            Mismatch: a bit or an output is another.
        """
        self._check_bits(layer)
        self._count += 1
        if any(not np.isfinite(array).all() for array in layer.weights.values()):
            self._untried["all"] = "not all weights are finite"
            return
        problem = _problem(layer)
        judged = self._judge(problem)
        for backend in backends().values():
            if backend.installed:
                judged(f"anymha in {backend.name}", _ours(backend, problem))
        for layout in dict.fromkeys((self._layout, self._to)):
            if layout in FAMILIES:  # its layers attend to their own inputs alone
                alone = _problem(layer, alone=True)
                got, told = self._theirs(layout, alone), self._judge(alone)
            else:
                got, told = self._theirs(layout, problem), judged
            if got is not None:
                told(f"{layout} itself", got)

    def _judge(self, problem: OracleProblem) -> Callable[[str, np.ndarray], None]:
        """What holds an output against the exact one, and keeps its error."""
        truth = expected(problem)
        budget, units = units_of(problem, truth)
        unit = units["output"]

        def judged(name: str, got: np.ndarray) -> None:
            error = float(np.max(np.abs(np.asarray(got, np.float64) - truth.output), initial=0.0))
            held = (error / unit if unit else 0.0, error, budget)
            if not held[0] <= budget:
                raise Mismatch(
                    f"{problem.case.name!r} gives another output in {name}: it is {error:.3g} off, "
                    f"or {held[0]:.3g} units of rounding, of which {budget:.3g} are explained."
                )
            self._errors[name] = max(self._errors.get(name, held), held)

        return judged

    def _check_bits(self, layer: Converted) -> None:
        """That both layouts give back, bit for bit, what was put into them."""
        source, target = get_layout(self._layout), get_layout(self._to)
        plain = copy.copy(layer.weights)
        plain.config = None  # a scale that was told is no part of the bits
        _compare(layer, self._layout, layer.arrays, source.from_canonical(plain))
        config = layer.config
        sizes = {"num_heads": config.num_heads, "num_key_value_heads": config.num_key_value_heads}
        again, _ = target.to_canonical(layer.result, **sizes)
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
            if layout not in LIBRARIES:
                raise LayoutError("its layer needs more than attention, or a whole model")
            ours = set_weights(get_layer("numpy")(**config.to_dict()), problem.weights)
            live = convert(ours, to=layout)
            arrays = (problem.inputs[name] for name in ("query", "value", "key"))
            return LIBRARIES[layout](live, *arrays)
        except BackendNotInstalledError:
            self._untried[layout] = "it is not installed"
        except AnymhaError as error:
            self._untried[layout] = str(error)
        return None

    def lines(self) -> list[str]:
        """What was found, in words."""
        found = [f"Verified: {self._count} layers, back to {self._layout} and from {self._to} bit "
                 "for bit. Greatest errors of the output against float64:"]  # fmt: skip
        for name, (units, error, budget) in self._errors.items():
            found.append(f"  {name}: {error:.1e}, {units:.2f} units of rounding of {budget:.0f}")
        for name, reason in self._untried.items():
            found.append(f"  not run: {name}: {reason}")
        return found


def _problem(layer: Converted, alone: bool = False) -> OracleProblem:
    """The layer on random inputs; on one, where it attends to its queries alone."""
    config, weights = layer.config, layer.weights
    widths = tuple(weights[f"{name}.kernel"].shape[0] for name in ("query", "value", "key"))
    features = ("query_features", "value_features", "key_features")
    options = {name: value for name, value in config.to_dict().items() if name not in features}
    options["output_shape"] = weights["output.kernel"].shape[2:]
    value = None if alone else (BATCH, KEYS)
    case = MatrixCase(layer.prefix, options, {}, (BATCH, QUERIES), value, widths)
    return dataclasses.replace(make_problem(case), weights=dict(weights))


def _ours(backend: Backend, problem: OracleProblem) -> np.ndarray:
    ops = backend.ops
    layer = set_weights(backend.layer(**problem.case.config.to_dict()), problem.weights)
    arrays = (ops.from_numpy(problem.inputs[name]) for name in ("query", "value", "key"))
    return np.asarray(ops.to_numpy(layer(*arrays)))


def _compare(
    layer: Converted, layout: str, one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
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
