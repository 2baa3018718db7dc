"""What Keras itself gives: run in a process of its own, since importing Keras fixes its backend."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anymha.options.serialization import described
from anymha.options.training import OBJECTS, checked_object

ROOT = Path(__file__).parent.parent

OPTIONS: dict[str, Any] = {"num_heads": 2, "key_dim": 3, "value_dim": 4, "output_shape": (5, 2)}
WIDTHS = {"query_features": 6, "value_features": 7, "key_features": 8}

REGULARIZERS: dict[str, Any] = {
    "l1": "l1",
    "l2": "l2",
    "L1 0.3": {"class_name": "L1", "config": {"l1": 0.3}},
    "L1L2": {"class_name": "L1L2", "config": {"l1": 0.03, "l2": 0.2}},
    "rows": {"class_name": "OrthogonalRegularizer", "config": {"factor": 0.4}},
    "columns": {
        "class_name": "OrthogonalRegularizer",
        "config": {"factor": 0.4, "mode": "columns"},
    },
}
ACTIVITY = ("l1", "L1L2")
AXES: dict[str, Any] = {"plain": None, "N-D": (2,)}

CONSTRAINTS: dict[str, Any] = {
    "non_neg": "non_neg",
    "unit_norm": "unit_norm",
    "max_norm": "max_norm",
    "MaxNorm 0.7": {"class_name": "MaxNorm", "config": {"max_value": 0.7, "axis": 0}},
    "last axis": {"class_name": "UnitNorm", "config": {"axis": -1}},
    "MinMaxNorm": {
        "class_name": "MinMaxNorm",
        "config": {"min_value": 1.2, "max_value": 1.6, "rate": 0.4, "axis": 0},
    },
    "two axes": {"class_name": "UnitNorm", "config": {"axis": [0, 1]}},
}
"""What is "two axes" fits no bias of one axis, and is a constraint of the kernels alone."""


def weights() -> dict[str, np.ndarray]:
    """Canonical weights, normal and without zeros."""
    shapes = {
        "query.kernel": (6, 2, 3), "query.bias": (2, 3),
        "key.kernel": (8, 2, 3), "key.bias": (2, 3),
        "value.kernel": (7, 2, 4), "value.bias": (2, 4),
        "output.kernel": (2, 4, 5, 2), "output.bias": (5, 2),
    }  # fmt: skip
    rng = np.random.default_rng(5)
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}


def inputs(axes: str) -> dict[str, np.ndarray]:
    """Query, value and key; (batch, length, width), or with a further batch axis."""
    rng = np.random.default_rng(6)
    shapes = {"query": (3, 4, 6), "value": (3, 5, 7), "key": (3, 5, 8)}
    if axes == "N-D":
        shapes = {n: (shape[0], 2, *shape[1:]) for n, shape in shapes.items()}
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}


def matrices() -> dict[str, np.ndarray]:
    """The kernels as the projections' matrices."""
    kernels = {name: w for name, w in weights().items() if name.endswith("kernel")}
    rows = {n: 8 if n == "output.kernel" else len(w) for n, w in kernels.items()}
    return {name: w.reshape(rows[name], -1) for name, w in kernels.items()}


@functools.cache
def keras_values() -> dict[str, Any]:
    """All that Keras gives for the cases above, by name; skips where it is not installed."""
    installed = [n for n in ("torch", "jax", "tensorflow") if importlib.util.find_spec(n)]
    if not importlib.util.find_spec("keras") or not installed:
        pytest.skip("keras is not installed, or no framework that it runs on")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.npz"
        paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
        environment = {**os.environ, "KERAS_BACKEND": installed[0], "PYTHONPATH": paths}
        subprocess.run(
            [sys.executable, "-m", "tests.keras_reference", str(file)],
            cwd=ROOT,
            env=environment,
            check=True,
            timeout=300,
        )
        with np.load(file) as found:
            values: dict[str, Any] = dict(found)
    return values | json.loads(str(values.pop("texts")))


def _main(file: str) -> None:
    keras: Any = importlib.import_module("keras")

    def number(tensor: Any) -> float:
        return float(keras.ops.convert_to_numpy(tensor))

    def layer(shapes: dict[str, tuple[int, ...]], **options: Any) -> Any:
        made = keras.layers.MultiHeadAttention(**OPTIONS, **options)
        made.build(shapes["query"], shapes["value"], shapes["key"])
        made.set_weights(list(weights().values()))
        return made

    found: dict[str, Any] = {}
    for axes, attention_axes in AXES.items():
        given = inputs(axes)
        shapes = {name: array.shape for name, array in given.items()}
        for name in ACTIVITY:
            options = {"activity_regularizer": REGULARIZERS[name], "attention_axes": attention_axes}
            made = layer(shapes, **options)
            made(given["query"], given["value"], given["key"])
            assert len(made.losses) == 4
            found[f"activity {axes} {name}"] = sum(map(number, made.losses))
    shapes = {name: array.shape for name, array in inputs("plain").items()}
    for name, spec in REGULARIZERS.items():
        if name in ("rows", "columns"):  # refuses kernels of more than two axes
            regularizer = keras.regularizers.get(spec)
            found[f"kernel {name}"] = sum(
                number(regularizer(keras.ops.convert_to_tensor(m))) for m in matrices().values()
            )
        else:
            found[f"kernel {name}"] = sum(
                map(number, layer(shapes, kernel_regularizer=spec).losses)
            )
        found[f"bias {name}"] = sum(map(number, layer(shapes, bias_regularizer=spec).losses))
    for name, spec in CONSTRAINTS.items():
        made = layer(shapes, kernel_constraint=spec, bias_constraint=spec)
        for canonical, variable in zip(weights(), made.trainable_weights, strict=True):
            found[f"constraint {name} {canonical}"] = keras.ops.convert_to_numpy(
                variable.constraint(variable)
            )
    np.savez(file, allow_pickle=False, texts=json.dumps(_objects()), **found)


def _objects() -> dict[str, Any]:
    """Keras's names, the fields of its classes, and what anymha makes of its objects."""
    left_out = {"Initializer", "Regularizer", "Constraint", "STFT"}
    found: dict[str, Any] = {}
    for kind in ("initializer", "regularizer", "constraint"):
        classes = importlib.import_module(f"keras.src.{kind}s").ALL_OBJECTS_DICT
        classes = {n: cls for n, cls in classes.items() if cls.__name__ not in left_out}
        option = f"kernel_{kind}"
        assert option in OBJECTS
        found[kind] = {
            name: [cls.__name__, cls().get_config(), described(checked_object(cls(), option))]
            for name, cls in classes.items()
        }
    return found


if __name__ == "__main__":
    _main(sys.argv[1])
