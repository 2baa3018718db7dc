"""`anymha.save` and `anymha.load`: every layer in every framework bit for bit, or a clear error."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import anymha
from anymha.errors import ArgumentError, ConfigError, FileError, WeightsError
from anymha.framework.registry import get_backend
from tests.conftest import BACKENDS, usable
from tests.file_samples import same, write
from tests.frameworks import required

OPTIONS: dict[str, Any] = {
    "num_heads": 4, "key_dim": 3, "value_dim": 5, "num_key_value_heads": 2, "dropout": 0.1,
    "query_features": 8, "value_features": 6, "output_shape": (2, 3), "sliding_window": 4,
    "scale": 0.3, "kernel_regularizer": "l2", "use_bias": ("query", "value", "output"), "seed": 1,
}  # fmt: skip
LAYERS = (
    "flax",
    "equinox",
)  # Keras's are in tests/keras_checks.py: importing Keras fixes a backend


def make(name: str, **options: Any) -> Any:
    if name in BACKENDS:
        usable(name)
    else:
        required(name)
        usable("jax")
    return anymha.MultiHeadAttention(**{**OPTIONS, **options}, backend=name)


@pytest.mark.parametrize("name", [*BACKENDS, *LAYERS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_layer_comes_back_bit_for_bit(tmp_path: Path, name: str, dtype: str) -> None:
    layer = make(name, dtype=dtype)
    anymha.save(tmp_path / "layer.safetensors", layer)
    found = anymha.load(tmp_path / "layer.safetensors", backend=name)
    assert type(found) is type(layer)
    assert found.config.to_dict() | {"seed": None} == anymha.convert(
        layer, to=name
    ).config.to_dict() | {"seed": None}
    before, after = anymha.get_weights(layer), anymha.get_weights(found)
    assert list(before) == list(after)
    assert all(same(array, after[key]) for key, array in before.items())
    assert after["query.kernel"].dtype.name == dtype


def test_layer_of_one_framework_is_loaded_in_all(tmp_path: Path, installed: Any) -> None:
    path = str(tmp_path / "layer.safetensors")
    layer = make("numpy")
    anymha.save(path, layer)
    for backend in installed:
        found = anymha.get_weights(anymha.load(path, backend=backend.name))
        assert all(same(array, found[key]) for key, array in layer.weights.items())


def test_torch_is_the_framework_where_none_is_named(tmp_path: Path) -> None:
    torch = required("torch")
    anymha.save(tmp_path / "a.safetensors", make("numpy"))
    assert isinstance(anymha.load(tmp_path / "a.safetensors"), torch.nn.Module)


def test_dtype_of_the_weights_counts_not_that_of_the_options(tmp_path: Path) -> None:
    layer = make("torch").double()
    anymha.save(tmp_path / "a.safetensors", layer)
    assert anymha.load(tmp_path / "a.safetensors", "numpy").weights["query.kernel"].dtype == "f8"


def test_not_finite_weights_are_kept(tmp_path: Path) -> None:
    layer = make("numpy")
    layer.weights["query.bias"][:] = np.nan
    layer.weights["value.bias"].view(np.uint32)[:] = 0x7FC12345  # NaN with a payload
    anymha.save(tmp_path / "a.safetensors", layer)
    found = anymha.load(tmp_path / "a.safetensors", "numpy").weights
    assert all(same(array, found[key]) for key, array in layer.weights.items())


def test_file_is_safetensors_with_the_config_as_json(tmp_path: Path) -> None:
    anymha.save(tmp_path / "a.safetensors", make("numpy"))
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert "query.kernel" in file.keys()  # noqa: SIM118
        held = json.loads(file.metadata()["anymha"])
    assert held["format"] == 1
    assert held["layers"][""]["sliding_window"] == 4


def refused(call: Any, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def test_layer_that_cannot_be_saved_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    layer = make("numpy", kernel_initializer=lambda shape, dtype: np.ones(shape, dtype))
    told = refused(lambda: anymha.save(path, layer), ConfigError)
    assert told.startswith("`kernel_initializer` must be a name, a config dict or an object that ")
    unbuilt = anymha.MultiHeadAttention(2, 3, backend="numpy")
    assert "no weights yet" in refused(lambda: anymha.save(path, unbuilt), WeightsError)
    refused(lambda: anymha.save(path, 1.5), ArgumentError)
    told = refused(lambda: anymha.save(tmp_path / "a.npz", make("numpy")), FileError)
    assert told == f"`path` must end with '.safetensors'. Received: '{tmp_path}/a.npz'."
    assert list(tmp_path.iterdir()) == []


CONFIG = anymha.AttentionConfig(2, 3, query_features=4).to_dict()
WEIGHTS = {
    name: np.ones(shape, np.float32)
    for name, shape in anymha.AttentionConfig(2, 3, query_features=4).weight_shapes().items()
}


def file(folder: Path, weights: Any = None, entry: Any = None, **metadata: str) -> Path:
    held = {"anymha": json.dumps({"format": 1, "layers": {"": CONFIG}} if entry is None else entry)}
    return write(folder / "a.safetensors", weights or WEIGHTS, metadata or held)


def test_file_by_hand_is_read(tmp_path: Path) -> None:
    assert anymha.load(file(tmp_path), "numpy").config.key_dim == 3


def layers(**options: Any) -> dict[str, Any]:
    return {"format": 1, "layers": {"": {**CONFIG, **options}}}


BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "of another library": ({"format": "pt"}, FileError, "was not written by anymha: its metadata"),
    "no JSON": ({"anymha": "{"}, FileError, "its entry 'anymha' cannot be read ("),
    "deep": ({"anymha": "[" * 10**5}, FileError, "its entry 'anymha' cannot be read ("),
    "newer": ({"entry": {"format": 2, "layers": {}}}, FileError,
              "has the format 2, and this anymha reads 1. Install a later anymha."),
    "no format": ({"entry": {"layers": {}}}, FileError, "cannot be read ('format')"),
    "other form": ({"entry": {"format": 1, "layers": [1]}}, FileError, "cannot be read ("),
    "other layer": ({"entry": {"format": 1, "layers": {"a.": CONFIG}}}, FileError,
                    "holds no layer with the prefix ''. Pass `prefix` as one of: 'a.'."),
    "number beyond all": ({"entry": layers(scale=10**400)}, FileError, "cannot be read (int too"),
    "unknown option": ({"entry": layers(heads=3)}, ConfigError, "Unknown options: heads."),
    "bad option": ({"entry": layers(dropout=2)}, ConfigError, "`dropout` must be a number in"),
    "missing": ({"weights": {n: a for n, a in WEIGHTS.items() if n != "key.bias"}}, FileError,
                "Missing: key.bias. Unknown: none."),
    "unknown": ({"weights": {**WEIGHTS, "gate": np.ones(2)}}, FileError,
                "Missing: none. Unknown: gate."),
    "shape": ({"weights": {**WEIGHTS, "key.bias": np.ones((3, 2), "f4")}}, FileError,
              "`key.bias` must be float32 of shape (2, 3). Received: float32 of shape (3, 2)."),
    "dtype": ({"weights": {**WEIGHTS, "key.bias": np.ones((2, 3), "i4")}}, FileError,
              "`key.bias` must be float32 of shape (2, 3). Received: int32 of shape (2, 3)."),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_told(tmp_path: Path, case: str) -> None:
    options, error, told = BROKEN[case]
    path = file(tmp_path, **options)
    text = refused(lambda: anymha.load(path, "numpy"), error)
    assert told in text
    assert text.startswith(str(path))


OPTION_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(
    st.integers() | st.text(), max_size=3
) | st.dictionaries(st.sampled_from(["class_name", "config"]), st.text() | st.none())  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(CONFIG)), value=OPTION_VALUES)
def test_any_value_of_an_option_is_taken_or_refused(tmp_path: Path, name: str, value: Any) -> None:
    """And never with another error than one of anymha."""
    path = file(tmp_path, entry=layers(**{name: value}))
    with suppress(anymha.AnymhaError):
        found = anymha.load(path, "numpy")
        assert all(same(found.weights[key], array) for key, array in WEIGHTS.items())


def test_other_files_are_told(tmp_path: Path) -> None:
    missing = tmp_path / "a.safetensors"
    told = refused(lambda: anymha.load(missing, "numpy"), FileError)
    assert told == f"{missing} cannot be read: there is no such file."
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    told = refused(lambda: anymha.load(tmp_path / "a.npz", "numpy"), FileError)
    assert told.startswith("`path` must end with '.safetensors'.")
    refused(lambda: anymha.load(missing, "theano"), anymha.errors.UnknownBackendError)


def test_backend_that_cannot_hold_the_dtype_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Keras on JAX, which holds float32 where float64 was asked for."""
    anymha.save(tmp_path / "a.safetensors", make("numpy", dtype="float64"))
    kind = get_backend("numpy").layer
    assign = kind._assigned

    def narrow(self: Any, values: Any) -> Any:
        assign(self, values)
        self.weights.update({name: array.astype("f4") for name, array in self.weights.items()})
        return self

    monkeypatch.setattr(kind, "_assigned", narrow)
    told = refused(
        lambda: anymha.load(tmp_path / "a.safetensors", "numpy"), anymha.errors.DtypeError
    )
    assert "has weights of float64, and the layer of 'numpy' can only hold float32" in told
