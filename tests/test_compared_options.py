"""Options that change results: weights of a layer that computes something else are refused."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ConfigError, LayoutError, WeightsError
from anymha.framework.registry import Backend
from anymha.interchange import compared_options, layouts, reading
from anymha.interchange.compared_options import (
    SAME_RESULTS,
    WEIGHTS_OPTIONS,
    changed_options,
    differing_options,
    result_options,
)
from anymha.interchange.forms import Need
from anymha.interchange.layouts import from_canonical, get_layout, to_canonical
from anymha.interchange.layouts.encoders import LAYOUTS as ENCODERS
from anymha.interchange.libraries import MAKERS
from anymha.interchange.model_needs import NormNeed, need_of
from anymha.interchange.weights import Weights
from anymha.options.config import AttentionConfig
from tests.layout_samples import SAMPLES, Size, by_name
from tests.peer_layers import need

FIELDS = tuple(field.name for field in dataclasses.fields(AttentionConfig))
BASE: dict[str, Any] = {"num_heads": 4, "key_dim": 4, "query_features": 8, "seed": 0}
VALUES: dict[str, tuple[Any, Any]] = {
    "num_heads": (4, 2),
    "key_dim": (4, 3),
    "value_dim": (4, 3),
    "dropout": (0.0, 0.5),
    "use_bias": (True, False),
    "output_shape": (8, 7),
    "attention_axes": (None, (2,)),
    "kernel_initializer": ("glorot_uniform", "ones"),
    "bias_initializer": ("zeros", "ones"),
    "kernel_regularizer": (None, "l2"),
    "bias_regularizer": (None, "l2"),
    "activity_regularizer": (None, "l2"),
    "kernel_constraint": (None, "non_neg"),
    "bias_constraint": (None, "non_neg"),
    "query_features": (8, 7),
    "value_features": (8, 7),
    "key_features": (8, 7),
    "num_key_value_heads": (4, 2),
    "sliding_window": (None, 3),
    "scale": (None, 0.25),
    "dropout_rng": ("portable", "native"),
    "dtype": ("float32", "float16"),
    "compute_dtype": (None, "float64"),
    "seed": (0, 1),
    "name": (None, "other"),
    "memory_budget": (None, 2**20),
}
"""Two values of each option; of one that is not listed, two are tried out."""
CANDIDATES = (None, False, True, 2.0, 3, "rms", "elementwise", {})


def two_values(name: str) -> tuple[Any, Any]:
    if name in VALUES:
        return VALUES[name]
    found: list[Any] = []
    for value in CANDIDATES:
        try:
            config = AttentionConfig(**{**BASE, name: value})
        except (ConfigError, TypeError):
            continue
        if getattr(config, name) not in found:
            found.append(getattr(config, name))
    assert len(found) >= 2, f"Add two values of {name!r} to VALUES."
    return found[0], found[1]


def make(backend: Backend, **options: Any) -> Any:
    return backend.layer(**{**BASE, **options})


def bits(weights: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in weights.items()}


@pytest.mark.parametrize("name", FIELDS)
def test_another_value_of_an_option_is_refused_if_it_changes_results(
    backend: Backend, name: str
) -> None:
    one, two = (make(backend, **{name: value}) for value in two_values(name))
    for target, source in ((one, two), (two, one)):
        weights = anymha.get_weights(source)
        if name in SAME_RESULTS:
            changed = anymha.set_weights(target, weights)
            assert set(anymha.get_weights(changed)) == set(weights)
            continue
        error = WeightsError if name in WEIGHTS_OPTIONS else LayoutError
        before = bits(anymha.get_weights(target))
        with pytest.raises(error) as caught:
            anymha.set_weights(target, weights)
        assert bits(anymha.get_weights(target)) == before
        if error is LayoutError:
            assert str(caught.value).count(f"{name}=") == 3
            assert "pass `dict(weights)`" in str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_the_same_value_of_an_option_is_taken(backend: Backend, name: str) -> None:
    for value in two_values(name):
        one, two = (make(backend, **{name: value, "seed": seed}) for seed in (1, 2))
        weights = anymha.get_weights(one)
        assert bits(anymha.get_weights(anymha.set_weights(two, weights))) == bits(weights)


def test_every_option_is_in_one_table() -> None:
    assert set(result_options()) == set(FIELDS) - set(WEIGHTS_OPTIONS) - set(SAME_RESULTS)
    assert not set(WEIGHTS_OPTIONS) & set(SAME_RESULTS)
    assert {"scale", "sliding_window", "attention_axes"} <= set(result_options())


def test_message_names_each_option_both_values_and_the_remedy(backend: Backend) -> None:
    source = make(backend, scale=1.0, sliding_window=3)
    target = make(backend)
    weights = anymha.get_weights(source)
    with pytest.raises(LayoutError) as caught:
        anymha.set_weights(target, weights)
    assert str(caught.value) == (
        "The weights are of a layer with sliding_window=3, scale=1.0; the layer has "
        "sliding_window=None, scale=0.5, and the results would differ. Make the layer with "
        "sliding_window=3, scale=1.0, or pass `dict(weights)` to set the arrays all the same."
    )
    changed = anymha.set_weights(target, dict(weights))
    assert bits(anymha.get_weights(changed)) == bits(weights)


SAME = {
    "scale": ({}, {"scale": 0.5}),
    "scale of float32": ({"scale": 0.3}, {"scale": float(np.float32(0.3))}),
    "heads": ({}, {"num_key_value_heads": 4}),
    "value heads": ({}, {"value_dim": 4}),
    "one axis": ({}, {"attention_axes": 1}),
    "one axis from the end": ({}, {"attention_axes": -2}),
    "two axes": ({}, {"attention_axes": (1, 2)}),
    "biases": ({}, {"use_bias": ("query", "key", "value", "output")}),
    "window wider than any sequence": ({}, {"sliding_window": 1 << 31}),
}


def test_windows_are_compared_exactly() -> None:
    configs = [AttentionConfig(**BASE, sliding_window=10_000_000 + more) for more in (0, 1)]
    assert differing_options(*configs) == ("sliding_window",)


@pytest.mark.parametrize(("one", "two"), SAME.values(), ids=SAME)
def test_none_equals_what_it_stands_for(one: dict[str, Any], two: dict[str, Any]) -> None:
    configs = AttentionConfig(**{**BASE, **one}), AttentionConfig(**{**BASE, **two})
    assert differing_options(*configs) == differing_options(*reversed(configs)) == ()


def test_weights_of_a_file_bring_their_options(tmp_path: Path, backend: Backend) -> None:
    path = tmp_path / "layer.safetensors"
    anymha.save(path, make(backend, sliding_window=3))
    weights = anymha.get_weights(anymha.load(path, backend.name))
    with pytest.raises(LayoutError, match="sliding_window=3"):
        anymha.set_weights(make(backend), weights)
    anymha.set_weights(make(backend, sliding_window=3), weights)


def test_weights_of_our_layers_can_be_copied() -> None:
    weights = anymha.get_weights(anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy"))
    other = copy.deepcopy(weights)
    assert isinstance(other, Weights)
    assert other.config == weights.config
    assert weights.layout == "anymha"
    assert weights.needs == weights.unknown == ()


def test_weights_are_a_pytree_of_jax() -> None:
    jax = need("jax")
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="jax")
    weights = anymha.get_weights(layer)
    doubled = jax.jit(lambda arrays: jax.tree.map(lambda array: 2 * array, arrays))(weights)
    assert type(doubled) is dict
    assert set(doubled) == set(weights)
    np.testing.assert_array_equal(doubled["query.kernel"], 2 * weights["query.kernel"])


def test_library_layer_takes_no_weights_of_other_options() -> None:
    torch = need("torch")
    layer = torch.nn.MultiheadAttention(16, 4)
    options = {"num_heads": 4, "key_dim": 4, "query_features": 16, "backend": "numpy"}
    with pytest.raises(LayoutError) as caught:
        anymha.set_weights(
            layer, anymha.get_weights(anymha.MultiHeadAttention(**options, sliding_window=3))
        )
    assert "the layer of torch.MultiheadAttention has sliding_window=None" in str(caught.value)
    same = anymha.get_weights(anymha.MultiHeadAttention(**options, attention_axes=1))
    assert bits(anymha.get_weights(anymha.set_weights(layer, same))) == bits(same)


@pytest.mark.parametrize("name", result_options())
@pytest.mark.parametrize("layout", [*MAKERS, *(sample.layout for sample in SAMPLES)])
def test_layout_refuses_an_option_that_its_layers_lack(layout: str, name: str) -> None:
    options = {"num_heads": 4, "key_dim": 4, "query_features": 16}
    if get_layout(layout).scale == 1.0:
        options["scale"] = 1.0
    options |= get_layout(layout).fixed or {}
    bias = layout not in ("transformers.whisper",) and not layout.startswith("x_")
    value = next(v for v in two_values(name) if v not in (None, False))
    orders = [getattr(need, "order", "") for need in get_layout(layout).needs]
    if name == "rotary" and "pairs" in orders:
        value = {"layout": "interleaved"}
    norm = need_of(get_layout(layout).needs, "query_key_norm")
    if name == "query_key_norm" and isinstance(norm, NormNeed):
        value = norm.norm
    config = AttentionConfig(**{**options, "use_bias": bias, name: value})
    plain = AttentionConfig(**options, use_bias=False)
    weights = {n: np.zeros(shape, np.float32) for n, shape in plain.weight_shapes().items()}
    extras = by_name(layout).extras(Size(H=4, K=4, d=4))
    extras = {n: np.zeros(shape, np.float32) for n, shape in extras.items()}
    known = get_layout(layout)
    if name in known.supported or "*" in known.supported or (
        name == "scale" and known.scale == "free"
    ):  # fmt: skip
        assert from_canonical(weights, layout, config=config, extras=extras)
        return
    told = "multiplies the logits" if name == "scale" else f"has no option for {name}="
    with pytest.raises(LayoutError, match=told):
        from_canonical(weights, layout, config=config, extras=extras)


@pytest.mark.parametrize("name", result_options())
@pytest.mark.parametrize("to", MAKERS)
def test_library_layer_has_the_option_or_is_not_made(to: str, name: str) -> None:
    need(MAKERS[to][1])
    value = next(v for v in two_values(name) if v not in (None, False))
    if name == "query_key_norm":
        value = "layer"
    options = {"num_heads": 4, "key_dim": 4, "query_features": 16, name: value}
    layer = anymha.MultiHeadAttention(**options, backend="numpy")
    if name not in get_layout(to).supported:
        with pytest.raises(LayoutError, match=rf"no option for {name}=|`{name}`"):
            anymha.convert(layer, to=to)
        return
    made = anymha.convert(layer, to=to)
    assert differing_options(anymha.get_weights(made).config, layer.config) == ()


@dataclass(frozen=True, kw_only=True)
class LaterConfig(AttentionConfig):
    """A config with an option of a later anymha."""

    tilt: float | None = None


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """That `AttentionConfig` has the option."""
    for module in (compared_options, reading):
        monkeypatch.setattr(module, "AttentionConfig", LaterConfig)


class LaterLayer:
    """A layer with that option."""

    def __init__(self, **options: Any) -> None:
        self.config = LaterConfig(2, 4, query_features=8, **options)
        plain = anymha.MultiHeadAttention(2, 4, query_features=8, seed=0, backend="numpy")
        self._weights = plain.canonical_weights()

    def canonical_weights(self) -> dict[str, np.ndarray]:
        return self._weights

    def with_canonical_weights(self, weights: Any) -> LaterLayer:
        self._weights = dict(weights)
        return self


def test_option_of_a_later_version_is_compared_without_a_change_here() -> None:
    weights = anymha.get_weights(LaterLayer(tilt=2.0))
    anymha.set_weights(LaterLayer(tilt=2.0), weights)
    with pytest.raises(LayoutError) as caught:
        anymha.set_weights(LaterLayer(), weights)
    assert str(caught.value) == (
        "The weights are of a layer with tilt=2.0; the layer has tilt=None, and the results would "
        "differ. Make the layer with tilt=2.0, or pass `dict(weights)` to set the arrays all the "
        "same."
    )
    plain = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
    with pytest.raises(LayoutError, match=r"a layer with tilt=2\.0; the layer has tilt=None"):
        anymha.set_weights(plain, weights)
    anymha.set_weights(plain, anymha.get_weights(LaterLayer()))


@pytest.mark.parametrize("to", MAKERS)
def test_option_of_a_later_version_is_refused_by_every_library(to: str) -> None:
    with pytest.raises(LayoutError, match=rf"A layer of {to} has no option for tilt=2\.0"):
        from_canonical(anymha.get_weights(LaterLayer(tilt=2.0)), to)
    assert changed_options(LaterConfig(2, 4, tilt=2.0)) == ("tilt",)


TILT = dataclasses.replace(
    ENCODERS[0],
    name="mine.tilted",
    needs=(Need("tilt", "a tilt of the logits", key="logit_tilt"), "a fan"),
)
ARRAYS = by_name("transformers.bert").arrays(Size())


def test_need_stays_in_words_while_there_is_no_such_option() -> None:
    weights, config = TILT.to_canonical(ARRAYS, num_heads=4)
    assert weights.needs == ("a tilt of the logits", "a fan")
    assert not hasattr(config, "tilt")
    assert TILT.from_canonical(weights).needs == weights.needs


@pytest.mark.usefixtures("later")
def test_need_is_an_option_once_there_is_one() -> None:
    weights, config = TILT.to_canonical(ARRAYS, num_heads=4, tilt=2.0)
    assert weights.needs == ("a fan",)
    assert weights.unknown == ()
    assert isinstance(config, LaterConfig)
    assert config.tilt == 2.0
    assert bits(TILT.from_canonical(weights)) == bits(ARRAYS)
    with pytest.raises(LayoutError, match=r"transformers\.bert has no option for tilt=2\.0"):
        from_canonical(weights, "transformers.bert")
    _, config = TILT.to_canonical(ARRAYS, num_heads=4, tilt=None)  # stated: it has none
    assert config.tilt is None


@pytest.mark.usefixtures("later")
def test_option_that_nothing_states_is_said_in_words_and_not_compared() -> None:
    weights, config = TILT.to_canonical(ARRAYS, num_heads=4)
    assert config.tilt is None
    assert weights.unknown == ("tilt",)
    assert weights.needs == (
        "a tilt of the logits (pass `tilt=...`, which is `logit_tilt` in the model's config.json)",
        "a fan",
    )
    compared_options.check_same_results(
        "the layer", dataclasses.replace(config, tilt=3.0), config, unknown=weights.unknown
    )


@pytest.mark.usefixtures("later")
def test_later_option_is_taken_by_to_canonical(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "get_layout", lambda name: TILT)
    weights, config = to_canonical(ARRAYS, "mine.tilted", num_heads=4, tilt=3.0)
    assert config.tilt == 3.0
    assert weights.needs == ("a fan",)


def test_scale_that_a_family_states_in_its_config_is_a_need_until_it_is_passed() -> None:
    sample = by_name("transformers.gemma3")
    arrays = sample.arrays(Size())
    weights, config = to_canonical(arrays, sample.layout)
    assert "scale" in weights.unknown
    (text,) = [one for one in weights.needs if "query_pre_attn_scalar" in one]
    assert text.endswith("(pass `scale=...`)")
    for scale in (0.25, None):
        weights, config = to_canonical(arrays, sample.layout, scale=scale)
        assert config.scale == scale
        assert "scale" not in weights.unknown
        assert not any("query_pre_attn_scalar" in one for one in weights.needs)


def test_weights_without_a_stated_option_go_into_any_layer() -> None:
    arrays = by_name("transformers.gemma2").arrays(Size(), False)
    weights, config = to_canonical(
        arrays, "transformers.gemma2", num_heads=4, num_key_value_heads=2
    )
    assert "scale" in weights.unknown
    options = {**config.to_dict(), "scale": 0.25}
    layer = anymha.set_weights(anymha.MultiHeadAttention(**options, backend="numpy"), weights)
    assert bits(anymha.get_weights(layer)) == bits(weights)
    weights, _ = to_canonical(arrays, "transformers.gemma2", num_heads=4, scale=0.5)
    with pytest.raises(LayoutError, match=r"scale=0\.5"):
        anymha.set_weights(layer, weights)


def test_gemma_2_needs_a_softcap_in_words_or_as_an_option() -> None:
    arrays = by_name("transformers.gemma2").arrays(Size())
    weights, _ = to_canonical(arrays, "transformers.gemma2", num_heads=4)
    assert any("tanh" in one for one in weights.needs)
    if "softcap" in result_options():
        assert any("`attn_logit_softcapping`" in one for one in weights.needs)
        weights, config = to_canonical(
            arrays, "transformers.gemma2", num_heads=4, scale=None, softcap=50.0
        )
        assert config.softcap == 50.0
        assert not any("tanh" in one for one in weights.needs)
