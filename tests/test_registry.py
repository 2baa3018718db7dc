"""Backends by name and by array, and what is said where there is none."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types

import numpy as np
import pytest

import anymha
from anymha.errors import (
    AnymhaError,
    ArgumentError,
    BackendNotInstalledError,
    MixedBackendsError,
    UnknownBackendError,
)
from anymha.framework import registry
from anymha.framework.registry import Backend

BUILT_IN = ("numpy", "torch", "tensorflow", "jax")


@pytest.fixture
def clean():
    """No array type has been met and no plug-in asked before, nor is remembered after."""

    def forget():
        registry._NAMES.clear()
        registry._MET.clear()
        registry.backends.cache_clear()
        registry._plugged_in.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def plugged_in(clean, monkeypatch):
    """A backend of others by entry point: NumPy's functions, for arrays of a class of its own."""

    class Own(np.ndarray):
        pass

    Own.__module__ = "other_arrays.core"
    ops = types.ModuleType("anymha_other.ops")
    ops.__dict__.update(vars(registry.get_backend("numpy").ops), name="other")
    ops.array_modules, ops.framework = ("other_arrays",), "numpy"
    monkeypatch.setitem(sys.modules, "anymha_other", types.ModuleType("anymha_other"))
    monkeypatch.setitem(sys.modules, "anymha_other.ops", ops)
    real, group = importlib.metadata.entry_points, registry.ENTRY_POINTS
    point = importlib.metadata.EntryPoint("other", "anymha_other", group)
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda **asked: (point,) if asked == {"group": group} else real(**asked),
    )
    return Own


def test_layer_by_name(backend: Backend):
    layer = anymha.MultiHeadAttention(2, 4, backend=backend.name, query_features=8, seed=0)
    assert type(layer) is backend.layer
    assert type(layer).__name__ == "MultiHeadAttention"
    assert type(layer).__module__.startswith(f"anymha_{backend.name}")


def test_backend_of_an_array(backend: Backend):
    array = backend.ops.from_numpy(np.ones((2, 3), "float32"))
    assert registry.backend_of(array) is backend


def test_backend_of_a_numpy_scalar_and_a_subclass():
    class Own(np.ndarray):
        pass

    assert registry.backend_of(np.float32(1)).name == "numpy"
    assert registry.backend_of(np.ones(3).view(Own)).name == "numpy"


def test_backend_of_parameters_and_variables():
    torch = pytest.importorskip("torch")
    assert registry.backend_of(torch.nn.Parameter(torch.ones(1))).name == "torch"
    tf = pytest.importorskip("tensorflow")
    assert registry.backend_of(tf.Variable(1.0)).name == "tensorflow"


def test_backend_of_tracers(clean):
    jax = pytest.importorskip("jax")
    names = []
    jax.jit(lambda x: names.append(registry.backend_of(x).name) or x)(1.0)
    assert names == ["jax"]


def test_unknown_name_says_which_there_are():
    with pytest.raises(UnknownBackendError) as caught:
        anymha.MultiHeadAttention(2, 4, backend="nope")
    assert isinstance(caught.value, (AnymhaError, ValueError))
    assert str(caught.value).startswith("A backend is one of 'numpy', 'torch', 'tensorflow',")
    assert str(caught.value).endswith("Received: 'nope'.")


@pytest.mark.parametrize("name", ["torch", "tensorflow", "jax", "keras", "flax", "equinox"])
def test_import_of_a_home_without_its_framework_says_which_extra_brings_it(monkeypatch, name):
    if name in ("flax", "equinox"):
        pytest.importorskip("jax", reason="jax is not installed")
    package = f"anymha_{name}"
    for module in [one for one in sys.modules if one.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendNotInstalledError, match=rf"pip install 'anymha\[{name}\]'"):
        importlib.import_module(package)


@pytest.mark.parametrize("name", ["torch", "tensorflow", "jax"])
def test_missing_framework_says_which_extra_brings_it(monkeypatch, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *a: None if asked == name else real(asked, *a)
    )
    with pytest.raises(BackendNotInstalledError) as caught:
        anymha.MultiHeadAttention(2, 4, backend=name)
    assert isinstance(caught.value, ImportError)
    assert str(caught.value) == (
        f"The backend '{name}' needs {name}, which is not installed. "
        f"Install it with: pip install 'anymha[{name}]'."
    )


def test_array_of_no_backend_is_refused():
    with pytest.raises(ArgumentError, match=r"Expected an array of numpy, .*Received: builtins\.l"):
        registry.backend_of([1.0])


def test_arrays_of_two_frameworks_are_refused():
    torch = pytest.importorskip("torch")
    q = np.ones((1, 2, 1, 4), "float32")
    with pytest.raises(MixedBackendsError) as caught:
        anymha.dot_product_attention(q, torch.ones(1, 2, 1, 4), q)
    assert str(caught.value) == (
        "The arrays of one call must be of one framework. Received: `query` of numpy, `key` of "
        "torch, `value` of numpy. Convert them first."
    )


def test_backend_of_others_is_found_by_array_and_by_name(plugged_in):
    q = np.ones((1, 2, 1, 4), "float32").view(plugged_in)
    # Its arrays are NumPy's too, so that the built-in backend, asked first, takes them.
    assert registry.backend_of(q).name == "numpy"
    other = registry.get_backend("other")
    assert other.ops.name == "other"
    assert list(registry.backends()) == [*BUILT_IN, "other"]
    with pytest.raises(UnknownBackendError, match="has no native layer, only functions"):
        anymha.MultiHeadAttention(2, 4, backend="other")


def test_backend_of_others_is_found_by_the_type_of_its_arrays(plugged_in):
    class Foreign:
        pass

    Foreign.__module__ = "other_arrays.core"
    assert registry.backend_of(Foreign()).name == "other"
    with pytest.raises(UnknownBackendError, match=r"'jax', .*'other'\. Received: 'nope'"):
        registry.get_backend("nope")
