"""Real weights and inputs from files: what is read, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from anymha.errors import FileError, UsageError
from anymha.framework.registry import Backend
from anymha.parity.matrix.checkpoint import (
    CheckpointProblem,
    checkpoint_problems,
    read_inputs,
    tokens_of,
)
from anymha.parity.matrix.run import run
from anymha.parity.oracle.truth import expected

DATA = Path(__file__).parent / "data"
WEIGHTS, TEXT = DATA / "minilm_attention.safetensors", DATA / "minilm_text.npz"
BERT = "transformers.bert"
PARTS = ("self.query", "self.key", "self.value", "output.dense")
B, T, D, H = 2, 3, 8, 2


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def checkpoint(folder: Path, *prefixes: str, **changes: np.ndarray) -> Path:
    """A safetensors file with a small layer for each prefix."""
    arrays = {f"{start}{part}.weight": draw(D, D) for start in prefixes for part in PARTS}
    arrays |= {name.replace("__", "."): array for name, array in changes.items()}
    path = folder / "model.safetensors"
    save_file(arrays, path)
    return path


def good_inputs() -> dict[str, Any]:
    return {
        "hidden_states_0": draw(B, T, D),
        "padding_mask": np.array([[True, True, True], [True, True, False]]),
        "tokens": np.array([["a", "b", "c"], ["d", "e", "-"]]),
        "attention_output_0": draw(B, T, D).astype(np.float64),
        "attention_scores_0": draw(B, H, T, T),
    }


def inputs(folder: Path, **changes: Any) -> Path:
    """An .npz file with good inputs but for the changes; None takes one away."""
    arrays = {name: a for name, a in {**good_inputs(), **changes}.items() if a is not None}
    np.savez(folder / "text.npz", **arrays)
    return folder / "text.npz"


def read(path: Path, given: Path | None = None, **options: Any) -> list[CheckpointProblem]:
    arguments = {"layout": BERT, "num_heads": H, "prefix": None, **options}
    return list(checkpoint_problems(path, inputs=given, **arguments))


def test_each_layer_comes_in_three_modes() -> None:
    found = list(checkpoint_problems(WEIGHTS, BERT, 12, None, TEXT))
    modes = ("float32", "float64", "reproducible")
    wanted = [f"layer {n}, {mode}" for n in (0, 5) for mode in modes]
    assert [item.problem.case.name for item in found] == wanted
    assert found[0].layer == "encoder.layer.0.attention."
    for item in found:
        config = item.problem.case.config
        assert config.num_heads == 12
        assert config.key_dim == 32
        assert item.problem.inputs["query"].shape == (8, 33, 384)
        assert item.problem.masks["value_mask"].sum() == item.recorded.counts.sum() > 0  # type: ignore[union-attr]
    assert found[1].problem.weights["query.kernel"].dtype == np.float64
    assert found[2].problem.case.config.compute_dtype == "float64"


@pytest.mark.parametrize("layer", [0, 5])
def test_real_layer_is_what_the_reference_recorded(backend: Backend, layer: int) -> None:
    found = checkpoint_problems(WEIGHTS, BERT, 12, f"encoder.layer.{layer}.", TEXT)
    item = next(item for item in found if "float64" in item.problem.case.name)
    assert item.recorded is not None
    counts, recorded = item.recorded.counts, item.recorded.results["output"]
    got = run(backend, item.problem).forward["output"]
    assert np.max(np.abs(got - recorded)[counts]) < 1e-12
    assert np.max(np.abs(expected(item.problem).output - recorded)[counts]) < 1e-12


def test_prefix_chooses_layers(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "a.0.", "a.1.", "b.0.")
    assert {item.layer for item in read(path, prefix="a.")} == {"a.0.", "a.1."}
    assert {item.layer for item in read(path)} == {"a.0.", "a.1.", "b.0."}


def test_layers_are_named_by_number_or_by_prefix_where_numbers_repeat(tmp_path: Path) -> None:
    names = [item.problem.case.name for item in read(checkpoint(tmp_path, "a.3.", "a.12."))]
    assert {name.partition(",")[0] for name in names} == {"layer 3", "layer 12"}
    names = [item.problem.case.name for item in read(checkpoint(tmp_path, "a.0.", "b.0."))]
    assert {name.partition(",")[0] for name in names} == {"a.0", "b.0"}
    assert len(set(names)) == len(names)


def test_layer_without_prefix_is_found(tmp_path: Path) -> None:
    (item, *_) = read(checkpoint(tmp_path, ""))
    assert item.layer == ""
    assert item.problem.case.name == "layer 0, float32"


def test_inputs_are_drawn_alike_where_none_are_given(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "a.0.")
    one, other = read(path), read(path)
    assert one[0].recorded is None
    np.testing.assert_array_equal(one[0].problem.inputs["query"], other[0].problem.inputs["query"])
    np.testing.assert_array_equal(one[0].problem.inputs["query"], one[2].problem.inputs["query"])


def test_absent_biases_stay_absent(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "a.0.", a__0__self__query__bias=draw(D))
    config = read(path)[0].problem.case.config
    assert config.use_bias == ("query",)


def test_inputs_need_no_mask_tokens_or_records(tmp_path: Path) -> None:
    names = ("padding_mask", "tokens", "attention_output_0", "attention_scores_0")
    given = inputs(tmp_path, **dict.fromkeys(names))
    (item, *_) = read(checkpoint(tmp_path, "a.0."), given)
    assert item.recorded is None
    assert not item.problem.masks
    assert tokens_of(read_inputs(given)) == []


def test_tokens_are_those_that_are_not_padding(tmp_path: Path) -> None:
    assert tokens_of(read_inputs(inputs(tmp_path))) == [["a", "b", "c"], ["d", "e"]]


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises((UsageError, FileError)) as error:
        call()
    return str(error.value)


def test_files_that_are_missing_or_broken_are_told(tmp_path: Path) -> None:
    missing, broken = tmp_path / "missing.safetensors", tmp_path / "broken.safetensors"
    broken.write_bytes(b"no such thing, but some bytes")
    assert refused(lambda: read(missing)) == f"{missing} cannot be read: there is no such file."
    told = f"{broken} is not a safetensors file that can be read: "
    assert refused(lambda: read(broken)).startswith(told)
    assert refused(lambda: read_inputs(missing)) == (
        f"{missing} cannot be read: No such file or directory."
    )
    assert refused(lambda: read_inputs(broken)) == f"{broken} is not an .npz file."
    np.save(tmp_path / "one.npy", draw(2))
    assert refused(lambda: read_inputs(tmp_path / "one.npy")).endswith("is not an .npz file.")
    assert refused(lambda: read_inputs(tmp_path)) == f"{tmp_path} cannot be read: Is a directory."


def test_inputs_cut_short_or_damaged_are_told(tmp_path: Path) -> None:
    path = inputs(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refused(lambda: read_inputs(path)) == f"{path} is not an .npz file."
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    assert refused(lambda: read_inputs(path)).startswith(f"{path} cannot be read as an .npz file: ")


def test_inputs_of_python_objects_are_told(tmp_path: Path) -> None:
    path = inputs(tmp_path, tokens=np.array([["a", None, "c"], ["d", "e", {}]], dtype=object))
    assert refused(lambda: read_inputs(path)).startswith(f"{path} cannot be read as an .npz file: ")


def test_file_without_such_a_layer_is_told(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "a.0.")
    assert refused(lambda: read(path, prefix="b.")) == (
        f"{path} holds no layer whose names begin with 'b.'. Its layers begin with 'a.0.'."
    )
    save_file({"some.weight": draw(D, D), "other": draw(D)}, path)
    assert refused(lambda: read(path)) == (
        f"{path} holds no layer of the layout 'transformers.bert': none of its 2 names ends with "
        "'self.query.weight'. The first are: other, some.weight."
    )


def test_heads_that_do_not_divide_are_told_with_the_layer(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "a.0.")
    assert refused(lambda: read(path, num_heads=3)) == (
        f"{path}, layer 'a.0.': `self.query.weight` must be a matrix whose rows are 3 heads of "
        "equal size. Received: shape (8, 8)."
    )


def test_layer_that_lacks_a_weight_is_told(tmp_path: Path) -> None:
    arrays = {f"a.0.{part}.weight": draw(D, D) for part in PARTS[:3]}
    save_file(arrays, tmp_path / "model.safetensors")
    told = refused(lambda: read(tmp_path / "model.safetensors"))
    assert told.endswith("Missing: output.dense.weight. Unknown: none.")
    assert "layer 'a.0.'" in told


def test_inputs_of_another_layer_are_told(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "a.4.")
    held = ", ".join(good_inputs())
    assert refused(lambda: read(path, inputs(tmp_path))) == (
        f"The inputs hold no hidden_states_4 for the layer 'a.4.'. They hold: {held}."
    )


WRONG = {
    "`hidden_states_0` of the inputs must be floats of shape (2, 3, 8). Received: float32 of shape "
    "(2, 3, 6).": {"hidden_states_0": draw(B, T, 6)},
    "`hidden_states_0` of the inputs must be floats of shape (2, 3, 8). Received: int64 of shape "
    "(2, 3, 8).": {"hidden_states_0": np.ones((B, T, D), np.int64)},
    "`hidden_states_0` of the inputs must be floats of shape (2, 3, 8). Received: float32 of shape "
    "(8,).": {"hidden_states_0": draw(D)},
    "`hidden_states_0` of the inputs holds NaN or infinity.": {
        "hidden_states_0": np.full((B, T, D), np.nan)
    },
    "`attention_output_0` of the inputs must be floats of shape (2, 3, 8). Received: float32 of "
    "shape (3, 2, 8).": {"attention_output_0": draw(T, B, D)},
    "`attention_scores_0` of the inputs must be floats of shape (2, 2, 3, 3). Received: float32 of "
    "shape (2, 3, 3).": {"attention_scores_0": draw(B, T, T)},
    "`padding_mask` of the inputs must be booleans of shape (B, T), True = token. Received: int64 "
    "of shape (2, 3).": {"padding_mask": np.ones((B, T), np.int64)},
    "`padding_mask` of the inputs must be booleans of shape (B, T), True = token. Received: bool "
    "of shape (3,).": {"padding_mask": np.ones(T, bool)},
    "`tokens` of the inputs must have the shape of `padding_mask`, (2, 3). Received: shape "
    "(2, 4).": {"tokens": np.full((B, 4), "a")},
}


@pytest.mark.parametrize("told", WRONG)
def test_inputs_that_do_not_fit_are_told(tmp_path: Path, told: str) -> None:
    path = checkpoint(tmp_path, "a.0.")
    assert refused(lambda: read(path, inputs(tmp_path, **WRONG[told]))) == told
