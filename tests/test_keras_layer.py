"""The Keras layer on each of Keras's backends, in processes of their own.

Importing Keras fixes its backend, so this process never does. Importing takes seconds, so each
backend has one process for all files of checks.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from anymha.errors import UnknownBackendError
from anymha.framework.registry import LAYERS, get_backend, get_layer
from tests.conftest import BACKENDS
from tests.frameworks import skip_or_fail

ROOT = Path(__file__).parents[1]
SCIPY = importlib.util.find_spec("scipy") is not None  # comes with JAX, not with TensorFlow


# How `compare` asks Keras's layers; `test_adapters.py` itself does on one backend, TensorFlow.
ASKED = [
    f"test_adapters.py::{name}"
    for name in (
        *(
            f"test_a_library_s_layer_with_our_weights_agrees_in_each_stage_and_gradient[{case}]"
            for case in ("keras-cross", "keras-grouped-causal")
        ),
        "test_keras_s_layer_is_left_as_it_was",
    )
]


def python(backend: str, *arguments: str, **environment: str) -> str:
    """What Python prints with these arguments and this Keras backend; it must succeed."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    known = {"KERAS_BACKEND": backend, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"}
    known |= {"PY_COLORS": "0", "PYTEST_ADDOPTS": ""}  # what is printed is looked at
    if backend == "jax":  # XLA compiles for longer than it computes; the layer of JAX has tests
        known["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        known["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **known, **environment},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pytest_in(backend: str, file: str, *options: str, **environment: str) -> str:
    """Run a file of tests with this Keras backend; `options` may name others."""
    quiet = ("-q", "-p", "no:cacheprovider", "--tb=short")
    return python(backend, "-m", "pytest", *quiet, f"tests/{file}", *options, **environment)


def count(output: str, file: str, outcome: str) -> int:
    """How many tests of a file have this outcome, of which pytest has told each."""
    return len(re.findall(rf"^tests/{file}::.* {outcome}", output, re.MULTILINE))


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each Keras backend in turn."""
    if importlib.util.find_spec("keras") is None:
        skip_or_fail("keras", "keras is not installed")
    found = get_backend(request.param)
    if not found.installed:
        skip_or_fail(found.name, f"{found.framework} is not installed")
    if found.name == "numpy" and not SCIPY:
        skip_or_fail("keras", "Keras's NumPy backend needs scipy, which is not installed")
    return found.name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a model that the first backend saves, and its predictions."""
    return tmp_path_factory.mktemp("keras")


def test_the_layer_does_what_is_checked_of_it(backend: str, model: Path) -> None:
    """All checks, Keras's own tests of its layer, and how `compare` asks it."""
    files = ["keras_checks.py", "keras_cache_checks.py", "keras_own.py"]
    files += ["keras_tools_checks.py"] * (backend != "numpy")  # Keras does not train on NumPy
    options = ["-vv", "-o", "markers=requires_trainable_backend"]
    options += ["-m", "not requires_trainable_backend"] * (backend == "numpy")
    asked = ASKED * (backend in ("torch", "jax"))
    others = (f"tests/{file}" for file in [*files[1:], *asked])
    told = pytest_in(backend, files[0], *others, *options, ANYMHA_KERAS_MODEL=str(model))
    assert count(told, files[0], "SKIPPED") == (8 if backend == "numpy" else 0), told
    own = {"numpy": (43, 2), "tensorflow": (44, 2)}.get(backend, (46, 0))  # flash attention
    assert tuple(count(told, "keras_own.py", o) for o in ("PASSED", "SKIPPED")) == own, told
    assert all(count(told, file, "PASSED") for file in files), told
    assert count(told, "test_adapters.py", "PASSED") == len(asked), told


def test_an_unknown_layer_is_an_error_that_names_the_known_ones() -> None:
    names = ("numpy", "torch", "tensorflow", "jax", *(package.name for package in LAYERS))
    listed = ", ".join(map(repr, names))
    with pytest.raises(UnknownBackendError, match=f"one of {listed}. Received: 'keres'"):
        get_layer("keres")
