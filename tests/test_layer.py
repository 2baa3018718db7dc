"""The layer's projections, options and dtypes, on every backend, against hand and oracle."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load_file

import anymha
from anymha.framework.capabilities import Capabilities
from anymha.framework.registry import Backend, get_backend
from anymha.interchange.layers import set_weights
from anymha.layer.forward import multi_head_attention as call_layer
from anymha.layer.plan import Plans
from anymha.parity.stages.structure import count_differing
from anymha.parity.stages.tolerance import tolerance
from tests.support import (
    Problem,
    Result,
    bits,
    check,
    longest_sum,
    make,
    native,
    normal,
    run,
    truth,
)

DATA = Path(__file__).parent / "data"
DTYPES = ("float16", "bfloat16", "float32", "float64")


@pytest.mark.usefixtures("quick_programs")
def test_by_hand_one_head_of_width_one(backend: Backend) -> None:
    # q = 2 * 1 + 1 = 3; k = 0, ln(3) / 3, so logits 0 and ln 3; scores 1/4, 3/4; v = 4, 8 -> 7.
    weights = {
        "query.kernel": [[[2.0]]], "query.bias": [[1.0]], "key.kernel": [[[1.0]]],
        "value.kernel": [[[4.0]]], "output.kernel": [[[10.0]]], "output.bias": [0.5],
    }  # fmt: skip
    arrays = {name: np.array(values) for name, values in weights.items()}
    config = anymha.AttentionConfig(1, 1, dtype="float64", use_bias=("query", "output"))
    x = native(
        backend.ops,
        {
            "query": np.array([[[1.0]]]),
            "value": np.array([[[1.0], [2.0]]]),
            "key": np.array([[[0.0], [math.log(3) / 3]]]),
        },
    )
    output, scores = anymha.multi_head_attention(
        native(backend.ops, arrays), **x, config=config, return_attention_scores=True
    )
    np.testing.assert_allclose(backend.ops.to_numpy(scores), [[[[0.25, 0.75]]]], rtol=1e-15)
    np.testing.assert_allclose(backend.ops.to_numpy(output), [[[70.5]]], rtol=1e-15)


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_self_attention_in_each_dtype(backend: Backend, dtype: str) -> None:
    check(backend, make(value=None, dtype=dtype))


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_separate_widths_in_each_dtype(backend: Backend, dtype: str) -> None:
    check(backend, make(dtype=dtype))


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("compute", ["float16", "bfloat16", "float64"])
def test_float32_weights_computed_in_another_dtype(backend: Backend, compute: str) -> None:
    check(backend, make(compute_dtype=compute))


@pytest.mark.usefixtures("quick_programs")
def test_float64_keeps_what_float32_cannot_hold(backend: Backend) -> None:
    # 2^-40 beside 1 is lost in float32 at any point of the way: input, scale, softmax or sum.
    problem = make(dtype="float64")
    nudged = problem.inputs["query"] * (1 + 2.0**-40)
    got = run(backend, problem.but(inputs={**problem.inputs, "query": nudged}), gradients=False)
    assert not np.array_equal(got.output, run(backend, problem, gradients=False).output)
    check(backend, problem.but(inputs={**problem.inputs, "query": nudged}))


OPTIONS: dict[str, dict[str, Any]] = {
    "value_dim": {"value_dim": 2},
    "output_shape 3": {"output_shape": 3},
    "output_shape (2, 3)": {"output_shape": (2, 3)},
    "output_shape (2, 1, 3)": {"output_shape": (2, 1, 3)},
    "output_shape ()": {"output_shape": ()},
    "two key heads": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1, "value_dim": 2},
    "scale": {"scale": 0.9},
    "negative scale": {"scale": -0.3},
    "no bias": {"use_bias": False},
    "no key bias": {"use_bias": ("query", "value", "output")},
    "output bias only": {"use_bias": ("output",), "output_shape": (2, 3)},
}


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option_agrees_with_oracle(backend: Backend, options: dict[str, Any]) -> None:
    check(backend, make(**options))


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_heads_are_repeated_heads(backend: Backend, heads: int) -> None:
    grouped = make(num_key_value_heads=heads, dtype="float64")
    repeats = 4 // heads
    weights = {
        name: np.repeat(array, repeats, axis=-2) if name[:3] in ("key", "val") else array
        for name, array in grouped.weights.items()
    }
    plain = make(dtype="float64").but(weights=weights)
    a, b = run(backend, grouped), run(backend, plain)
    np.testing.assert_allclose(a.output, b.output, rtol=1e-13, atol=1e-14)
    summed = b.gradients["key.kernel"].reshape(-1, heads, repeats, 3).sum(2)
    np.testing.assert_allclose(a.gradients["key.kernel"], summed, rtol=1e-12, atol=1e-13)


def test_absent_bias_equals_zero_bias_but_stays_absent(backend: Backend) -> None:
    lacking = make(use_bias=("query", "value", "output"))
    zero = make(use_bias=True)
    zero = zero.but(weights={**zero.weights, "key.bias": np.zeros((4, 3), np.float32)})
    a, b = run(backend, lacking), run(backend, zero)
    assert a.output.tobytes() == b.output.tobytes()
    assert "key.bias" not in a.gradients
    layer = set_weights(backend.layer(**lacking.config.to_dict()), lacking.weights)
    assert set(anymha.get_weights(layer)) == set(lacking.weights)


def test_function_takes_weights_that_lack_a_bias_of_the_config(backend: Backend) -> None:
    full = make()
    weights = {name: array for name, array in full.weights.items() if name != "value.bias"}
    check(backend, full.but(weights=weights))
    given = native(backend.ops, weights)
    inputs = native(backend.ops, full.inputs)
    got = anymha.multi_head_attention(given, **inputs, config=full.config)
    want = run(backend, full.but(weights=weights), gradients=False).output
    assert backend.ops.to_numpy(got).tobytes() == want.tobytes()


def test_value_defaults_to_query_and_key_to_value(backend: Backend) -> None:
    own = make(value=None)
    query = own.inputs["query"]
    spelled = own.but(inputs={"query": query, "value": query, "key": query})
    a, b = (run(backend, problem, gradients=False) for problem in (spelled, own))
    assert a.output.tobytes() == b.output.tobytes()
    cross = make(widths=(7, 6, 6))
    both = {name: cross.inputs[name] for name in ("query", "value")}
    check(backend, cross.but(inputs=both))


@pytest.mark.parametrize("kind", [list, tuple])
def test_list_in_the_first_place_is_query_value_key(backend: Backend, kind: type) -> None:
    problem = make(widths=(7, 7, 7), value=(2, 5))
    layer = set_weights(backend.layer(**problem.config.to_dict()), problem.weights)
    arrays = native(backend.ops, problem.inputs)
    query, value, key = (arrays[name] for name in ("query", "value", "key"))

    def same(a: Any, b: Any) -> bool:
        return backend.ops.to_numpy(a).tobytes() == backend.ops.to_numpy(b).tobytes()

    assert same(layer(kind([query])), layer(query))
    assert same(layer(kind([query, value])), layer(query, value))
    assert same(layer(kind([query, value, key])), layer(query, value, key))
    assert not same(layer(query, value, key), layer(query, key, value))


@pytest.mark.usefixtures("quick_programs")
def test_layer_is_its_function(backend: Backend) -> None:
    problem = make(num_key_value_heads=2, value_dim=2, output_shape=(2, 3))
    layer = set_weights(backend.layer(**problem.config.to_dict()), problem.weights)
    got = layer(**native(backend.ops, problem.inputs))
    want = run(backend, problem, gradients=False).output
    # Products of kernels that lie otherwise in memory may differ in the last bits.
    np.testing.assert_allclose(backend.ops.to_numpy(got), want, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("query", [(0, 5), (2, 0)], ids=["batch", "queries"])
def test_nothing_in_gives_nothing_out(backend: Backend, query: tuple[int, int]) -> None:
    masks = {"value_mask": np.ones((query[0], 6), bool), "query_mask": np.ones(query, bool)}
    problem = make(query=query, value=(query[0], 6)).calling(**masks, use_causal_mask=True)
    result = check(backend, problem, allowed=np.ones((1, 1, 1, 6), bool))
    assert result.output.shape == (*query, 7)


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("causal", [False, True])
def test_no_keys_act_as_all_masked(backend: Backend, causal: bool) -> None:
    problem = make(value=(2, 0)).calling(use_causal_mask=causal)
    result = check(backend, problem)
    assert (result.output == problem.weights["output.bias"]).all()


@pytest.mark.usefixtures("quick_programs")
def test_minilm_gives_what_the_reference_recorded(backend: Backend) -> None:
    tensors = load_file(DATA / "minilm_attention.safetensors")
    text = np.load(DATA / "minilm_text.npz")
    for number in (0, 5):
        at = f"encoder.layer.{number}.attention"
        weights = {}
        for name in ("query", "key", "value"):
            weights[f"{name}.kernel"] = tensors[f"{at}.self.{name}.weight"].T.reshape(384, 12, 32)
            weights[f"{name}.bias"] = tensors[f"{at}.self.{name}.bias"].reshape(12, 32)
        weights["output.kernel"] = tensors[f"{at}.output.dense.weight"].T.reshape(12, 32, 384)
        weights["output.bias"] = tensors[f"{at}.output.dense.bias"]
        layer = backend.layer(12, 32, dtype="float64", query_features=384)
        layer = set_weights(layer, {n: a.astype(np.float64) for n, a in weights.items()})
        x = text[f"hidden_states_{number}"].astype(np.float64)
        token = text["padding_mask"]
        output, scores = layer(
            backend.ops.from_numpy(x),
            value_mask=backend.ops.from_numpy(token),
            return_attention_scores=True,
        )
        error = np.abs(backend.ops.to_numpy(output) - text[f"attention_output_{number}"])
        assert error[token].max() <= 1e-12
        if number == 0:
            error = np.abs(backend.ops.to_numpy(scores) - text["attention_scores_0"])
            # Recorded in float32: half a unit in the last place of at most 1.
            assert error.transpose(0, 2, 1, 3)[token].max() <= np.finfo(np.float32).eps / 2


def _every_part(dtype: str, seed: int = 0) -> tuple[Problem, np.ndarray]:
    """A problem in which all matters at once, and what its masks allow."""
    mask = normal((2, 4, 5, 6), seed, "mask") > -0.7
    padding = np.arange(6) < np.array([[6], [4]])
    problem = make(
        seed=seed, num_key_value_heads=2, value_dim=2, output_shape=(2, 3), **_dtypes(dtype)
    ).calling(
        attention_mask=mask, value_mask=padding, use_causal_mask=True, query_offset=2,
        attention_bias=normal((4, 5, 6), seed, "bias"),
    )  # fmt: skip
    causal = np.arange(6)[None, :] <= np.arange(5)[:, None] + 2
    return problem, mask & padding[:, None, None, :] & causal


def _dtypes(name: str) -> dict[str, str]:
    if name == "reproducible":
        return {"dtype": "float32", "compute_dtype": "float64"}
    return {"dtype": name}


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", "float64"]
    + [pytest.param(n, marks=pytest.mark.as_users_compile) for n in ("bfloat16", "reproducible")],
)
def test_all_parts_at_once_agree_with_oracle(backend: Backend, dtype: str) -> None:
    problem, allowed = _every_part(dtype)
    check(backend, problem, allowed=allowed)


def _differing(results: list[Result]) -> tuple[int, int]:
    """How many elements of the results differ between some two of them, and of how many."""
    differing = compared = 0
    for name in results[-1].all:
        arrays = [result.all[name] for result in results if name in result.all]
        first = arrays[0]
        differing += sum(int((bits(first) != bits(other)).sum()) for other in arrays[1:])
        compared += first.size * (len(arrays) - 1)
    return differing, compared


@pytest.mark.parametrize("seed", range(3))
def test_reproducible_mode_is_equal_bit_for_bit(installed: list[Backend], seed: int) -> None:
    problem, _ = _every_part("reproducible", seed)
    results = [run(backend, problem) for backend in installed]
    assert _differing(results)[0] == 0


@pytest.mark.usefixtures("quick_programs")
def test_plain_float32_is_not_equal_bit_for_bit(installed: list[Backend]) -> None:
    # Or the comparison of the reproducible mode would show nothing.
    plain, _ = _every_part("float32")
    assert len(installed) < 2 or _differing([run(backend, plain) for backend in installed])[0]


def test_reproducible_mode_on_a_million_outputs(installed: list[Backend]) -> None:
    problem = make((32, 64), None, (512, 0, 0), num_heads=2, key_dim=8, compute_dtype="float64")
    problem = problem.calling(use_causal_mask=True)
    assert problem.d_output.size >= 1_000_000
    assert longest_sum(problem) >= 2048
    results = [run(backend, problem) for backend in installed]
    # Where the exact value lies half way between two numbers, it may be rounded to either.
    exact = truth(problem, allowed=np.tri(problem.d_output.shape[1], dtype=bool))
    wanted = {"output": exact.output, "scores": exact.scores, **exact.gradients}
    may = {
        name: tolerance("float64", longest_sum(problem), float(np.max(array)))
        for name, array in exact.magnitudes.items()
    }
    differing, ties, compared = count_differing([result.all for result in results], wanted, may)
    assert differing == ties <= compared / 400_000


@pytest.mark.parametrize("kind", [TypeError, AttributeError])
def test_error_of_a_backend_that_describes_an_array_is_not_swallowed(kind: type) -> None:
    def array_key(x: Any) -> Any:
        raise kind("of the backend itself")

    ops = SimpleNamespace(**vars(get_backend("numpy").ops))
    ops.capabilities = Capabilities(array_key=array_key)
    config = anymha.AttentionConfig(2, 4, query_features=8)
    weights = {name: np.ones(shape, "float32") for name, shape in config.weight_shapes().items()}
    x = np.ones((1, 3, 8), "float32")
    with pytest.raises(kind, match="of the backend itself"):
        call_layer(cast(Any, ops), config, weights, x, plans=Plans())
