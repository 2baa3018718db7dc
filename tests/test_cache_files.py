"""Caches and memories carried from framework to framework, and in files."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.cli.main import main
from anymha.errors import AnymhaError, FileError
from anymha.framework.registry import Backend, get_backend
from anymha.interchange.anymha_files import ENTRY
from anymha.interchange.files.formats import create_file, open_file
from anymha.interchange.files.reader import Tensor
from tests.conftest import BACKENDS, usable
from tests.pairs import pairs
from tests.support import normal
from tests.test_cache import calling

LENGTH, WIDTH = 6, 8
X = normal((2, LENGTH, WIDTH), "x").astype("float32")
EXACT = {"compute_dtype": "float64"}
RING = {"sliding_window": 3, "rotary": True}


def make(backend: str = "numpy", **options: Any) -> Any:
    sizes = {"num_heads": 4, "key_dim": 4, "query_features": WIDTH, "seed": 0}
    return anymha.MultiHeadAttention(**sizes, **options, backend=backend)


def parts(value: Any) -> dict[str, Any]:
    """All that a cache or a memory consists of, arrays of NumPy."""
    found = {name: getattr(value, name) for name in (*type(value).ARRAYS, *type(value).STATIC)}
    arrays = {n: x for n, x in found.items() if n in type(value).ARRAYS and x is not None}
    from_any = anymha.framework.registry.as_numpy
    return found | {n: np.asarray(from_any(x)) for n, x in arrays.items()}


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    for (name, one), other in zip(parts(found).items(), parts(wanted).values(), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, name


def started(backend: str, **options: Any) -> tuple[Any, Any]:
    """A layer, and a cache that has read 4 positions of X, packed."""
    layer = make(backend, **options)
    ids = layer.ops.from_numpy(np.array([[0, 0, 1, 1]] * 2, "int32"))
    x = layer.ops.from_numpy(X[:, :4])
    _, cache = layer(x, cache=layer.make_cache(2, LENGTH), segment_ids=ids)
    return layer, cache


def goes_on(layer: Any, cache: Any) -> np.ndarray:
    ids = layer.ops.from_numpy(np.array([[1, 1]] * 2, "int32"))
    call = calling(get_backend(layer.ops.name), layer)
    output, _ = call(layer.ops.from_numpy(X[:, 4:]), cache=cache, segment_ids=ids)
    return np.asarray(layer.ops.to_numpy(output))


@pytest.mark.parametrize("options", [EXACT, {**EXACT, **RING}], ids=["whole", "ring"])
def test_a_cache_goes_on_in_another_framework_bit_for_bit(
    backend: Backend, options: dict[str, Any]
) -> None:
    layer, cache = started("numpy", **options)
    expected = goes_on(layer, cache)
    there = anymha.convert(layer, to=backend.name)
    carried = anymha.convert(cache, to=backend.name)
    assert_same(carried, cache)
    np.testing.assert_array_equal(goes_on(there, carried), expected)
    back = anymha.convert(carried, to="numpy")
    assert_same(back, cache)
    np.testing.assert_array_equal(goes_on(layer, back), expected)


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize(
    ("backend", "dtype", "options"),
    pairs(backend=BACKENDS, dtype=["float16", "bfloat16", "float32"], options=[{}, RING]),
    indirect=["backend"],
)
def test_a_saved_cache_is_loaded_in_any_framework(
    backend: Backend, dtype: str, options: dict[str, Any], tmp_path: Path
) -> None:
    layer = make(backend.name, **options)
    x = layer.ops.from_numpy(X[:, :4])
    _, cache = layer(x, cache=layer.make_cache(2, LENGTH, dtype))
    path = tmp_path / "cache.safetensors"
    anymha.save(path, cache)
    for name in ("numpy", backend.name):
        loaded = anymha.load(path, backend=name)
        assert_same(loaded, cache)
        assert usable(name).ops.is_array(loaded.keys)
    loaded = anymha.load(path, backend=backend.name)
    wanted, _ = layer(layer.ops.from_numpy(X[:, 4:]), cache=cache)
    found, _ = layer(layer.ops.from_numpy(X[:, 4:]), cache=loaded)
    np.testing.assert_array_equal(layer.ops.to_numpy(found), layer.ops.to_numpy(wanted))


@pytest.mark.parametrize("home", ["flax", "equinox", "keras"])
def test_homes_whose_arrays_are_those_of_others(home: str) -> None:
    if importlib.util.find_spec(home) is None or importlib.util.find_spec("jax") is None:
        pytest.skip(f"{home} and jax are not installed")
    _, cache = started("numpy")
    assert_same(anymha.convert(cache, to=home), cache)


def test_a_carried_cache_has_arrays_of_its_own() -> None:
    layer, cache = started("numpy")
    carried = anymha.convert(cache, to="numpy")
    assert not np.shares_memory(carried.keys, cache.keys)
    expected = goes_on(layer, carried)
    goes_on(layer, cache)
    np.testing.assert_array_equal(goes_on(layer, carried), expected)


def test_memories(backend: Backend, tmp_path: Path) -> None:
    layer = make(backend.name, **RING)
    places = layer.ops.from_numpy(np.array([1, 3, 4, 7], "int32"))
    memory = layer.make_memory(layer.ops.from_numpy(X[:, :4]), key_positions=places)
    path = tmp_path / "memory.safetensors"
    anymha.save(path, memory)
    for kept in (anymha.load(path, backend=backend.name), anymha.convert(memory, "numpy")):
        assert_same(kept, memory)


def test_rows_that_have_overflowed_stay_so(tmp_path: Path) -> None:
    layer, cache = started("numpy")
    cache.overflowed = np.array([True, False])
    anymha.save(tmp_path / "cache.safetensors", cache)
    loaded = anymha.load(tmp_path / "cache.safetensors", backend="numpy")
    assert np.isnan(goes_on(layer, loaded)[0]).all()


def test_a_file_with_a_cache_has_no_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cache.safetensors"
    anymha.save(path, started("numpy")[1])
    assert main(["inspect", str(path)]) == 0
    assert "a cache or a memory, which `anymha.load` reads" in capsys.readouterr().out
    other = str(tmp_path / "other.safetensors")
    assert main(["convert", str(path), other, "--from", "anymha", "--to", "anymha"]) != 0
    with pytest.raises(AnymhaError, match=r"converted as it is.*Received: other arguments"):
        anymha.convert(started("numpy")[1], to="numpy", num_heads=2)


def changed(path: Path, entry: dict[str, Any], arrays: dict[str, Any]) -> Path:
    """A file with a cache, some of its entry and of its arrays changed; None takes one away."""
    anymha.save(path, started("numpy", **RING)[1])
    with open_file(path) as reader:
        known = json.loads(reader.metadata[ENTRY]) | entry
        tensors = {name: reader.read(name) for name in reader.tensors} | arrays
    tensors = {name: x for name, x in tensors.items() if x is not None}
    other = pathlib.Path(path.parent / "changed.safetensors")
    shapes = {name: Tensor(x.shape, x.dtype) for name, x in tensors.items()}
    with create_file(other, shapes, {ENTRY: json.dumps(known)}) as writer:
        for name, x in tensors.items():
            writer.write(name, x)
    return other


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an unknown kind": ({"kind": "model"}, {}, "no known kind"),
    "a kind that is no name": ({"kind": [1]}, {}, "no known kind"),
    "another part": ({"depth": 1}, {}, "other parts"),
    "another array": ({}, {"weights": np.zeros(2, "float32")}, "other parts"),
    "no keys": ({}, {"keys": None}, "has not the arrays"),
    "a ring without starts": ({}, {"starts": None}, "has not the arrays"),
    "starts without a ring": ({"window": None}, {}, "has not the arrays"),
    "flat keys": ({}, {"keys": np.zeros((2, 3), "float32")}, "do not have shapes"),
    "values of other rows": (
        {}, {"values": np.zeros((1, 4, 3, 4), "float32")}, "do not have shapes",
    ),
    "keys of integers": ({}, {"keys": np.zeros((2, 4, 3, 4), "int32")}, "`keys` has dtype"),
    "two dtypes": (
        {}, {"values": np.zeros((2, 4, 3, 4), ml_dtypes.bfloat16)}, "`values` has dtype",
    ),
    "lengths of another batch": ({}, {"lengths": np.zeros(3, "int32")}, "`lengths` has"),
    "wide lengths": ({}, {"lengths": np.zeros(2, "int64")}, "`lengths` has dtype int64"),
    "flags that are integers": ({}, {"overflowed": np.zeros(2, "int32")}, "`overflowed` has"),
    "ids that are floating": (
        {}, {"segment_ids": np.zeros((2, 3), "float32")}, "`segment_ids` has dtype",
    ),
    "a longer cache": ({"max_length": 3}, {}, "number of its slots"),
    "no number": ({"max_length": "6"}, {}, "number of its slots"),
    "a flag as a number": ({"max_length": True}, {}, "number of its slots"),
    "a wider window": ({"window": 4}, {}, "number of its slots"),
    "lengths past the end": ({}, {"lengths": np.array([4, 9], "int32")}, "lengths do not fit"),
    "lengths below zero": (
        {}, {"lengths": np.array([-1, 4], "int32"), "previous": np.array([-1, 0], "int32")},
        "lengths do not fit",
    ),
    "a past of more": ({}, {"previous": np.array([5, 0], "int32")}, "lengths do not fit"),
    "a ring that holds too much": ({}, {"starts": np.zeros(2, "int32")}, "lengths do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, tmp_path: Path) -> None:
    entry, arrays, message = BROKEN[name]
    path = changed(tmp_path / "cache.safetensors", entry, arrays)
    with pytest.raises(FileError, match=f"is broken: .*{message}"):
        anymha.load(path, backend="numpy")


def test_a_file_that_is_as_it_was(tmp_path: Path) -> None:
    path = changed(tmp_path / "cache.safetensors", {}, {})
    assert_same(anymha.load(path, backend="numpy"), started("numpy", **RING)[1])
