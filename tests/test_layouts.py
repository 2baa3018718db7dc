"""Foreign layouts of weights: to the canonical form and back, bit for bit, or a clear error."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anymha.errors import ConfigError, UnknownLayoutError, WeightsError
from anymha.interchange.layouts import from_canonical, get_layout, layouts, to_canonical
from anymha.layer import multi_head_attention
from anymha.registry import get_backend

BERT = "transformers.bert"
NAMES = {"query": "self.query", "key": "self.key", "value": "self.value", "output": "output.dense"}
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def draw_arrays(
    sizes: dict[str, int], biased: tuple[str, ...] = tuple(NAMES), dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """The arrays of a BERT layer with those sizes."""
    rng = np.random.default_rng(0)
    h, k, d, v = (sizes[name] for name in ("heads", "shared", "key_dim", "value_dim"))
    widths = {
        "query": (h * d, sizes["query"]),
        "key": (k * d, sizes["key"]),
        "value": (k * v, sizes["value"]),
        "output": (sizes["output"], h * v),
    }
    arrays = {}
    for projection, shape in widths.items():
        name = NAMES[projection]
        arrays[f"{name}.weight"] = rng.standard_normal(shape).astype(dtype)
        if projection in biased:
            arrays[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(dtype)
    return arrays


SIZES = {
    "heads": 4, "shared": 2, "key_dim": 3, "value_dim": 5, "query": 7, "key": 6, "value": 8,
    "output": 9,
}  # fmt: skip
sizes_drawn = st.fixed_dictionaries(
    {name: st.integers(1, 4) for name in SIZES} | {"groups": st.integers(1, 3)}
).map(lambda sizes: {**sizes, "heads": sizes["shared"] * sizes["groups"]})


@given(
    sizes=sizes_drawn,
    biased=st.sets(st.sampled_from(list(NAMES))),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_keeps_every_bit(sizes: dict[str, int], biased: set[str], dtype: Any) -> None:
    arrays = draw_arrays(sizes, tuple(biased), dtype)
    weights, config = to_canonical(
        arrays, BERT, num_heads=sizes["heads"], num_key_value_heads=sizes["shared"]
    )
    assert {name: w.shape for name, w in weights.items()} == config.weight_shapes()
    assert config.dtype == np.dtype(dtype).name
    for name in NAMES:
        assert (f"{name}.bias" in weights) == (name in biased)
    back = from_canonical(weights, BERT)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].flags.c_contiguous
        assert back[name].tobytes() == np.ascontiguousarray(array).tobytes()


@given(sizes=sizes_drawn, biased=st.sets(st.sampled_from(list(NAMES))))
def test_way_from_the_canonical_form_and_back_keeps_every_bit(
    sizes: dict[str, int], biased: set[str]
) -> None:
    heads = {"num_heads": sizes["heads"], "num_key_value_heads": sizes["shared"]}
    weights, _ = to_canonical(draw_arrays(sizes, tuple(biased)), BERT, **heads)
    back, _ = to_canonical(from_canonical(weights, BERT), BERT, **heads)
    assert set(back) == set(weights)
    for name, array in weights.items():
        assert np.array_equal(back[name], array)


def test_result_is_a_copy() -> None:
    arrays = draw_arrays(SIZES)
    weights, _ = to_canonical(arrays, BERT, num_heads=4, num_key_value_heads=2)
    back = from_canonical(weights, BERT)
    for array in arrays.values():
        assert not any(np.shares_memory(array, other) for other in weights.values())
    for array in back.values():
        assert not any(np.shares_memory(array, other) for other in weights.values())


def test_canonical_weights_mean_what_the_linear_layers_mean() -> None:
    sizes = {**SIZES, "key": 7, "value": 7}
    arrays = draw_arrays(sizes, dtype=np.float64)
    weights, config = to_canonical(arrays, BERT, num_heads=4, num_key_value_heads=2)
    x = np.random.default_rng(1).standard_normal((2, 6, 7))

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ arrays[f"{NAMES[name]}.weight"].T + arrays[f"{NAMES[name]}.bias"]

    q = linear("query", x).reshape(2, 6, 4, 3)
    k = linear("key", x).reshape(2, 6, 2, 3).repeat(2, axis=2)
    v = linear("value", x).reshape(2, 6, 2, 5).repeat(2, axis=2)
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(3)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    context = np.einsum("bhts,bshd->bthd", scores, v).reshape(2, 6, 20)
    got = multi_head_attention(get_backend("numpy").ops, config, weights, x)
    np.testing.assert_allclose(got, linear("output", context), rtol=0, atol=1e-12)


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


ALL = ", ".join(f"{name}.{part}" for name in NAMES.values() for part in ("weight", "bias"))


def test_missing_and_unknown_names_are_told_together() -> None:
    arrays = draw_arrays(SIZES)
    arrays["self.out.weight"] = arrays.pop("output.dense.weight")
    with pytest.raises(WeightsError) as error:
        to_canonical(arrays, BERT, num_heads=4)
    assert message(error) == (
        f"The layout has the names {ALL}. Missing: output.dense.weight. Unknown: self.out.weight."
    )


def test_canonical_names_that_are_missing_or_unknown_are_told() -> None:
    weights, _ = to_canonical(draw_arrays(SIZES), BERT, num_heads=4, num_key_value_heads=2)
    weights["values.kernel"] = weights.pop("value.kernel")
    with pytest.raises(WeightsError) as error:
        from_canonical(weights, BERT)
    assert message(error) == (
        "Canonical weights are query.kernel, key.kernel, value.kernel, output.kernel and their "
        "biases. Missing: value.kernel. Unknown: values.kernel."
    )


@pytest.mark.parametrize("heads", [5, 0, -2])
def test_heads_that_do_not_divide_are_told(heads: int) -> None:
    with pytest.raises(WeightsError) as error:
        to_canonical(draw_arrays(SIZES), BERT, num_heads=heads)
    assert message(error) == (
        f"`self.query.weight` must be a matrix whose rows are {heads} heads of equal size. "
        "Received: shape (12, 7)."
    )


def test_output_that_the_heads_do_not_divide_is_told() -> None:
    arrays = draw_arrays(SIZES)
    arrays["output.dense.weight"] = np.ones((9, 22), np.float32)
    with pytest.raises(WeightsError) as error:
        to_canonical(arrays, BERT, num_heads=4, num_key_value_heads=2)
    assert message(error) == (
        "`output.dense.weight` must be a matrix whose columns are 4 heads of equal size. "
        "Received: shape (9, 22)."
    )


@pytest.mark.parametrize("shape", [(12,), (12, 7, 1), ()])
def test_weight_that_is_no_matrix_is_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError) as error:
        to_canonical({**draw_arrays(SIZES), "self.query.weight": np.ones(shape)}, BERT, num_heads=4)
    assert message(error).endswith(f"Received: shape {shape}.")


@pytest.mark.parametrize("name", NAMES.values())
def test_bias_of_another_length_is_told(name: str) -> None:
    arrays = draw_arrays(SIZES)
    rows, columns = arrays[f"{name}.weight"].shape
    arrays[f"{name}.bias"] = np.ones((rows + 1,))
    with pytest.raises(WeightsError) as error:
        to_canonical(arrays, BERT, num_heads=4, num_key_value_heads=2)
    assert message(error) == (
        f"`{name}.bias` must have shape ({rows},), as `{name}.weight` has shape "
        f"({rows}, {columns}). Received: shape ({rows + 1},)."
    )


def test_layers_that_do_not_fit_one_another_are_told() -> None:
    arrays = {**draw_arrays(SIZES), "self.key.weight": np.ones((8, 6), np.float32)}
    arrays["self.key.bias"] = np.ones(8, np.float32)
    with pytest.raises(WeightsError) as error:
        to_canonical(arrays, BERT, num_heads=4, num_key_value_heads=2)
    assert message(error) == (
        "The layers do not fit one another: `key.kernel` has shape (6, 2, 4), "
        "the others need (6, 2, 3)."
    )


def test_heads_that_do_not_fit_key_heads_are_told() -> None:
    sizes = {**SIZES, "shared": 3}
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        to_canonical(draw_arrays(sizes), BERT, num_heads=4, num_key_value_heads=3)


def test_output_of_more_axes_is_told() -> None:
    weights, _ = to_canonical(draw_arrays(SIZES), BERT, num_heads=4, num_key_value_heads=2)
    weights["output.kernel"] = weights["output.kernel"].reshape(4, 5, 3, 3)
    with pytest.raises(WeightsError) as error:
        from_canonical(weights, BERT)
    assert message(error) == (
        "transformers.bert cannot hold these weights: its outputs are vectors. Received: "
        "`output.kernel` of shape (4, 5, 3, 3). Use 'keras.MultiHeadAttention', whose outputs may "
        "have more axes."
    )


def test_layout_that_is_not_known_is_told() -> None:
    for call in (
        lambda: to_canonical({}, "bert", num_heads=1),
        lambda: from_canonical({}, "bert"),
        lambda: get_layout("bert"),
    ):
        with pytest.raises(UnknownLayoutError) as error:
            call()
        listed = ", ".join(repr(name) for name in layouts())
        assert message(error) == f"`layout` must be one of {listed}. Received: 'bert'."
    assert BERT in layouts()
