"""Calls of ever new lengths are computed by programs of a few lengths, and mean the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import get_backend
from anymha.layer import varying
from anymha.layer.varying import FEW, OFTEN, Varying, longer
from tests.frameworks import required
from tests.support import normal

pytestmark = pytest.mark.usefixtures("quick_programs")

jax: Any = required("jax")
jnp: Any = jax.numpy

OPTIONS = {"num_heads": 4, "key_dim": 4, "query_features": 16, "seed": 0}
LENGTHS = ((11, 11), (1, 7), (20, 33), (7, 3))


def padding(keys: int) -> np.ndarray:
    return np.arange(keys) < np.array([[keys], [max(1, keys // 2)]])


def some(*shape: int) -> np.ndarray:
    return normal(shape, "some") > -0.3


CALLS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "open": lambda t, s: {},
    "causal": lambda t, s: {"use_causal_mask": True},
    "offset": lambda t, s: {"use_causal_mask": True, "query_offset": 2},
    "offsets": lambda t, s: {"use_causal_mask": True, "query_offset": np.array([0, 3])},
    "padding": lambda t, s: {"value_mask": padding(s), "query_mask": padding(t)},
    "keys": lambda t, s: {"key_mask": padding(s), "return_attention_scores": True},
    "mask": lambda t, s: {"attention_mask": some(t, s)},
    "mask of queries": lambda t, s: {"attention_mask": some(2, t, 1)},
    "mask of heads": lambda t, s: {"attention_mask": some(2, 4, t, s)},
    "bias": lambda t, s: {"attention_bias": normal((4, t, s), "bias")},
    "bias of keys": lambda t, s: {"attention_bias": normal((s,), "bias")},
    "scores": lambda t, s: {"return_attention_scores": True},
}


@pytest.fixture
def varying_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varying, "FEW", 0)  # all lengths vary from the first call on


@pytest.mark.usefixtures("varying_at_once")
@pytest.mark.parametrize(
    ("name", "option"),
    [
        *[(name, {}) for name in CALLS],
        ("open", {"sliding_window": 3, "num_key_value_heads": 2}),
        ("causal", {"sliding_window": 3}),
    ],
    ids=str,
)
def test_the_results_are_those_of_numpy(name: str, option: dict[str, Any]) -> None:
    ours = anymha.MultiHeadAttention(**OPTIONS, **option, backend="jax")
    other = anymha.MultiHeadAttention(**OPTIONS, **option, backend="numpy")
    for queries, keys in LENGTHS:
        inputs = [normal((2, queries, 16), "x"), normal((2, keys, 16), "y")]
        inputs = inputs[:1] if queries == keys else inputs
        call = CALLS[name](queries, keys)
        native = {k: jnp.asarray(x) if isinstance(x, np.ndarray) else x for k, x in call.items()}
        found, expected = ours(*map(jnp.asarray, inputs), **native), other(*inputs, **call)
        pairs = (
            zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        )
        for one, two in pairs:
            assert one.dtype == two.dtype
            np.testing.assert_allclose(np.asarray(one), two, atol=5e-6)


@pytest.fixture
def programs() -> Any:
    """The number of programs that JAX has compiled since the test began."""
    count = [0]

    def listener(event: str, seconds: float, **more: Any) -> None:
        count[0] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield lambda: count[0]
    jax._src.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.as_users_compile
def test_few_programs_serve_many_lengths(programs: Any) -> None:
    layer = anymha.MultiHeadAttention(**OPTIONS, backend="jax")
    for length in range(1, 33):
        x = jax.device_put(normal((2, length, 16), "x"))
        layer(x, value_mask=jax.device_put(padding(length)))
    assert programs() <= FEW + 32 // 8 + 2
    before = programs()
    for _ in range(OFTEN):
        x = jax.device_put(normal((2, 29, 16), "x"))
        layer(x, value_mask=jax.device_put(padding(29)))
    assert programs() == before + 1  # one of its own, since it is called often


def test_arrays_of_numpy_are_copied_without_a_program(programs: Any) -> None:
    ops = get_backend("jax").ops
    for length in (2, 3, 5, 64, 1021):
        x = normal((length, 16), "x")
        found, before = ops.from_numpy(x), x.copy()
        x += 1
        np.testing.assert_array_equal(np.asarray(found), before)
    layer = anymha.MultiHeadAttention(num_heads=3, key_dim=7, query_features=11, backend="jax")
    anymha.set_weights(layer, {n: np.asarray(w) for n, w in layer.weights.items()})
    assert programs() == 0


@pytest.mark.usefixtures("varying_at_once")
def test_gradients_of_the_weights_are_those_of_the_length() -> None:
    layer = anymha.MultiHeadAttention(**OPTIONS, backend="jax")
    x, mask = jnp.asarray(normal((2, 11, 16), "x")), jnp.asarray(padding(11))

    def loss(layer: Any) -> Any:
        return jnp.sum(layer(x, value_mask=mask) ** 2)

    # Where the whole is compiled, all arrays are traced, and no length is added to.
    found, expected = jax.grad(loss)(layer), jax.jit(jax.grad(loss))(layer)
    for one, two in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.usefixtures("varying_at_once")
def test_what_is_traced_keeps_its_length() -> None:
    layer = anymha.MultiHeadAttention(**OPTIONS, backend="jax")
    apply = jax.jit(lambda x: layer(x))
    for length in (5, 11):
        x = jnp.asarray(normal((2, length, 16), "x"))
        np.testing.assert_allclose(apply(x), layer(x), atol=2e-6)
        assert f"{length},16" in str(jax.make_jaxpr(apply)(x).out_avals[0])


@pytest.mark.as_users_compile
@pytest.mark.usefixtures("varying_at_once")
def test_dropout_and_its_bits_are_those_of_the_length() -> None:
    options = {**OPTIONS, "dropout": 0.5}
    layers = [anymha.MultiHeadAttention(**options, backend=name) for name in ("jax", "numpy")]
    for length in (5, 11):
        x = normal((2, length, 16), "x")
        found, expected = (
            np.asarray(layer(convert(x), training=True, seed=7))
            for layer, convert in zip(layers, (jnp.asarray, np.asarray), strict=True)
        )
        np.testing.assert_allclose(found, expected, atol=5e-6)


def test_longer_adds_at_most_an_eighth_or_eight() -> None:
    for length in range(2, 1025):
        assert length <= longer(length) < length + max(8, length / 8 + 1)
        assert longer(longer(length)) == longer(length)


@pytest.mark.as_users_compile
def test_lengths_that_are_called_often_get_a_program() -> None:
    seen = Varying()
    assert [seen.has_own((1, n, n)) for n in (3, 5, 6)] == [True] * FEW
    assert seen.has_own((1, 8, 8))
    assert [seen.has_own((1, 7, 7)) for _ in range(OFTEN)] == [False] * (OFTEN - 1) + [True]
    assert seen.has_own((1, 7, 7))
