"""Functions and modules are called by their own names for inputs, masks and options."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import LayoutError
from anymha.parity import compare
from tests.conftest import usable

RNG = np.random.default_rng(13)
X, Y, Z = (RNG.standard_normal((2, n, 8)).astype(np.float32) for n in (5, 6, 6))
LAYER = anymha.MultiHeadAttention(
    2, 4, query_features=8, backend="numpy", seed=0, bias_initializer="random_normal"
)
TOKENS = np.arange(6) < [[6], [3]]
MASK = RNG.random((2, 5, 6)) < 0.6
MASK[..., 0] = True


IDS = np.arange(X.shape[1], dtype=np.int32)[None] // 2
PLACES = {"positions": IDS, "key_positions": IDS}


def by_torch_order(query: Any, key: Any, value: Any) -> Any:
    return LAYER(query, value, key)


def by_letters(v: Any, q: Any, k: Any) -> Any:
    return LAYER(q, v, k)


def mask_between(q: Any, mask: Any, k: Any, v: Any) -> Any:
    return LAYER(q, v, k, attention_mask=mask[:, 0])


def unnamed(a: Any, b: Any = None, c: Any = None) -> Any:
    return LAYER(a, b, c)


def with_settings(x: Any, heads: int = 2, scale: float = 1.0) -> Any:
    assert (heads, scale) == (2, 1.0)
    return LAYER(x)


def padding(q: Any, k: Any, v: Any, key_padding_mask: Any = None) -> Any:
    return LAYER(q, v, k, value_mask=None if key_padding_mask is None else ~key_padding_mask)


def causal(x: Any, is_causal: bool = False) -> Any:
    return LAYER(x, use_causal_mask=is_causal)


def segments(x: Any, segment_ids: Any) -> Any:
    return LAYER(x, segment_ids=segment_ids)


def segments_and_positions(
    x: Any, segment_ids: Any = None, positions: Any = None, key_positions: Any = None
) -> Any:
    places = {"positions": positions, "key_positions": key_positions}
    return LAYER(x, segment_ids=segment_ids, **places)


def positions_of_both(x: Any, positions: Any) -> Any:
    return LAYER(x, positions=positions, key_positions=positions)


def mask_of_heads(hidden: Any, attention_mask: Any, past_key_value: Any = None) -> Any:
    assert (past_key_value, attention_mask.ndim) == (None, 4)
    return LAYER(hidden, attention_mask=attention_mask)


def scaled(x: Any, scale: Any = None, mask: Any = None, freqs_cis: Any = None) -> Any:
    assert scale is None is freqs_cis
    return LAYER(x, attention_mask=mask)


def needs_a_mask(x: Any, mask: Any) -> Any:
    return LAYER(x, attention_mask=mask)


def needs_what_is_hidden(x: Any, hidden: Any) -> Any:
    return LAYER(x, attention_mask=~hidden)


def needs_padding(x: Any, padding_mask: Any) -> Any:
    return LAYER(x, value_mask=~padding_mask)


def needs_flags(x: Any, is_causal: bool, deterministic: bool, train: bool) -> Any:
    assert (deterministic, train) == (True, False)
    return LAYER(x, use_causal_mask=is_causal)


CALLS: dict[str, tuple[Callable[..., Any], list[Any], dict[str, Any]]] = {
    "torch's order": (by_torch_order, [X, Y, Z], {}),
    "torch's order, two inputs": (by_torch_order, [X, Y], {}),
    "torch's order, one input": (by_torch_order, [X], {}),
    "letters": (by_letters, [X, Y, Z], {}),
    "a mask between": (mask_between, [X, Y, Z], {"attention_mask": MASK}),
    "no names": (unnamed, [X, Y, Z], {}),
    "settings": (with_settings, [X], {}),
    "padding": (padding, [X, Y, Z], {"value_mask": TOKENS}),
    "causal": (causal, [X], {"use_causal_mask": True}),
    "segments": (segments, [X], {"segment_ids": IDS}),
    "segments, positions": (segments_and_positions, [X], {"segment_ids": IDS, **PLACES}),
    "one name for both positions": (positions_of_both, [X], PLACES),
    "a mask with an axis of heads": (mask_of_heads, [X], {"attention_mask": MASK[..., :5]}),
    "parameters that are no inputs": (scaled, [X], {"attention_mask": MASK[..., :5]}),
    "a mask that it needs": (needs_a_mask, [X], {}),
    "a mask that it needs, of what is hidden": (needs_what_is_hidden, [X], {}),
    "padding that it needs": (needs_padding, [X], {}),
    "flags that it needs": (needs_flags, [X], {}),
    "flags that it needs, one given": (needs_flags, [X], {"use_causal_mask": True}),
    "causality in a mask": (needs_a_mask, [X], {"use_causal_mask": True}),
    "causality in a mask of what is hidden": (needs_what_is_hidden, [X], {"use_causal_mask": True}),
    "causality and padding in a mask": (
        needs_a_mask,
        [X],
        {"use_causal_mask": True, "value_mask": TOKENS[:, :5]},
    ),
    "partial": (functools.partial(by_torch_order), [X, Y, Z], {}),
}


@pytest.mark.parametrize("case", CALLS)
def test_function_gets_what_its_names_say(case: str) -> None:
    function, inputs, call = CALLS[case]
    report = compare(LAYER, function, inputs, **call)
    assert report.passed, report.to_text()


def test_causality_that_a_mask_of_the_keys_cannot_say_is_refused() -> None:
    def of_keys(x: Any, mask: Any = None) -> Any:
        return LAYER(x, value_mask=mask)

    with pytest.raises(LayoutError, match="neither `use_causal_mask` nor a mask of queries"):
        compare(LAYER, of_keys, X, use_causal_mask=True)


def test_a_function_that_leaves_a_causal_mask_out_is_found() -> None:
    report = compare(LAYER, lambda x, mask: LAYER(x), X, use_causal_mask=True)
    assert "mask" in str(report.diagnosis)
    assert not report.passed


def test_exchanged_arguments_inside_are_still_found() -> None:
    report = compare(LAYER, lambda query, key, value: LAYER(query, key, value), [X, Y, Z])
    assert "inputs exchanged" in str(report.diagnosis)


def test_names_in_messages_have_no_place_of_making() -> None:
    def adapt() -> Callable[..., Any]:
        def ported(query: Any) -> Any:
            return -LAYER(query)

        return ported

    assert compare(LAYER, adapt(), X).candidate == "ported"
    assert compare(LAYER, functools.partial(adapt()), X).candidate == "ported"
    assert compare(LAYER, lambda query: LAYER(query), X).candidate == "the function"


def test_arrays_of_numpy_in_a_function_of_torch_are_hinted_at() -> None:
    usable("torch")
    torch: Any = importlib.import_module("torch")
    with pytest.raises(TypeError) as failure:
        compare(LAYER, lambda query: torch.softmax(query, -1), X)
    assert "`--arrays torch`" in failure.value.__notes__[0]


@pytest.mark.parametrize("kind", ["function", "module"])
def test_what_a_callable_does_not_take_is_refused_in_words(kind: str) -> None:
    def port(query: Any) -> Any:
        return LAYER(query)

    candidate: Any = port
    if kind == "module":
        usable("torch")
        torch: Any = importlib.import_module("torch")

        class Module(torch.nn.Module):
            def forward(self, query: Any) -> Any:
                return query

        candidate = Module()
    with pytest.raises(LayoutError, match="does not take `value_mask`"):
        compare(LAYER, candidate, X, value_mask=TOKENS[:, :5])
    with pytest.raises(LayoutError, match="takes one input alone"):
        compare(LAYER, candidate, [X, Y])
    with pytest.raises(LayoutError, match="needs `start_pos`, `freqs_cis`, which no call has"):
        compare(LAYER, lambda x, start_pos, freqs_cis, mask: LAYER(x), X)


@pytest.mark.parametrize("first", ["batch", "time"])
@pytest.mark.parametrize("wrong", [False, True])
def test_module_that_plays_torchs_layer(first: str, wrong: bool) -> None:
    usable("torch")
    torch: Any = importlib.import_module("torch")
    inner = torch.nn.MultiheadAttention(8, 2, batch_first=first == "batch")
    anymha.set_weights(inner, anymha.get_weights(LAYER))

    class Plays(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.num_heads, self.batch_first = inner, 2, first == "batch"

        def forward(
            self, query: Any, key: Any, value: Any, key_padding_mask: Any = None,
            need_weights: bool = True, attn_mask: Any = None,
        ) -> Any:  # fmt: skip
            if wrong and key_padding_mask is not None:
                key_padding_mask = ~key_padding_mask
            return self.inner(query, key, value, key_padding_mask, need_weights, attn_mask)

    call = {"value_mask": TOKENS, "attention_mask": MASK[:, :, ::-1] | TOKENS[:, None]}
    report = compare(LAYER, Plays(), [X, Y, Z], **call)
    assert report.passed is not wrong, report.to_text()
    if wrong:
        assert "inverted mask" in str(report.diagnosis)


KEYS = np.broadcast_to(np.arange(5) < np.array([[5], [3]]), (2, 5))


def with_numbers(x: Any, weight_of: Any = None) -> Any:
    """A port whose mask must be of numbers, 1 = may attend."""
    if weight_of is None:
        return LAYER(x)
    assert weight_of.dtype == np.float32
    return LAYER(x, attention_mask=weight_of[:, 0] > 0.5)


LOOSE: dict[str, tuple[Callable[..., Any], list[Any], dict[str, Any]]] = {
    "a mask": (lambda x, m=None: LAYER(x, attention_mask=m if m is None else m[:, 0]),
               [X], {"attention_mask": MASK[..., :5]}),
    "a mask of the keys": (lambda x, seen=None: LAYER(x, value_mask=_two_axes(seen)),
                           [X], {"value_mask": KEYS}),
    "a mask that is needed": (lambda x, m: LAYER(x, attention_mask=m[:, 0]),
                              [X], {"attention_mask": MASK[..., :5]}),
    "numbers": (with_numbers, [X], {"attention_mask": MASK[..., :5]}),
    "hidden": (lambda x, hidden=None: LAYER(x, attention_mask=hidden if hidden is None
                                            else ~hidden[:, 0]),
               [X], {"attention_mask": MASK[..., :5]}),
    "pads": (lambda x, is_pad=None: LAYER(x, value_mask=is_pad if is_pad is None else ~is_pad),
             [X], {"value_mask": KEYS}),
    "a first input": (lambda visible: LAYER(visible), [X], {}),
    "an input": (lambda x, other=None: LAYER(x, other), [X, Y], {}),
    "an input and a mask": (lambda a, b=None, m=None: LAYER(a, b, attention_mask=m if m is None
                                                            else m[:, 0]),
                            [X, Y], {"attention_mask": MASK}),
    "a mask behind three inputs": (lambda q, k, v, m=None: LAYER(q, v, k, attention_mask=m
                                                                 if m is None else m[:, 0]),
                                   [X, Y, Z], {"attention_mask": MASK}),
    "a mask that is cut": (lambda x, m=None: LAYER(x, attention_mask=m if m is None
                                                   else _cut(m, x)),
                           [X], {"attention_mask": MASK[..., :5]}),
    "a mask before the others": (lambda q, keep, k, v: LAYER(q, v, k, attention_mask=keep[:, 0]),
                                 [X, Y, Z], {"attention_mask": MASK}),
    "a mask of three axes by anymha's name": (
        lambda x, **call: LAYER(x, attention_mask=_three_axes(call.get("attention_mask"))),
        [X], {"attention_mask": np.tri(5, dtype=bool)},
    ),
}  # fmt: skip


def _cut(mask: Any, x: Any) -> Any:
    batch, length, _ = x.shape
    return mask[..., :length, :length].reshape(batch, length, -1) > 0


def _two_axes(mask: Any) -> Any:
    assert mask is None or mask.ndim == 2
    return mask


def _three_axes(mask: Any) -> Any:
    assert mask is None or mask.ndim == 3
    return mask


@pytest.mark.parametrize("case", LOOSE)
def test_what_a_parameter_is_whose_name_tells_nothing_is_tried(case: str) -> None:
    function, inputs, call = LOOSE[case]
    report = compare(LAYER, function, inputs, **call)
    assert report.passed, report.to_text()


def test_unnamed_inputs_that_nothing_projects_are_no_masks() -> None:
    def named(query: Any, key: Any, value: Any) -> Any:
        return _softmax(query @ key.swapaxes(1, 2)) @ value

    def unnamed(a: Any, b: Any, c: Any) -> Any:
        return _softmax(a @ c.swapaxes(1, 2)) @ b

    def _softmax(x: Any) -> Any:
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    assert compare(named, unnamed, [X, Y, Z]).passed


def test_masks_are_found_where_a_length_is_the_width_of_the_inputs() -> None:
    x = RNG.standard_normal((2, 8, 8)).astype(np.float32)
    mask = RNG.random((2, 8, 8)) < 0.5
    mask[..., 0] = True
    report = compare(
        LAYER,
        lambda x, m=None: LAYER(x, attention_mask=m if m is None else m.reshape(2, -1, x.shape[1])),
        x,
        attention_mask=mask,
    )
    assert report.passed, report.to_text()


@pytest.mark.parametrize("wrong", ["ignores", "inverts"])
def test_a_mistake_in_a_mask_of_any_name_is_named(wrong: str) -> None:
    def port(x: Any, keep: Any = None) -> Any:
        return LAYER(x, attention_mask=None if wrong == "ignores" else ~keep[:, 0])

    report = compare(LAYER, port, X, attention_mask=MASK[..., :5])
    words = {"ignores": "ignored mask", "inverts": "inverted mask"}[wrong]
    assert str(report.diagnosis) == f"{words} (`attention_mask`)"
    assert any("`keep` is given as" in note for note in report.notes)


@pytest.mark.parametrize("port", [lambda x, foo=None: LAYER(x), lambda x, foo=None: LAYER(x, foo.a)
                                  if foo is not None else LAYER(x)])  # fmt: skip
def test_a_parameter_that_nothing_shows_is_asked_for_by_name(port: Callable[..., Any]) -> None:
    assert compare(LAYER, port, X).passed
    words = r"as `foo` fails or changes nothing .*: name it `value` or `mask` if it is one"
    with pytest.raises(LayoutError, match=words):
        compare(LAYER, port, [X, Y])
    with pytest.raises(LayoutError, match=words):
        compare(LAYER, port, X, attention_mask=MASK[..., :5])


def test_trials_of_parameters_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anymha.parity.adapters.arguments.SECONDS", 0.0)
    calls = []

    def port(x: Any, a: Any = None, b: Any = None, c: Any = None, d: Any = None) -> Any:
        calls.append(0)
        return LAYER(x)

    assert compare(LAYER, port, X).passed
    assert len(calls) < 5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_a_function_without_a_word_for_causality_is_judged_by_its_output(
    causal: bool, asked: bool
) -> None:
    report = compare(LAYER, lambda x: LAYER(x, use_causal_mask=causal), X, use_causal_mask=asked)
    assert report.passed == (causal == asked)
    names = {(False, True): "causal mask ignored", (True, False): "causal mask not asked for"}
    assert (str(report.diagnosis or "").split(" (")[0] or None) == names.get((causal, asked))
