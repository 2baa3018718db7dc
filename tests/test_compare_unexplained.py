"""What `compare` says where no cause is known: why none was tried, and what is random."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare
from tests.conftest import usable

RNG = np.random.default_rng(11)
X = RNG.standard_normal((2, 4, 8)).astype(np.float32)
LAYER = anymha.MultiHeadAttention(
    2, 4, query_features=8, backend="numpy", seed=0, dropout=0.3, bias_initializer="random_normal"
)


def own_module(factor: float = 1.0) -> Any:
    usable("torch")
    torch: Any = importlib.import_module("torch")

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.proj = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
            self.num_heads = 2

        def forward(self, x: Any) -> Any:
            q, k, v = (a.unflatten(-1, (2, 4)).transpose(1, 2) for a in self.qkv(x).chunk(3, -1))
            y = torch.nn.functional.scaled_dot_product_attention(factor * q, k, v)
            return self.proj(y.transpose(1, 2).flatten(2))

    return Own()


def test_nothing_tried_is_not_no_known_mistake_and_declare_is_offered() -> None:
    report = compare(own_module(2.0), own_module(), X)
    assert "neither side tells its weights" in str(report.diagnosis)
    assert "nor any two" not in report.to_text()
    assert "`declare(module, layout='timm.vit', num_heads=2)`" in report.to_text()
    named = anymha.parity.declare(own_module(), layout="timm.vit", num_heads=2)
    assert "wrong scale" in str(compare(named, own_module(2.0), X).diagnosis)


def test_a_module_of_unknown_weights_may_have_others_than_the_reference() -> None:
    own = own_module()
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
    said = compare(layer, own_module(2.0), X).to_text()
    assert "no known mistake" in said
    assert "`declare(module, layout='timm.vit', num_heads=2)`" in said
    assert "weights that differ would explain this" in said
    named = anymha.parity.declare(own, layout="timm.vit", num_heads=2)
    for candidate in (named, own):  # which is what attention of its weights gives
        assert "Their weights differ: query.kernel" in compare(layer, candidate, X).to_text()


def test_weights_are_declared_under_names_of_a_layout_that_the_module_does_not_have() -> None:
    own = own_module()
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias",
             "proj.weight": "out_proj.weight", "proj.bias": "out_proj.bias"}  # fmt: skip
    state = {names[name]: array for name, array in own.state_dict().items()}
    weights, config = anymha.to_canonical(state, "torch.MultiheadAttention", num_heads=2)
    layer = anymha.MultiHeadAttention(backend="numpy", **config.to_dict())
    anymha.set_weights(layer, weights)
    mine = anymha.parity.declare(own, state, "torch.MultiheadAttention", num_heads=2)
    report = compare(layer, mine, X)
    assert report.passed
    assert any("Own tells no such gradients" in note for note in report.notes)


def test_a_class_is_no_implementation() -> None:
    with pytest.raises(anymha.errors.ArgumentError, match="Make a layer of it, `MultiHead"):
        compare(LAYER, type(LAYER), X)


def test_output_of_another_shape_is_told() -> None:
    report = compare(LAYER, lambda query: LAYER(query).swapaxes(0, 1), X)
    assert str(report.diagnosis) == "time before batch in the output"
    report = compare(LAYER, lambda query: LAYER(query)[..., :3], X)
    assert "shape (2, 4, 3), not (2, 4, 8)" in str(report.diagnosis)


def test_a_reference_that_computes_more_is_told() -> None:
    strange = anymha.parity.declare(
        lambda query: np.sin(3 * LAYER(query)), anymha.get_weights(LAYER), "anymha"
    )
    report = compare(strange, lambda query: LAYER(query), X)
    assert "computes more than attention of its weights" in str(report.diagnosis)


def random(kind: str) -> Any:
    rng = np.random.default_rng(5)

    def port(query: Any) -> Any:
        if kind == "noise":
            return LAYER(query) + 0.01 * rng.standard_normal(query.shape).astype(np.float32)
        if kind == "tiny noise":
            return LAYER(query) + 2e-7 * rng.standard_normal(query.shape).astype(np.float32)
        if kind == "output":
            kept = rng.random(query.shape) < 0.8
            return LAYER(query) * kept.astype(np.float32) / np.float32(0.8)
        return LAYER(query, training=True, seed=int(rng.integers(1000)))

    return port


@pytest.mark.parametrize(
    ("kind", "stage", "name"),
    [
        ("noise", "output", "another result each time"),
        ("output", "output", "dropout of the output left on"),
        ("shares", "dropped_probabilities", "dropout left on"),
    ],
)
def test_sources_of_random_results_are_told_apart(kind: str, stage: str, name: str) -> None:
    report = compare(LAYER, random(kind), X)
    assert report.first_divergence == stage
    assert str(report.diagnosis).startswith(name)


def test_small_noise_is_noted_and_two_random_functions_are_told() -> None:
    report = compare(LAYER, random("tiny noise"), X)
    assert report.passed
    assert any("two calls gave results that differ" in note for note in report.notes)
    report = compare(random("noise"), random("noise"), X)
    assert str(report.diagnosis) == "both give another result each time"


def test_own_random_numbers_in_training_are_not_a_mistake_of_mode() -> None:
    rng = np.random.default_rng(5)

    def port(query: Any, training: bool = False) -> Any:
        return LAYER(query, training=training, seed=int(rng.integers(1000)))

    report = compare(LAYER, port, X, training=True, seed=3)
    assert str(report.diagnosis) == "dropout that draws random numbers of its own"


@pytest.mark.parametrize("argument", ["value_mask", "attention_mask"])
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_nan_in_padding_is_plain_attention(backend: str, argument: str) -> None:
    usable(backend)
    seen = np.arange(4) < [[4], [2]]
    query = np.where(seen[..., None], X, np.nan).astype(np.float32)
    mask = seen if argument == "value_mask" else np.repeat(seen[:, None], 4, 1)
    other = anymha.convert(LAYER, to=backend)
    if backend == "torch":
        other.eval()
    report = compare(LAYER, other, query, **{argument: mask})
    assert report.passed, report.to_text()
    assert not any("is not plain attention" in note for note in report.notes)


def test_what_the_reference_alone_does_is_left_out_in_the_candidate() -> None:
    weights = anymha.get_weights(LAYER)

    def turned(x: np.ndarray) -> np.ndarray:
        angle = np.arange(x.shape[1])[:, None, None] / 10_000 ** (np.arange(2) / 2)
        one, two = x[..., :2], x[..., 2:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    def rotary(query: np.ndarray) -> np.ndarray:
        q, k, v = (
            np.einsum("btd,dhk->bthk", query, weights[f"{name}.kernel"]) + weights[f"{name}.bias"]
            for name in ("query", "key", "value")
        )
        logits = np.einsum("bthk,bshk->bhts", turned(q), turned(k)) / 2
        shares = np.exp(logits)
        context = np.einsum("bhts,bshk->bthk", shares / shares.sum(-1, keepdims=True), v)
        output = np.einsum("bthv,hvo->bto", context, weights["output.kernel"])
        return (output + weights["output.bias"]).astype(query.dtype)

    port = anymha.parity.declare(rotary, weights, "anymha")
    report = compare(port, lambda query: LAYER(query), X)
    (cause,) = report.diagnosis.causes if report.diagnosis else ()
    assert cause.name == "rotary left out"
    assert "the candidate ignores it" in cause.fix


def test_weights_that_one_side_does_not_tell_are_named_where_the_results_agree() -> None:
    layer = anymha.MultiHeadAttention(
        2, 4, query_features=8, backend="numpy", seed=0, query_key_norm="rms"
    )
    known = dict(anymha.get_weights(layer))
    known["query_norm.scale"] = known["query_norm.scale"] * 1.5
    layer = anymha.set_weights(layer, known)
    some = {name: array for name, array in known.items() if "_norm" not in name}
    port = anymha.parity.declare(lambda x: layer(x), some, "anymha")
    told = compare(layer, port, X).to_text()
    assert "does not tell query_norm.scale, key_norm.scale" in told
    assert "`query_key_norm`" in told
    assert "no known mistake" not in told
    assert "Give both the same" not in told
    wrong = anymha.parity.declare(lambda x: 2 * layer(x), some, "anymha")
    assert "does not tell" not in str(compare(layer, wrong, X).diagnosis)
