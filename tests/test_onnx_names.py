"""The names that arrays had before they were exported to ONNX, as far as the graph tells them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anymha.interchange.detect import find_layers
from anymha.interchange.files.formats import open_file
from anymha.interchange.files.protobuf import MAX_FIELDS
from anymha.interchange.leftovers import remarks_on
from tests.file_samples import Arrays
from tests.fuzz.samples import field

D = 8
NAMES = ("self.query", "self.key", "self.value", "output.dense")
KINDS = {"f4": 1, "i8": 7}


def tensor(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(field(1, size) for size in array.shape)
    kind = field(2, KINDS[array.dtype.str[1:]])
    return dims + kind + field(8, name.encode()) + field(9, array.tobytes())


def node(operator: str, name: str, inputs: list[str], output: str, *attributes: bytes) -> bytes:
    content = b"".join(field(1, one.encode()) for one in inputs) + field(2, output.encode())
    content += field(3, name.encode()) + field(4, operator.encode())
    return field(1, content + b"".join(field(5, one) for one in attributes))


def linear(matrix: str, bias: str, output: str, name: str = "", turned: bool = False) -> bytes:
    """A linear layer, as torch's exporters write it."""
    terms = [bias, f"{output}_made"][:: -1 if turned else 1]
    return node("MatMul", name, ["x", matrix], f"{output}_made") + node("Add", "", terms, output)


def onnx(path: Path, nodes: bytes, arrays: Arrays) -> Path:
    tensors = b"".join(field(5, tensor(name, array)) for name, array in arrays.items())
    path.write_bytes(field(1, 8) + field(7, nodes + tensors))
    return path


def read(path: Path) -> Arrays:
    with open_file(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def weights(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {f"l.0.{name}.weight": rng.standard_normal((D, D)).astype("f4") for name in NAMES}


def test_matrices_have_the_names_of_their_nodes(tmp_path: Path) -> None:
    """Four equal biases are one array, and the file has the name of the first."""
    nodes, arrays, plain = b"", {}, weights()
    for number, (name, array) in enumerate(plain.items()):
        module = name.removesuffix(".weight")
        place = f"/{module.replace('.', '/').replace('l/0', 'l.0')}/MatMul"
        nodes += linear(f"onnx::MatMul_{number}", "l.0.self.query.bias", f"y{number}", place,
                        number % 2 == 0)  # fmt: skip
        arrays[f"onnx::MatMul_{number}"] = np.ascontiguousarray(array.T)
    arrays["l.0.self.query.bias"] = np.arange(D, dtype="f4")
    path = onnx(tmp_path / "a.onnx", nodes, arrays)
    found = read(path)
    assert {name: array.tolist() for name, array in found.items() if "weight" in name} == {
        name: array.tolist() for name, array in plain.items()
    }
    biases = {f"l.0.{name}.bias" for name in NAMES}
    assert set(found) == {*plain, *biases}
    assert all(found[name].tolist() == list(range(D)) for name in biases)
    (group,) = find_layers(path)
    assert (group.prefixes, group.fits[0].name) == (["l.0."], "transformers.bert")


def test_matrices_have_the_names_of_biases_that_no_other_node_has(tmp_path: Path) -> None:
    nodes, arrays = b"", {}
    for number, (name, array) in enumerate(weights().items()):
        bias = name.replace("weight", "bias")
        nodes += linear(f"val_{number}", bias, f"y{number}", f"node_MatMul_{number}")
        arrays |= {f"val_{number}": array.T.copy(), bias: np.full(D, number, "f4")}
    found = read(onnx(tmp_path / "a.onnx", nodes, arrays))
    assert all(np.array_equal(found[name], array) for name, array in weights().items())
    assert len(found) == 8


CASES = {
    "a bias of several": [("val_1", "q.bias", ""), ("val_2", "q.bias", "")],
    "no bias": [("val_1", "", "node_MatMul_1"), ("val_2", "", "")],
    "a contradiction": [("val_1", "k.bias", "/q/MatMul"), ("val_2", "", "")],
    "one matrix of two layers": [("val_1", "", "/q/MatMul"), ("val_1", "", "/k/MatMul")],
    "a second call": [("val_1", "", "/q/MatMul_1"), ("val_2", "", "/MatMul")],
    "names of others": [("other", "q.bias", "/q/MatMul"), ("val_2", "", "")],
    "a vector": [("val_3", "q.bias", "/q/MatMul")],
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_certain_keeps_its_new_name(tmp_path: Path, case: str) -> None:
    arrays = {"val_1": np.ones((D, D), "f4"), "val_2": np.ones((D, D), "f4"),
              "val_3": np.ones(D, "f4"), "other": np.ones((D, D), "f4"),
              "q.bias": np.ones(D, "f4"), "k.bias": np.ones(D, "f4")}  # fmt: skip
    nodes = b"".join(
        linear(matrix, bias, f"y{i}", name) for i, (matrix, bias, name) in enumerate(CASES[case])
    )
    path = onnx(tmp_path / "a.onnx", nodes, arrays)
    assert list(read(path)) == list(arrays)
    with open_file(path) as reader:
        assert "The exporter renamed 3 matrices (val_1, ...)" in remarks_on(reader.tensors)[0]


def test_a_matrix_of_two_calls_has_the_name_that_its_bias_confirms(tmp_path: Path) -> None:
    nodes = linear("val_1", "a.q.bias", "y0", "/a/q/MatMul")
    nodes += linear("val_1", "a.q.bias", "y1", "/a_1/q/MatMul")
    path = onnx(tmp_path / "a.onnx", nodes, {"val_1": np.ones((D, D), "f4"),
                                             "a.q.bias": np.ones(D, "f4")})  # fmt: skip
    assert set(read(path)) == {"a.q.weight", "a.q.bias"}


def test_a_bias_that_was_merged_has_its_name_where_the_weight_has(tmp_path: Path) -> None:
    arrays = {name: np.full((D, D), i, "f4") for i, name in enumerate(("q.weight", "k.weight"))}
    nodes = b"".join(node("Gemm", "", ["x", name, "q.bias"], f"y{name}") for name in arrays)
    found = read(onnx(tmp_path / "a.onnx", nodes, {**arrays, "q.bias": np.arange(D, dtype="f4")}))
    assert list(found) == ["q.weight", "k.weight", "q.bias", "k.bias"]
    assert np.array_equal(found["k.bias"], found["q.bias"])
    assert np.array_equal(found["k.weight"], arrays["k.weight"])


def test_values_of_constant_nodes_are_read(tmp_path: Path) -> None:
    values = {"l.0.w": np.arange(6, dtype="f4").reshape(2, 3), "b": np.ones(3, "f4"),
              "table": np.arange(4).reshape(2, 2), "shape": np.arange(3),
              "one": np.ones((), "f4")}  # fmt: skip
    nodes = b"".join(
        node("Constant", "", [], name, field(1, b"value") + field(5, tensor("", array)))
        for name, array in values.items()
    )
    found = read(onnx(tmp_path / "a.onnx", nodes, {"x": np.ones(2, "f4")}))
    assert set(found) == {"x", "l.0.w", "b", "table"}
    assert all(np.array_equal(found[name], values[name]) for name in set(found) - {"x"})


def test_arrays_of_a_graph_of_very_many_nodes_are_read(tmp_path: Path) -> None:
    """Their names stay as they are."""
    many = node("Relu", "", [], "x") * (MAX_FIELDS // 3)
    path = onnx(tmp_path / "a.onnx", many + linear("val_1", "q.bias", "y"),
                {"val_1": np.ones((D, D), "f4"), "q.bias": np.ones(D, "f4")})  # fmt: skip
    assert list(read(path)) == ["val_1", "q.bias"]
