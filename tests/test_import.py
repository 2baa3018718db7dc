"""What an import brings along: `anymha` no framework, a backend only its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

import anymha

FRAMEWORKS = ("torch", "tensorflow", "jax", "keras", "flax", "equinox")


def loaded_by(statement: str, *blocked: str) -> set[str]:
    """The frameworks that are loaded after a statement in a new process.

    Args:
        statement: Python source.
        blocked: Modules that cannot be imported in the process.
    """
    source = (
        f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        f"{statement}\n"
        "import json\n"
        f"print(json.dumps([m for m in {FRAMEWORKS!r} if sys.modules.get(m)]))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def needs(framework: str) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")


def test_anymha_imports_no_framework():
    assert loaded_by("import anymha") == set()


def test_every_name_of_anymha_is_there_at_its_first_use():
    source = (
        f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
        "import anymha\n"
        "assert 'numpy' not in sys.modules\n"
        f"assert set({anymha.__all__!r}) <= set(dir(anymha))\n"
        "assert anymha.errors.AnymhaError is anymha.AnymhaError\n"
        "from anymha import *\n"
        f"assert set({anymha.__all__!r}) <= set(globals())\n"
        "anymha.theano\n"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    message = "AttributeError: module 'anymha' has no attribute 'theano'"
    assert result.stderr.splitlines()[-1] == message, result.stderr
    assert set(anymha.__all__) == {*anymha.public.__all__, "__version__"}


def test_anymha_works_where_there_is_no_framework():
    statement = (
        "import numpy as np, anymha\n"
        "layer = anymha.MultiHeadAttention(2, 4, backend='numpy')\n"
        "assert layer(np.ones((1, 3, 8), 'float32')).shape == (1, 3, 8)"
    )
    assert loaded_by(statement, *FRAMEWORKS) == set()


@pytest.mark.parametrize(
    ("package", "framework"),
    [("anymha_numpy", None), ("anymha_torch", "torch"), ("anymha_jax", "jax")],
)
def test_backend_imports_its_own_framework_alone(package, framework):
    if framework is not None:
        needs(framework)
    assert loaded_by(f"import {package}") == ({framework} if framework else set())


def test_a_layer_by_name_imports_its_own_framework_alone():
    needs("torch")
    made = "import anymha; anymha.MultiHeadAttention(2, 4, backend='torch', query_features=8)"
    assert loaded_by(made) == {"torch"}


def test_tensorflow_backend_adds_nothing_to_what_tensorflow_imports():
    """TensorFlow imports Keras by itself where it is installed, and Keras what it finds."""
    needs("tensorflow")
    assert loaded_by("import anymha_tensorflow") == loaded_by("import tensorflow")


def test_tensorflow_backend_works_without_keras():
    needs("tensorflow")
    statement = (
        "import anymha_tensorflow, tensorflow as tf\n"
        "layer = anymha_tensorflow.MultiHeadAttention(2, 4)\n"
        "assert tuple(layer(tf.ones((1, 3, 8))).shape) == (1, 3, 8)"
    )
    assert loaded_by(statement, "keras", "torch", "jax", "flax") == {"tensorflow"}
