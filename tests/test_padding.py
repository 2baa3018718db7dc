"""Padding whose values are known is left out; what a call means stays."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import Backend, get_layer
from anymha.layer import padding
from tests.conftest import usable
from tests.frameworks import required

B, T, S, D = 4, 7, 9, 8
RIGHT = np.arange(S) < np.array([[9], [9], [5], [6]])
MASKS = {
    "right": RIGHT,
    "left": RIGHT[:, ::-1].copy(),
    "none": np.ones((B, S), bool),
    "all": np.zeros((B, S), bool),
    "of one row": RIGHT & np.array([[True], [False], [True], [True]]),
    "the same in all rows": np.arange(S)[None].repeat(B, 0) < 4,
    "with holes": np.arange(B * S).reshape(B, S) % 3 > 0,
}
GROUPED = {"num_key_value_heads": 2}


@pytest.fixture(params=["numpy", "torch"])
def eager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A backend that takes the way of groups whatever the sizes are."""
    backend = usable(request.param)
    known: Any = backend.ops.capabilities.known_padding

    def always(mask: Any) -> Any:
        found = known(mask)
        return found if found is None or found[1] == np.inf else (found[0], 0.0)

    monkeypatch.setattr(padding, "LOOKED_AT", 0)
    capabilities = dataclasses.replace(backend.ops.capabilities, known_padding=always)
    monkeypatch.setattr(backend.ops, "capabilities", capabilities)
    if request.param == "torch":
        torch = required("torch")
        with torch.no_grad():
            yield backend
        return
    yield backend


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def called(backend: Backend, layer: Any, *inputs: np.ndarray, **call: Any) -> list[np.ndarray]:
    ops = backend.ops
    masks = {n: ops.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in call.items()}
    found = layer(*map(ops.from_numpy, inputs), **masks)
    return [ops.to_numpy(x) for x in (found if isinstance(found, tuple) else (found,))]


def explained(backend: Backend, layer: Any, *inputs: np.ndarray, **call: Any) -> str:
    ops = backend.ops
    masks = {n: ops.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in call.items()}
    return anymha.explain(layer, *map(ops.from_numpy, inputs), **masks)


@pytest.mark.parametrize("options", [{}, GROUPED, {"value_dim": 3}, {"sliding_window": 3}])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_results_are_those_of_a_mask_over_queries_and_keys(
    eager: Backend, name: str, causal: bool, options: dict[str, Any]
) -> None:
    layer: Any = get_layer(eager.name)(4, 5, query_features=D, value_features=6, seed=0, **options)
    query, value, mask = drawn(0, B, T, D), drawn(1, B, S, 6), MASKS[name]
    call = {"use_causal_mask": causal, "return_attention_scores": True}
    wide = np.broadcast_to(mask[:, None], (B, T, S)).copy()
    expected = called(eager, layer, query, value, attention_mask=wide, **call)
    for own in ("value_mask", "key_mask"):
        found = called(eager, layer, query, value, **{own: mask}, **call)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6)
        assert not found[1][np.broadcast_to(~mask[:, None, None], found[1].shape)].any()
        (alone,) = called(eager, layer, query, value, **{own: mask}, use_causal_mask=causal)
        assert np.array_equal(alone, found[0])  # with the scores or without


@pytest.mark.parametrize("name", ["right", "left", "of one row", "the same in all rows"])
def test_what_is_hidden_is_not_read(eager: Backend, name: str) -> None:
    layer: Any = get_layer(eager.name)(2, 4, query_features=D, seed=0)
    mask, x = MASKS[name], drawn(0, B, S, D)
    (expected,) = called(eager, layer, drawn(2, B, T, D), x, value_mask=mask)
    hostile = np.where(mask[..., None], x, np.nan).astype(np.float32)
    hostile[~mask, 0] = np.inf
    (found,) = called(eager, layer, drawn(2, B, T, D), hostile, value_mask=mask)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"rotary": True}, {"alibi": True}, {"softcap": 3.0}, {"sinks": True}, {"gate": "head"},
        {"query_key_norm": "rms"},
        {"rotary": True, "alibi": True, "sinks": True, "gate": "elementwise", "softcap": 3.0,
         "query_key_norm": "layer", "sliding_window": 4, "num_key_value_heads": 2},
    ],
    ids=lambda options: ", ".join(options),
)  # fmt: skip
@pytest.mark.parametrize("name", ["right", "left", "the same in all rows"])
def test_options_of_models(eager: Backend, options: dict[str, Any], name: str) -> None:
    layer: Any = get_layer(eager.name)(4, 8, query_features=D, seed=0, **options)
    anymha.set_weights(
        layer,
        {n: drawn(i, *np.shape(x)) for i, (n, x) in enumerate(anymha.get_weights(layer).items())},
    )
    x, mask = drawn(0, B, S, D), MASKS[name]
    wide = np.broadcast_to(mask[:, None], (B, S, S)).copy()
    call: dict[str, Any] = {"return_attention_scores": True, "use_causal_mask": name != "left"}
    expected = called(eager, layer, x, attention_mask=wide, **call)
    found = called(eager, layer, x, value_mask=mask, **call)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    taken = "sliding_window" not in options or name != "left"
    assert (padding.NOTE in explained(eager, layer, x, value_mask=mask, **call)) == taken
    again = called(eager, layer, x, value_mask=mask, **call)
    assert all(map(np.array_equal, again, found))


def test_keys_and_values_of_their_own(eager: Backend) -> None:
    layer: Any = get_layer(eager.name)(
        2, 4, query_features=D, value_features=6, key_features=7, seed=0
    )
    inputs = drawn(0, B, T, D), drawn(1, B, S, 6), drawn(2, B, S, 7)
    wide = np.broadcast_to(RIGHT[:, None], (B, T, S)).copy()
    (expected,) = called(eager, layer, *inputs, attention_mask=wide)
    (found,) = called(eager, layer, *inputs, value_mask=RIGHT)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_calls_that_repeat_have_equal_bits(eager: Backend) -> None:
    layer: Any = get_layer(eager.name)(2, 4, query_features=D, seed=0)
    x = drawn(0, B, S, D)
    first, *others = (called(eager, layer, x, value_mask=RIGHT)[0] for _ in range(4))
    assert all(np.array_equal(first, other) for other in others)


def test_a_hook_of_a_projection_sees_the_whole_input(eager: Backend) -> None:
    if eager.name != "torch":
        pytest.skip("a test of PyTorch")
    torch = required("torch")
    layer: Any = get_layer("torch")(2, 4, query_features=D, seed=0)
    seen: list[Any] = []
    layer.key.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    layer(torch.from_numpy(drawn(0, B, S, D)), value_mask=torch.from_numpy(RIGHT))
    assert seen == [(B, S, D)]


def test_an_offset_moves_causality(eager: Backend) -> None:
    layer: Any = get_layer(eager.name)(2, 4, query_features=D, seed=0)
    inputs = drawn(0, B, T, D), drawn(1, B, S, D)
    wide = np.broadcast_to(RIGHT[:, None], (B, T, S)).copy()
    call = {"use_causal_mask": True, "query_offset": 2}
    (expected,) = called(eager, layer, *inputs, attention_mask=wide, **call)
    (found,) = called(eager, layer, *inputs, value_mask=RIGHT, **call)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(eager: Backend, dtype: str) -> None:
    layer: Any = get_layer(eager.name)(2, 4, query_features=D, seed=0, dtype=dtype)
    exact: Any = get_layer("numpy")(2, 4, query_features=D, seed=0, dtype="float64")
    ops, x = eager.ops, drawn(0, B, S, D)
    half = ops.astype(ops.from_numpy(x), ops.dtype(dtype))
    found = ops.to_numpy(layer(half, value_mask=ops.from_numpy(RIGHT))).astype(np.float64)
    expected = exact(x.astype(np.float64), value_mask=RIGHT)
    np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.parametrize(
    ("name", "paths"),
    [("right", 3), ("left", 3), ("the same in all rows", 1), ("with holes", 0), ("none", 0)],
)
def test_explain_tells_the_groups(eager: Backend, name: str, paths: int) -> None:
    layer: Any = get_layer(eager.name)(2, 4, query_features=D, seed=0)
    text = explained(eager, layer, drawn(0, B, S, D), value_mask=MASKS[name])
    assert (padding.NOTE in text) == (paths > 0)
    assert len(text.splitlines()) == (paths + 1 if paths else 1)


@pytest.mark.parametrize(
    "call",
    [
        {"compute_dtype": "float64"}, {"dtype": "float64"},
        {"rotary": {"scaling": {"rope_type": "dynamic", "factor": 2.0},
                    "max_position_embeddings": 4}},
    ],
)  # fmt: skip
def test_other_options_compute_what_is_hidden(eager: Backend, call: dict[str, Any]) -> None:
    layer: Any = get_layer(eager.name)(2, 4, query_features=D, seed=0, **call)
    x = drawn(0, B, S, D).astype(call.get("dtype", "float32"))
    assert padding.NOTE not in explained(eager, layer, x, value_mask=RIGHT)


def test_small_calls_and_few_hidden_keys_compute_them() -> None:
    layer: Any = get_layer("numpy")(8, 64, query_features=512, seed=0)
    numpy = usable("numpy")
    for length, hidden, expected in (
        (8, [0, 4], False), (128, [0, 1], False), (128, [0, 64], True), (24, [1], False),
        (24, [8], True),
    ):  # fmt: skip
        mask = np.arange(length) < length - np.array(hidden)[:, None]
        text = explained(numpy, layer, drawn(0, len(hidden), length, 512), value_mask=mask)
        assert (padding.NOTE in text) == expected


def test_gradients_are_those_of_the_whole(eager: Backend) -> None:
    """Where they may be asked for, a mask is left out that hides nothing, and no key is."""
    if eager.name != "torch":
        pytest.skip("a test of PyTorch")
    torch = required("torch")
    layer: Any = get_layer("torch")(2, 4, query_features=D, seed=0)
    for name in ("right", "none", "the same in all rows"):
        mask, grads = torch.from_numpy(MASKS[name]), []
        for masks in ({"value_mask": mask}, {"attention_mask": mask[:, None].expand(B, S, S)}):
            with torch.enable_grad():
                x = torch.from_numpy(drawn(0, B, S, D)).requires_grad_()
                layer(x, **masks).square().sum().backward()
                grads.append(x.grad)
                assert padding.NOTE not in anymha.explain(layer, x, **masks)
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_transformations_of_torch_do_not_look_at_the_mask(eager: Backend) -> None:
    if eager.name != "torch":
        pytest.skip("a test of PyTorch")
    torch = required("torch")
    layer: Any = get_layer("torch")(2, 4, query_features=D, seed=0)
    x, mask = torch.from_numpy(drawn(0, B, S, D)), torch.from_numpy(RIGHT)
    expected = layer(x, value_mask=mask)
    of_rows = torch.func.vmap(lambda x, mask: layer(x[None], value_mask=mask[None])[0])(x, mask)
    torch.testing.assert_close(of_rows, expected, atol=2e-6, rtol=0)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for given in (mask, torch.ones_like(mask), mask.flip(1)):
        torch.testing.assert_close(
            compiled(x, value_mask=given), layer(x, value_mask=given), atol=2e-6, rtol=0
        )

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any, mask: Any) -> Any:
            return self.layer(x, value_mask=mask)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Masked(), (x, mask))
    torch.testing.assert_close(
        traced(x, mask.flip(1)), layer(x, value_mask=mask.flip(1)), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("name", ["right", "none", "the same in all rows"])
def test_a_mask_of_another_device_is_refused_whatever_it_holds(eager: Backend, name: str) -> None:
    if eager.name != "torch":
        pytest.skip("a test of PyTorch")
    torch = required("torch")
    layer: Any = get_layer("torch")(2, 4, query_features=D, seed=0).to("meta")
    x, mask = torch.empty(B, S, D, device="meta"), torch.from_numpy(MASKS[name])
    with pytest.raises(RuntimeError, match="device"):
        layer(x, value_mask=mask)
