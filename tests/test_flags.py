"""Arguments that are True or False: what else is passed is refused before anything is computed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError
from anymha.framework.registry import BUILT_IN, LAYERS, get_layer
from anymha.layer.arguments import CALL_ARGUMENTS, Kind
from tests.frameworks import required
from tests.support import normal

FLAGS = [argument.name for argument in CALL_ARGUMENTS if argument.kind is Kind.FLAG]
HOMES = [backend.name for backend in (*BUILT_IN, *LAYERS) if backend.name != "keras"]
WRONG = ("False", "no", 2, 0.0, [True], np.ones((1, 3), bool))


def made(name: str, **options: Any) -> tuple[Any, Any, Any]:
    """A layer, its input, and what makes arrays of the framework."""
    if name != "numpy":
        required(name)
    backend = {"flax": "jax", "equinox": "jax"}.get(name, name)
    ops = next(each for each in BUILT_IN if each.name == backend).ops
    layer = get_layer(name)(2, 4, query_features=8, seed=0, **options)
    return layer, ops.from_numpy(normal((1, 3, 8), "x")), ops.from_numpy


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", HOMES)
def test_what_is_no_boolean_is_refused(name: str, dropout: float) -> None:
    layer, x, array = made(name, dropout=dropout)
    wrong = (*WRONG, array(np.ones((1, 3), bool)), x)
    for flag, value in itertools.product(FLAGS, wrong):
        with pytest.raises(ArgumentError, match=rf"^`{flag}` must be True or False. Received: "):
            layer(x, seed=1, **{flag: value})


@pytest.mark.parametrize("name", HOMES)
def test_booleans_of_numpy_and_0_and_1_are_booleans(name: str) -> None:
    layer, x, array = made(name, dropout=0.5)
    for flag in FLAGS:
        for no, yes in ((np.False_, np.True_), (0, 1), (False, array(np.True_))):
            assert _same(layer(x, seed=1, **{flag: no}), layer(x, seed=1, **{flag: False}))
            assert _same(layer(x, seed=1, **{flag: yes}), layer(x, seed=1, **{flag: True}))


def _same(one: Any, other: Any) -> bool:
    both = [x if isinstance(x, tuple) else (x,) for x in (one, other)]
    arrays = [[np.asarray(x.detach() if hasattr(x, "detach") else x) for x in xs] for xs in both]
    return len(both[0]) == len(both[1]) and all(map(np.array_equal, *arrays))


def test_keras_refuses_what_is_no_boolean() -> None:
    required("keras")
    layer = get_layer("keras")(2, 4, query_features=8)
    x = normal((1, 3, 8), "x")
    for flag in ("return_attention_scores", "use_causal_mask"):
        for value in ("False", 2):
            with pytest.raises(ArgumentError, match=f"`{flag}` must be True or False"):
                layer(x, **{flag: value})


def test_a_traced_boolean_is_refused_where_it_matters() -> None:
    jax = required("jax")
    layer, x, _ = made("jax", dropout=0.5)
    for flag in FLAGS:
        with pytest.raises(ArgumentError, match=f"`{flag}` must .* is traced"):
            jax.jit(lambda x, value, flag=flag: layer(x, seed=1, **{flag: value}))(x, True)
    layer, x, _ = made("jax")
    assert jax.jit(lambda x, value: layer(x, training=value))(x, True).shape == x.shape


@pytest.mark.parametrize(("name", "flag"), [("flax", "deterministic"), ("equinox", "inference")])
def test_the_modes_of_flax_and_equinox_are_booleans(name: str, flag: str) -> None:
    layer, x, _ = made(name)
    for value in ("no", 2, x):
        if name == "equinox" and value is x:
            continue  # it may be traced there, and does not matter without dropout
        with pytest.raises(ArgumentError, match=f"`{flag}` must be True or False"):
            layer(x, **{flag: value})


def test_flags_of_functions_and_caches_are_booleans() -> None:
    heads = np.ones((1, 3, 2, 4))
    for flag in ("is_causal", "return_scores", "return_lse"):
        for value in WRONG:
            with pytest.raises(ArgumentError, match=f"`{flag}` must be True or False"):
                anymha.dot_product_attention(heads, heads, heads, **{flag: value})
    with pytest.raises(ArgumentError, match="`donate` must be True or False"):
        made("numpy")[0].make_cache(1, 2, donate="no")
