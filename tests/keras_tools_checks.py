"""Keras's tools for `EinsumDense` act on the layer's projections as they do on any.

Run by `test_keras_layer.py` in a process of its own for each Keras backend that trains. On torch
each test runs on Keras's own layer, too, which shows that what it asks for is what Keras does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import anymha
from anymha.errors import AnymhaError, WeightsError
from anymha_keras import MultiHeadAttention

BACKEND = keras.config.backend()
Theirs = keras.layers.MultiHeadAttention
PROJECTIONS = ("query", "key", "value", "output")
# Keras's own call fails on JAX where `value_dim` is not `key_dim`.
HEADS, KEY_DIM, VALUE_DIM, WIDTH, RANK = 2, 3, 3, 8, 2

pytestmark = [
    # Keras's torch backend, when it makes NumPy arrays.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SUBJECTS = {"reference": None, "anymha": {}, "reproducible": {"compute_dtype": "float64"}}


OURS = [name for name in SUBJECTS if name != "reference"]
HERE = [*SUBJECTS] if BACKEND == "torch" else OURS


def in_turn(names: Iterable[Any]) -> list[tuple[str, Any]]:
    """Each subject and each name; where Keras compiles each model, with one of the others."""
    if BACKEND == "torch":
        return list(itertools.product(HERE, names))
    first = int(BACKEND == "tensorflow")  # what one leaves out, the other has
    return [(OURS[(place + first) % 2], name) for place, name in enumerate(names)]


# What trains for long: where Keras compiles each model, one of the subjects on each backend.
one_in_turn = pytest.mark.parametrize(
    "subject", HERE if BACKEND == "torch" else [OURS[int(BACKEND == "tensorflow")]]
)
other_in_turn = pytest.mark.parametrize(
    "subject", HERE if BACKEND == "torch" else [OURS[int(BACKEND != "tensorflow")]]
)


@pytest.fixture(params=HERE)
def subject(request) -> str:
    return request.param


@pytest.fixture(params=OURS)
def ours(request) -> str:
    return request.param


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def to_numpy(x: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(x))


def close(got: Any, want: Any, margin: float = 3e-5) -> None:
    got, want = to_numpy(got), to_numpy(want)
    assert got.shape == want.shape
    margin *= max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=0, atol=margin)


X = numbers(8, 5, WIDTH, seed=1)
WANTED = numbers(8, 5, 3, seed=2)


def randomised(layer: Any, seed: int = 3) -> Any:
    layer.set_weights(
        [0.3 * numbers(*w.shape, seed=seed + i) for i, w in enumerate(layer.get_weights())]
    )
    return layer


def attention(subject: str, seed: int = 3, **options: Any) -> Any:
    """Keras's layer or ours, built, with the same weights."""
    own = SUBJECTS[subject]
    cls = Theirs if own is None else MultiHeadAttention
    layer = cls(HEADS, KEY_DIM, VALUE_DIM, name="attention", **{**(own or {}), **options})
    layer.build(X.shape, X.shape)
    return randomised(layer, seed)


def dense(layer: Any, name: str) -> Any:
    return getattr(layer, f"{name}_dense")


def built_of(layer: Any) -> keras.Model:
    """A model that trains the layer, its other weights known."""
    inputs = keras.Input((5, WIDTH))
    head = keras.layers.Dense(3, name="head")
    model = keras.Model(inputs, head(layer(inputs, inputs)))
    head.set_weights([0.3 * numbers(WIDTH, 3), numbers(3)])
    return model


def fit(model: keras.Model, epochs: int = 2) -> list[float]:
    model.compile(keras.optimizers.SGD(0.05), "mse")
    history = model.fit(X, WANTED, epochs=epochs, batch_size=4, verbose=0, shuffle=False)
    losses = history.history["loss"]
    assert losses[-1] < losses[0]
    return losses


def shown(weights: Any) -> list[Any]:
    """Names without those of the model, so that two models' are the same."""
    return sorted((w.path.split("attention/")[-1], tuple(w.shape)) for w in weights)


def held(model: keras.Model) -> dict[str, np.ndarray]:
    return {w.path.split("attention/")[-1]: to_numpy(w) for w in model.weights}


def agree(model: keras.Model, wanted: keras.Model) -> None:
    mine, theirs = held(model), held(wanted)
    assert sorted(mine) == sorted(theirs)
    for name, value in theirs.items():
        close(mine[name], value)
    close(model(X), wanted(X))


def with_lora(layer: Any, *names: str) -> Any:
    """The layer with LoRA whose weights are not zero."""
    for index, name in enumerate(names or PROJECTIONS):
        one = dense(layer, name)
        one.enable_lora(RANK)
        for part, weight in enumerate((one.lora_kernel_a, one.lora_kernel_b)):
            weight.assign(0.3 * numbers(*weight.shape, seed=40 + 2 * index + part))
    return layer


def effective(layer: Any) -> dict[str, np.ndarray]:
    """What each projection multiplies and adds, by canonical name."""
    found = {}
    for name in PROJECTIONS:
        found[f"{name}.kernel"] = to_numpy(dense(layer, name).kernel)
        found[f"{name}.bias"] = to_numpy(dense(layer, name).bias)
    return found


# --- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subject", "names"), in_turn([("query",), PROJECTIONS]))
def test_lora_alone_is_trained(subject: str, names: tuple[str, ...]) -> None:
    models = [built_of(with_lora(attention(kind), *names)) for kind in (subject, "reference")]
    before = [held(model) for model in models]
    trainable = [shown(model.trainable_weights) for model in models]
    assert trainable[0] == trainable[1]
    plain = built_of(attention(subject))
    assert np.abs(to_numpy(models[0](X)) - to_numpy(plain(X))).max() > 1e-3
    losses = [fit(model) for model in models]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    agree(*models)
    after = held(models[0])
    changed = {name for name in after if np.abs(after[name] - before[0][name]).max() > 0}
    for name in names:
        path = "attention_output" if name == "output" else name
        assert f"{path}/kernel" not in changed
        assert {f"{path}/lora_kernel_a", f"{path}/lora_kernel_b"} <= changed
    assert changed <= {name for name, _ in trainable[0]}


@one_in_turn
def test_lora_by_fit_without_biases_trains_nothing_else(subject: str) -> None:
    model = built_of(with_lora(attention(subject, use_bias=False)))
    model.get_layer("head").trainable = False
    names = {name for name, _ in shown(model.trainable_weights)}
    assert len(names) == 8
    assert all("lora_kernel" in name for name in names)
    before = held(model)
    fit(model)
    after = held(model)
    assert {n for n in after if np.abs(after[n] - before[n]).max() > 0} == names


@other_in_turn
def test_lora_enabled_after_training_goes_on(subject: str) -> None:
    models = [built_of(attention(kind)) for kind in (subject, "reference")]
    for model in models:
        fit(model)
        with_lora(model.get_layer("attention"), "query", "output")
        fit(model)
    agree(*models)


def test_lora_in_half_precision(subject: str) -> None:
    if subject == "reproducible":
        pytest.skip("the reproducible mode computes in float64")
    models = [
        built_of(with_lora(attention(kind, dtype="mixed_bfloat16")))
        for kind in (subject, "reference")
    ]
    for model in models:
        fit(model)
    for name, value in held(models[1]).items():
        close(held(models[0])[name], value, 3e-2)
    close(keras.ops.cast(models[0](X), "float32"), keras.ops.cast(models[1](X), "float32"), 6e-2)


def test_weights_of_a_layer_with_lora_are_the_effective_ones(ours: str) -> None:
    layer = with_lora(attention(ours))
    weights = anymha.get_weights(layer)
    for name, value in effective(layer).items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-6, atol=1e-7)
    bare = effective(attention(ours))
    assert np.abs(weights["query.kernel"] - bare["query.kernel"]).max() > 1e-2
    close(anymha.convert(layer, to="numpy")(X), layer(X))


def test_weights_of_a_layer_with_lora_are_set_or_refused(ours: str) -> None:
    layer, wanted = with_lora(attention(ours), "query", "output"), attention(ours, seed=60)
    before, output = [to_numpy(w) for w in layer.weights], to_numpy(layer(X))
    try:
        anymha.set_weights(layer, anymha.get_weights(wanted))
    except AnymhaError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "query" in refused
        assert "lora" in refused.lower()
        for weight, value in zip(layer.weights, before, strict=True):
            np.testing.assert_array_equal(to_numpy(weight), value)
        np.testing.assert_array_equal(to_numpy(layer(X)), output)
        return
    close(layer(X), wanted(X))
    for name, value in anymha.get_weights(wanted).items():
        np.testing.assert_allclose(anymha.get_weights(layer)[name], value, rtol=0, atol=1e-6)


def test_file_of_a_layer_with_lora_holds_the_effective_weights(ours: str, tmp_path: Path) -> None:
    layer = with_lora(attention(ours))
    anymha.save(tmp_path / "layer.safetensors", layer)
    close(anymha.load(tmp_path / "layer.safetensors", backend="keras")(X), layer(X))


@one_in_turn
def test_model_with_lora_is_saved_and_loaded(subject: str, tmp_path: Path) -> None:
    model = built_of(with_lora(attention(subject)))
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")
    close(loaded(X), model(X))
    close(loaded.get_layer("attention").query_dense.kernel,
          model.get_layer("attention").query_dense.kernel)  # fmt: skip
    with_lora(loaded.get_layer("attention"))
    fit(loaded)


@other_in_turn
def test_weights_of_a_model_with_lora_go_into_another(subject: str, tmp_path: Path) -> None:
    model = built_of(with_lora(attention(subject)))
    fit(model)
    model.save_weights(tmp_path / "model.weights.h5")
    for target in (attention(subject, seed=50), with_lora(attention(subject, seed=50))):
        other = built_of(target)
        other.load_weights(tmp_path / "model.weights.h5")
        close(other(X), model(X))


def test_files_with_lora_go_to_keras_layer_and_back(ours: str, tmp_path: Path) -> None:
    model = built_of(with_lora(attention(ours)))
    model.save_weights(tmp_path / "ours.weights.h5")
    theirs = built_of(attention("reference", seed=50))
    theirs.load_weights(tmp_path / "ours.weights.h5")
    close(theirs(X), model(X))
    with_lora(theirs.get_layer("attention")).query_dense.lora_kernel_a.assign(
        numbers(WIDTH, HEADS, RANK, seed=80)
    )
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    back = built_of(attention(ours, seed=51))
    back.load_weights(tmp_path / "theirs.weights.h5")
    close(back(X), theirs(X))


# --- Other layers in a projection's place --------------------------------------------------------


class Factored(keras.layers.Layer):
    """A projection of low rank, which has nothing by the name of `kernel`."""

    def __init__(self, shape: tuple[int, ...], inner: int, **options: Any):
        super().__init__(**options)
        self.shape, self.inner = shape, inner

    def build(self, input_shape: Any) -> None:
        def given(seed: int) -> Any:
            return lambda shape, dtype=None: keras.ops.cast(0.5 * numbers(*shape, seed=seed), dtype)

        outputs = int(np.prod(self.shape))
        self.down = self.add_weight((self.inner, 2), given(5), name="down")
        self.up = self.add_weight((2, outputs), given(6), name="up")

    def call(self, inputs: Any) -> Any:
        batch = keras.ops.shape(inputs)[:2]
        flat: Any = keras.ops.reshape(inputs, (*batch, self.inner))
        projected = (
            flat @ keras.ops.cast(self.down, flat.dtype) @ keras.ops.cast(self.up, flat.dtype)
        )
        return keras.ops.reshape(projected, (*batch, *self.shape))


def replacing(base: Any, name: str) -> Any:
    """A subclass that makes another layer for one of its projections."""
    shapes = {
        "query": ((HEADS, KEY_DIM), WIDTH), "key": ((HEADS, KEY_DIM), WIDTH),
        "value": ((HEADS, VALUE_DIM), WIDTH), "output": ((WIDTH,), HEADS * VALUE_DIM),
    }  # fmt: skip

    class Replacing(base):
        def build(self, query_shape: Any, value_shape: Any = None, key_shape: Any = None) -> None:
            super().build(query_shape, value_shape or query_shape, key_shape)
            shape, inner = shapes[name]
            setattr(self, f"_{name}_dense", Factored(shape, inner, name="factored"))
            ends = (*query_shape[:-1], HEADS, VALUE_DIM) if name == "output" else query_shape
            dense(self, name).build(ends)

    return Replacing


# Keras keeps the weights of the sublayer that was replaced, which nothing trains then.
@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
@pytest.mark.parametrize(("subject", "name"), in_turn(PROJECTIONS))
def test_layer_in_a_projections_place_is_called_and_trained(subject: str, name: str) -> None:
    models = []
    for kind in (subject, "reference"):
        base = Theirs if kind == "reference" else MultiHeadAttention
        options = SUBJECTS[kind] or {}
        layer = replacing(base, name)(HEADS, KEY_DIM, VALUE_DIM, name="attention", **options)
        layer.build(X.shape, X.shape)
        for index, weight in enumerate(sorted(layer.weights, key=lambda w: w.path)):
            weight.assign(0.3 * numbers(*weight.shape, seed=index))
        models.append(built_of(layer))
    before = held(models[0])
    losses = [fit(model) for model in models]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    agree(*models)
    after = held(models[0])
    assert all(np.abs(after[n] - before[n]).max() > 0 for n in ("factored/down", "factored/up"))
    layer = models[0].get_layer("attention")
    if subject != "reference":
        with pytest.raises(AnymhaError) as caught:
            anymha.get_weights(layer)
        assert name in str(caught.value)


class Noisy(Factored):
    """A projection with a state: the seed of its dropout."""

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.dropout = keras.layers.Dropout(0.5, seed=3)

    def call(self, inputs: Any) -> Any:
        return super().call(self.dropout(inputs, training=True))


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
@one_in_turn
def test_layer_in_a_projections_place_keeps_its_state(subject: str) -> None:
    base: Any = Theirs if subject == "reference" else MultiHeadAttention

    class Replacing(base):
        def build(self, query_shape: Any, value_shape: Any = None, key_shape: Any = None) -> None:
            super().build(query_shape, value_shape or query_shape, key_shape)
            self._query_dense = Noisy((HEADS, KEY_DIM), WIDTH)
            self._query_dense.build(query_shape)

    layer = Replacing(HEADS, KEY_DIM, VALUE_DIM, **(SUBJECTS[subject] or {}))
    layer.build(X.shape, X.shape)
    model = built_of(layer)
    state = layer._query_dense.dropout.seed_generator.state
    before = to_numpy(state).copy()
    model.compile(keras.optimizers.SGD(0.05), "mse")
    losses = model.fit(X, WANTED, batch_size=4, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert (to_numpy(state) != before).any()


@pytest.mark.parametrize(("subject", "name"), in_turn(PROJECTIONS))
def test_call_in_the_instance_is_called(subject: str, name: str) -> None:
    outputs = []
    for kind in (subject, "reference"):
        layer = attention(kind)
        old = dense(layer, name).call
        dense(layer, name).call = lambda inputs, old=old: 1.5 * old(inputs) + 0.1
        outputs.append(to_numpy(layer(X, X)))
    close(*outputs)
    assert np.abs(outputs[0] - to_numpy(attention(subject)(X, X))).max() > 1e-4


def test_projection_gives_what_the_layer_computes(subject: str) -> None:
    layer = attention(subject)
    q, k, v = (to_numpy(dense(layer, n)(X)).astype("float64") for n in ("query", "key", "value"))
    logits = np.einsum("bthd,bshd->bhts", q, k) * KEY_DIM**-0.5
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    context = np.einsum("bhts,bshv->bthv", scores, v)
    close(dense(layer, "output")(context.astype("float32")), layer(X, X))


def test_each_projection_is_called_once(subject: str) -> None:
    layer, seen = attention(subject), []
    for name in PROJECTIONS:
        old = dense(layer, name).call

        def call(inputs: Any, old: Any = old, name: str = name) -> Any:
            output = old(inputs)
            seen.append((name, tuple(inputs.shape), tuple(output.shape)))
            return output

        dense(layer, name).call = call
    layer(X, X)
    assert sorted(seen) == [
        ("key", (8, 5, WIDTH), (8, 5, HEADS, KEY_DIM)),
        ("output", (8, 5, HEADS, VALUE_DIM), (8, 5, WIDTH)),
        ("query", (8, 5, WIDTH), (8, 5, HEADS, KEY_DIM)),
        ("value", (8, 5, WIDTH), (8, 5, HEADS, VALUE_DIM)),
    ]


# --- Other things that are done to a projection --------------------------------------------------


@pytest.mark.parametrize(("subject", "name"), in_turn(["query", "output"]))
def test_frozen_projection_stays(subject: str, name: str) -> None:
    models = []
    for kind in (subject, "reference"):
        layer = attention(kind)
        dense(layer, name).trainable = False
        models.append(built_of(layer))
        fit(models[-1])
    agree(*models)
    layer, start = models[0].get_layer("attention"), attention(subject)
    np.testing.assert_array_equal(*(to_numpy(dense(one, name).kernel) for one in (layer, start)))
    other = "query" if name == "value" else "value"
    assert np.abs(to_numpy(dense(layer, other).kernel - dense(start, other).kernel)).max() > 0


def test_losses_of_a_projection_count(subject: str) -> None:
    layer = attention(subject)
    plain = len(layer.losses)

    old = dense(layer, "value").call

    def call(inputs: Any) -> Any:
        output = old(inputs)
        dense(layer, "value").add_loss(keras.ops.mean(output))
        return output

    dense(layer, "value").call = call
    layer(X, X)
    assert len(layer.losses) == plain + 1


@pytest.mark.parametrize(("subject", "name"), in_turn(PROJECTIONS))
def test_activation_of_a_projection_acts(subject: str, name: str) -> None:
    outputs = []
    for kind in (subject, "reference"):
        layer = attention(kind)
        dense(layer, name).activation = keras.activations.tanh
        outputs.append(to_numpy(layer(X, X)))
        if kind != "reference":
            with pytest.raises(WeightsError, match="an activation of its own"):
                anymha.get_weights(layer)
    close(*outputs)
    assert np.abs(outputs[0] - to_numpy(attention(subject)(X, X))).max() > 1e-3


@pytest.mark.parametrize(("subject", "name"), in_turn(PROJECTIONS))
def test_activity_regularizer_of_a_projection_counts(subject: str, name: str) -> None:
    losses = []
    for kind in (subject, "reference"):
        layer = attention(kind)
        dense(layer, name).activity_regularizer = keras.regularizers.L2(0.1)
        layer(X, X)
        losses.append(sum(map(to_numpy, layer.losses)))
    close(*losses)
    assert losses[0] > 0.1


def hooked(kind: str, name: str, hook: str, seen: list[Any]) -> tuple[Any, Any]:
    """The output and the gradient of the input, where torch calls a hook on a projection."""
    torch: Any = pytest.importorskip("torch")
    layer, x = attention(kind), torch.tensor(X, requires_grad=True)

    def scaled(_: Any, *values: Any) -> Any:
        seen.append(name)
        last = values[-1] if hook == "register_forward_hook" else values[0]
        return tuple(1.5 * v for v in last) if isinstance(last, tuple) else 1.5 * last

    getattr(dense(layer, name), hook)(scaled)
    output = layer(x, x)
    output.square().sum().backward()
    return output.detach(), x.grad


@pytest.mark.skipif(BACKEND != "torch", reason="the hooks are torch's")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(
    "hook",
    ["register_forward_pre_hook", "register_forward_hook",
     "register_full_backward_pre_hook", "register_full_backward_hook"],
)  # fmt: skip
@pytest.mark.parametrize("name", PROJECTIONS)
def test_hook_of_torch_on_a_projection_acts(subject: str, name: str, hook: str) -> None:
    seen: list[Any] = []
    results = [hooked(kind, name, hook, seen) for kind in (subject, "reference")]
    assert seen == [name, name]
    for got, want in zip(*results, strict=True):
        close(got, want)
    plain = to_numpy(attention(subject)(X, X))
    assert (np.abs(to_numpy(results[0][0]) - plain).max() > 1e-3) == ("forward" in hook)


def test_dtype_policy_of_a_projection(subject: str) -> None:
    """Keras's layers may be given policies by their paths."""
    if subject == "reproducible":
        pytest.skip("a map of policies and `compute_dtype` do not go together")
    outputs = []
    for kind in (subject, "reference"):
        policies = keras.dtype_policies.DTypePolicyMap()
        policies["attention/query"] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
        layer = attention(kind, dtype=policies)
        assert dense(layer, "query").compute_dtype == "bfloat16"
        outputs.append(to_numpy(keras.ops.cast(layer(X, X), "float32")))
    close(*outputs, margin=2e-2)
