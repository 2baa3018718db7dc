"""Layers that `compare` is given by name, and what it says where it knows no weights for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError
from anymha.parity import assert_parity, compare, decoding
from tests.frameworks import required

X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)


@pytest.fixture
def layer() -> Any:
    return anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)


def test_a_backend_by_name_gets_the_weights_of_the_other(layer: Any) -> None:
    assert compare("numpy", layer, X).passed
    assert_parity(layer, "numpy", X, use_causal_mask=True)
    assert compare("numpy", decoding(layer), X).passed


def test_a_layer_of_a_library_by_name_gets_the_weights_of_the_other(layer: Any) -> None:
    required("torch")
    assert compare("torch.MultiheadAttention", layer, X).passed


def test_a_port_gets_a_cause_with_a_backend_by_name() -> None:
    torch = required("torch")

    class Port(torch.nn.Module):
        num_heads = 2

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Any) -> Any:
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            shares = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
            return self.o((shares @ v).transpose(1, 2).flatten(2))

    report = compare("numpy", Port(), X)
    assert "wrong scale" in str(report.diagnosis)
    assert "are read by the names of its layers, with 2 heads of 4" in report.to_text()


def refused(*pair: Any) -> str:
    with pytest.raises(ArgumentError) as error:
        compare(*pair, X)
    return str(error.value)


def test_names_without_weights_are_refused_with_what_to_do() -> None:
    assert "One of both must have weights for the other" in refused("numpy", "torch")
    assert "Received: 'numpi', which is none of them" in refused("numpi", lambda x: x)
    told = refused("numpy", lambda x: x)
    assert "Name the weights of the function with `declare(function, layer)`" in told


def test_the_declarations_that_fit_are_told() -> None:
    torch = required("torch")

    class Fused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return torch.tanh(self.proj(x))

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Fused()

        def forward(self, x: Any) -> Any:
            return self.attn(x)

    told = refused("numpy", Fused())
    assert "`declare(module, layout='timm.vit', num_heads=...)` (or fused.blocks, fused.g" in told
    assert "read where it says how many heads it has, as `num_heads`." in told
    module = Wrapped()
    module.num_heads = 2
    told = refused("numpy", module)
    state = "module.get_submodule('attn').state_dict()"
    assert f"`declare(module, {state}, layout='timm.vit', num_heads=2)`" in told
    assert "its layers' names mean one thing, or one mistake" in told


def test_layers_of_keras_that_are_not_built_are_told() -> None:
    keras = required("keras")

    class Own(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.query = keras.layers.Dense(8)

        def call(self, x: Any) -> Any:
            return self.query(x)

    assert refused("numpy", Own()).endswith("Call it once, `layer(x)`, where it is made.")
    assert refused("numpy", keras.layers.MultiHeadAttention(2, 4)).endswith(
        "Call it once, or build it."
    )


def test_modules_of_linen_without_parameters_are_told() -> None:
    nn = required("flax.linen")

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(8, name="query")(x)

    assert "A module of linen holds no parameters. Give `mod" in refused("numpy", Own())
    with pytest.raises(Exception, match="unbound") as error:
        compare(lambda x: x, lambda x: Own()(x), X)
    assert any("Give `module.bind(variables)`, with" in note for note in error.value.__notes__)


def test_a_module_of_equinox_for_one_example_is_told_of_vmap() -> None:
    eqx, jax = required("equinox"), required("jax")

    class Own(eqx.Module):
        query: Any

        def __call__(self, x: Any) -> Any:
            length, width = x.shape
            return jax.vmap(self.query)(x.reshape(length, width))

    module = Own(eqx.nn.Linear(8, 8, key=jax.random.key(0)))
    hint = "If a module of Equinox takes one example alone, give `jax.vmap(module)`."
    for port in (module, lambda x: module(x)):
        with pytest.raises(ValueError, match="too many values") as error:
            compare(lambda x: x, port, X)
        assert hint in error.value.__notes__
    assert compare(jax.vmap(module), jax.vmap(module), X).passed


def test_an_exit_is_an_error_of_the_call(layer: Any) -> None:
    def exits(x: Any, cache: Any = None) -> Any:
        raise SystemExit(0)

    for port in (exits, decoding(exits)):
        with pytest.raises(RuntimeError, match=r"The code raised SystemExit\(0\)") as error:
            compare(layer, port, X)
        assert "as the candidate was called" in error.value.__notes__[-1]
