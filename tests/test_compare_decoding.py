"""`compare` of functions that decode step by step: right ones pass, each mistake is named."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError, LayoutError
from anymha.framework.registry import get_backend
from anymha.parity import ParityError, assert_parity, compare, declare, decoding
from anymha.parity.diagnose.decoding_mistakes import MISTAKES
from anymha.parity.reports.report import Comparison
from tests.decoding_port import FAULTS, OPTIONS, Fault, Port
from tests.frameworks import skip_or_fail

pytestmark = pytest.mark.usefixtures("quick_programs")

BATCH, LENGTH, FEATURES = 3, 13, 12
STEPS = (5, 1, 3, 1)
PADDED = {
    "even": [],
    "behind": [(0, 4), (1, 3), (1, 4)],
    "in front": [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)],
    "between": [(0, 6), (0, 7), (1, 2), (1, 8), (2, 4), (2, 9)],
}
"""The places of padding, (row, column), by where it is."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of mistakes, and mistakes in some calls alone, are not searched for."""
    for name in ("PARTS_SECONDS", "PAIRS_SECONDS", "CALLS_SECONDS"):
        monkeypatch.setattr(f"anymha.parity.diagnose.diagnosis.{name}", 0.0)


def layer_of(options: str, seed: int = 0, **more: Any) -> Any:
    """A layer of those options."""
    return anymha.MultiHeadAttention(
        4, 4, query_features=FEATURES, backend="numpy", seed=seed,
        bias_initializer="random_normal", **{**OPTIONS[options], **more},
    )  # fmt: skip


def inputs_of(options: str, padded: str, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """Inputs (B, T, D), and the arguments of the call."""
    x = 2 * np.random.default_rng(seed).standard_normal((BATCH, LENGTH, FEATURES))
    x = x.astype(ml_dtypes.bfloat16 if options == "bfloat16" else np.float32)
    valid = np.ones((BATCH, LENGTH), bool)
    for row, column in PADDED[padded]:
        valid[row, column] = False
    return x, {} if valid.all() else {"value_mask": valid}


def compared(fault: Fault | None, options: str, padded: str, seed: int = 0) -> Comparison:
    """The comparison of a port with its layer."""
    layer = layer_of(options, seed)
    x, call = inputs_of(options, padded, seed)
    port = Port(layer, "" if fault is None else fault.wrong)
    tried = ["join", "reorder"] + ["truncate"] * ("window" not in options)
    if fault is not None:
        tried = [name for name in tried if name in fault.needs]
    more = {name: getattr(port, name) for name in tried}
    return compare(layer, decoding(port.step, port.make_cache, steps=STEPS, **more), x, **call)


@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize("options", OPTIONS)
def test_right_port_passes_with_every_function_of_its_cache(options: str, padded: str) -> None:
    report = compared(None, options, padded)
    assert report.passed, report.to_text()
    assert report.diagnosis is None


def placed(number: int, fault: Fault) -> tuple[str, str]:
    """Options and padding with which a fault is tried; another fault has others."""
    names = [name for name in OPTIONS if fault.shows(name, "ragged" in fault.needs)]
    # What is counted of padding in front changes no distance.
    padded = ("behind", "between") if "ragged" in fault.needs else ("even", "in front")
    return names[number % len(names)], padded[number // 2 % 2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.wrong)
def test_fault_is_caught_and_named(fault: Fault) -> None:
    options, padded = placed(FAULTS.index(fault), fault)
    report = compared(fault, options, padded)
    assert not report.passed, (options, padded)
    assert report.diagnosis is not None
    assert report.diagnosis.explained, (options, padded, str(report.diagnosis))
    assert report.diagnosis.causes[0].name == fault.cause, (options, padded, str(report.diagnosis))


@pytest.mark.parametrize(
    ("wrong", "way"),
    [
        ("truncate does nothing", "nothing is taken back"),
        ("truncate leaves one too many", "one position too few is taken back"),
        ("truncate takes one too many", "one position too many is taken back"),
        ("truncate to the length of row 0", "to the length of row 0, where the row is longer"),
        ("reorder leaves lengths", "lengths are not moved"),
    ],
)
def test_way_in_which_a_function_of_a_cache_is_wrong_is_told(wrong: str, way: str) -> None:
    fault = next(fault for fault in FAULTS if fault.wrong == wrong)
    options = "rotary" if wrong == "truncate does nothing" else "alibi"
    report = compared(fault, options, "behind")
    assert report.diagnosis is not None
    told = [report.diagnosis.causes[0].detail, *report.diagnosis.alternatives]
    assert report.diagnosis.causes[0].name == fault.cause
    assert way in told
    assert "lengths" in report.diagnosis.causes[0].fix


@pytest.mark.parametrize("padded", ["even", "behind"])
def test_reorder_by_the_inverse_of_the_indices_is_told(padded: str) -> None:
    """Three rows that move by one move by two the other way, as by the row after."""
    fault = next(fault for fault in FAULTS if fault.wrong == "reorder moves the other way")
    told = str(compared(fault, "alibi", padded).diagnosis)
    of = "the rows" if padded == "even" else "rows and lengths"
    expected = f"cache of another row ({of} are reordered by the inverse of the indices)"
    assert told.startswith(expected), told


def test_cause_without_the_functions_of_a_cache_is_told_where_both_are_wrong() -> None:
    layer = layer_of("alibi")
    x, _ = inputs_of("alibi", "even")
    port = Port(layer, "writes one slot early")
    decode = decoding(port.step, port.make_cache, steps=STEPS, truncate=port.truncate)
    report = compare(layer, decode, x)
    assert report.diagnosis is not None
    assert report.diagnosis.causes[0].name == "cache written off by one"
    assert any("without `truncate`" in note for note in report.notes)


@pytest.mark.parametrize("seed", range(6))
def test_half_precision_of_a_cache_is_named_where_numbers_lie_between_two(seed: int) -> None:
    fault = next(one for one in FAULTS if one.wrong == "holds float16")
    report = compared(fault, "rotary", "even", seed)
    assert str(report.diagnosis).startswith("cache in half precision (in float16)")


def test_each_mistake_of_decoding_has_a_fault() -> None:
    assert {name for name, *_ in MISTAKES} <= {fault.cause for fault in FAULTS}


def again(layer: Any) -> Any:
    """A step whose cache is all inputs so far; slow and right."""

    def step(x: Any, cache: Any) -> Any:
        held = x if cache is None else np.concatenate([cache, x], axis=1)
        return layer(held, use_causal_mask=True)[:, -x.shape[1] :], held

    return step


@pytest.mark.parametrize("rows", [1, BATCH])
def test_packed_rows_with_padding_are_read_alone(rows: int) -> None:
    layer = layer_of("alibi")
    x, call = inputs_of("alibi", "between")
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (rows, LENGTH)))
    mask = {"value_mask": call["value_mask"][:rows], "segment_ids": ids}

    def step(x: Any, cache: Any, value_mask: Any, segment_ids: Any) -> Any:
        return layer(x, cache=cache, value_mask=value_mask, segment_ids=segment_ids)

    make_cache = lambda batch, length: layer.make_cache(batch, length)  # noqa: E731
    report = compare(layer, decoding(step, make_cache, steps=STEPS), x[:rows], **mask)
    assert report.passed, report.to_text()


def test_other_mistakes_are_named_too() -> None:
    layer = layer_of("rotary")
    x, _ = inputs_of("rotary", "even")
    step = again(layer_of("rotary", scale=0.3))
    report = compare(layer, decoding(step), x)
    assert not report.passed
    assert str(report.diagnosis).startswith("wrong scale")


def test_pieces_are_those_of_steps_and_then_one_by_one() -> None:
    layer, lengths = layer_of("plain"), []

    def step(x: Any, cache: Any) -> Any:
        lengths.append(x.shape[1])
        return again(layer)(x, cache)

    x, _ = inputs_of("plain", "even")
    assert compare(layer, decoding(step, steps=(6, 4)), x).passed
    assert lengths == 2 * [6, 4, 1, 1, 1]  # two calls show whether it is random
    lengths.clear()
    report = compare(layer, decoding(step), x)
    assert lengths == 2 * [6, 1, 3, 1, 1, 1]
    assert any("reads pieces of 6, 1, 3, 1, 1, 1 positions" in note for note in report.notes)
    assert any("decodes step by step" in note for note in report.notes)


def test_both_sides_may_decode_and_either_may_be_the_reference() -> None:
    layer = layer_of("plain")
    x, call = inputs_of("plain", "between")
    port = Port(layer)
    one = declare(decoding(port.step, port.make_cache), anymha.get_weights(layer), "anymha")
    other = decoding(port.step, port.make_cache, steps=(2, 3))
    assert compare(other, layer, x, **call).passed
    assert compare(other, other, x, **call).passed
    assert compare(one, other, x, **call).passed


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_between_pieces_are_refused_and_not_blamed(kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        scaling |= {**factors, "original_max_position_embeddings": 6}
    rotary = {"scaling": scaling, "max_position_embeddings": 6 if kind == "dynamic" else 24}
    layer = anymha.MultiHeadAttention(
        2, 8, query_features=8, rotary=rotary, backend="numpy", seed=0
    )
    x = np.random.default_rng(0).standard_normal((2, 9, 8)).astype("float32")
    short = np.ones((2, 9), bool)
    short[:, 1:4] = False
    for call in ({}, {"value_mask": np.roll(short, 1, 1) | [[False], [True]]}):
        for pair in ((layer, decoding(layer)), (decoding(layer), layer)):
            with pytest.raises(LayoutError, match=rf"rope_type '{kind}' .* `steps=\(9,\)`"):
                compare(*pair, x, **call)
        assert compare(layer, decoding(layer, steps=(9,)), x, **call).passed
    report = compare(layer, decoding(layer), x, value_mask=short)  # at most 6 of each row
    assert report.passed, report.to_text()


def test_reference_whose_weights_are_not_known_is_called_with_each_row_alone() -> None:
    layer, rows = layer_of("alibi"), []
    x, call = inputs_of("alibi", "between")

    def reference(query: Any, use_causal_mask: bool) -> Any:
        rows.append(query.shape[:2])
        return layer(query, use_causal_mask=use_causal_mask)

    port = Port(layer)
    assert compare(reference, decoding(port.step, port.make_cache), x, **call).passed
    assert {*rows} == {(1, 11)}  # each row has two positions of padding
    wrong = Port(layer, "holds padding")
    report = compare(reference, decoding(wrong.step, wrong.make_cache), x, **call)
    assert not report.passed
    assert "neither side tells its weights" in str(report.diagnosis)


def test_output_of_padding_is_not_compared() -> None:
    layer = layer_of("plain")
    x, call = inputs_of("plain", "between")
    port = Port(layer)

    def step(x: Any, cache: Any, valid: Any) -> Any:
        output, cache = port.step(x, cache, valid)
        return np.where(valid[..., None], output, np.float32(np.nan)), cache

    assert compare(layer, decoding(step, port.make_cache), x, **call).passed


def test_step_gets_what_it_has_a_name_for() -> None:
    layer = layer_of("rotary")
    x, call = inputs_of("rotary", "in front")
    port, got = Port(layer), []

    def step(x: Any, cache: Any, position_ids: Any, padding_mask: Any) -> Any:
        got.append((position_ids, padding_mask))
        return port.step(x, cache, ~padding_mask)

    assert compare(layer, decoding(step, port.make_cache, steps=(4, 9)), x, **call).passed
    assert got[0][0].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert got[0][1].tolist() == (~call["value_mask"][:, :4]).tolist()
    assert got[1][0][:, 0].tolist() == [2, 4, 1]


def test_positions_of_the_call_are_those_of_queries_and_keys() -> None:
    layer = layer_of("rotary")
    x, _ = inputs_of("rotary", "even")
    positions = np.cumsum(np.random.default_rng(0).integers(1, 4, (BATCH, LENGTH)), axis=1)

    def step(x: Any, cache: Any, positions: Any) -> Any:
        held, places = (x, positions) if cache is None else (
            np.concatenate([old, new], axis=1)
            for old, new in zip(cache, (x, positions), strict=True)
        )  # fmt: skip
        call = {"positions": places, "key_positions": places, "use_causal_mask": True}
        return layer(held, **call)[:, -x.shape[1] :], (held, places)

    assert compare(layer, decoding(step), x, positions=positions).passed
    ignored = compare(layer, decoding(lambda x, cache, positions: again(layer)(x, cache)), x,
                      positions=positions)  # fmt: skip
    assert not ignored.passed


def test_cache_is_made_with_as_many_sizes_as_it_takes() -> None:
    layer, sizes = layer_of("plain"), []
    x, _ = inputs_of("plain", "even")

    def make(*given: int) -> None:
        sizes.append(given)

    for make_cache in (make, lambda: make(), lambda batch: make(batch),
                       lambda batch, length=5: make(batch, length),
                       lambda batch, *, dtype=None: make(batch)):  # fmt: skip
        assert compare(layer, decoding(again(layer), make_cache), x).passed
    assert sizes[::2] == [(3, 13), (), (3,), (3, 13), (3,)]


def test_large_case_is_cut_and_compared_at_full_length() -> None:
    layer = layer_of("plain")
    x = np.random.default_rng(0).standard_normal((2, 200, FEATURES)).astype(np.float32)
    valid = np.ones((2, 200), bool)
    valid[0, 3:30] = False
    port = Port(layer)
    steps = (90, 100, 5)
    right = decoding(port.step, port.make_cache, steps=steps)
    report = compare(layer, right, x, value_mask=valid)
    assert report.passed, report.to_text()
    assert report.stages[-1].name == "output at full length"

    def short(x: Any, cache: Any, value_mask: Any) -> Any:
        return port.step(x if cache.lengths.max() < 100 else 0 * x, cache, value_mask)

    report = compare(layer, decoding(short, port.make_cache, steps=steps), x, value_mask=valid)
    assert report.first_divergence == "output at full length"


def test_not_exercised_says_what_the_call_lacks() -> None:
    layer = layer_of("window")
    x, _ = inputs_of("window", "even")
    report = compare(layer, decoding(again(layer), steps=(2,)), x[:, :3])
    told = " ".join(report.not_exercised)
    for words in ("rows of unequal lengths", "several positions after the first", "a ring"):
        assert words in told


def test_assertion_says_the_mistake() -> None:
    layer = layer_of("plain")
    x, _ = inputs_of("plain", "even")
    forgetful = decoding(lambda x, cache: (layer(x, use_causal_mask=True), cache))
    with pytest.raises(ParityError, match=r"stale keys \(a call sees itself alone\)"):
        assert_parity(layer, forgetful, x)


def test_page_and_saved_case_are_written(tmp_path: Any) -> None:
    layer = layer_of("plain")
    x, call = inputs_of("plain", "behind")
    port = Port(layer, "holds padding")
    report = compare(layer, decoding(port.step, port.make_cache, steps=STEPS), x, **call)
    report.to_html(tmp_path / "page.html")
    assert "padding held" in (tmp_path / "page.html").read_text(encoding="utf-8")
    report.save(tmp_path / "case.npz")
    assert "value_mask" in np.load(tmp_path / "case.npz")


@pytest.mark.parametrize("name", ["torch", "jax", "tensorflow"])
def test_step_of_a_framework_gets_its_arrays(name: str) -> None:
    backend = get_backend(name)
    if not backend.installed:
        skip_or_fail(name, f"{name} is not installed")
    ops, layer = backend.ops, layer_of("rotary")
    x, call = inputs_of("rotary", "behind")
    port, kinds = Port(layer), set()

    def step(x: Any, cache: Any, value_mask: Any) -> Any:
        kinds.update({type(x), type(value_mask)})
        output, cache = port.step(ops.to_numpy(x), cache, ops.to_numpy(value_mask))
        return ops.from_numpy(output), cache

    native = ops.from_numpy(x)
    decode = decoding(
        step, port.make_cache, steps=STEPS,
        truncate=lambda cache, lengths: port.truncate(cache, ops.to_numpy(lengths)),
        reorder=lambda cache, indices: port.reorder(cache, ops.to_numpy(indices)),
    )  # fmt: skip
    report = compare(layer, decode, native, **call)
    assert report.passed, report.to_text()
    assert np.ndarray not in kinds


@pytest.mark.parametrize(
    ("name", "options"),
    [("numpy", "alibi"), *((n, "window, rotary") for n in ("numpy", "torch"))],
)
def test_layer_decodes_with_its_own_cache(name: str, options: str) -> None:
    if not get_backend(name).installed:
        skip_or_fail(name, f"{name} is not installed")
    layer = layer_of(options)
    x, call = inputs_of(options, "between")
    own = anymha.convert(layer, to=name)
    every = {"join": True, "truncate": True, "reorder": True}
    report = compare(layer, decoding(own, steps=STEPS, **every), x, **call)
    assert report.passed, report.to_text()


@pytest.mark.parametrize("padded", PADDED)
def test_positions_and_segments_of_a_call_are_read_in_pieces(padded: str) -> None:
    layer, rng = layer_of("window, rotary"), np.random.default_rng(2)
    x, call = inputs_of("plain", padded)
    ids = np.sort(rng.integers(0, 3, (BATCH, LENGTH)), axis=1)
    positions = np.cumsum(rng.integers(1, 3, (BATCH, LENGTH)), axis=1)
    for more in ({"segment_ids": ids}, {"positions": positions[0]},
                 {"segment_ids": ids, "positions": positions}):  # fmt: skip
        report = compare(layer, decoding(layer, steps=STEPS), x, **call, **more)
        assert report.passed, (list(more), report.to_text())


ERRORS: list[tuple[Any, dict[str, Any], dict[str, Any], type[Exception], str]] = [
    (3, {}, {}, ArgumentError, r"`step` must be a function `step\(x, cache\)"),
    (again(None), {"make_cache": {}}, {}, ArgumentError,
     r"`make_cache` must be a function, or None. Received: \{\}. A cache itself"),
    (again(None), {"join": True}, {}, ArgumentError, "`join` must be .* True is for layers"),
    (again(None), {"steps": (3, 0)}, {}, ArgumentError, r"positive integers. Received: \(3, 0\)"),
    (again(None), {"steps": (9, 9)}, {}, ArgumentError,
     r"`steps` may be 13 positions together.*Received: \(9, 9\), 18 positions"),
    (again(None), {}, {"attention_bias": np.zeros((13, 13))}, LayoutError,
     "does not take `attention_bias`"),
    (again(None), {}, {"value_mask": np.tri(3, 13, 5, bool)}, LayoutError,
     "does not take `value_mask`"),
    (again(None), {}, {"use_causal_mask": False}, LayoutError, "decodes causally"),
    (again(None), {}, {"value": np.zeros((3, 13, 12), np.float32)}, LayoutError,
     "takes one input alone"),
    (lambda x, cache, index: None, {}, {}, LayoutError, "needs `index`, which no call has"),
    (lambda x, cache: x, {}, {}, ArgumentError, "must return the output .* Received: ndarray"),
    (lambda x, cache: (x[:, -1], cache), {}, {}, ArgumentError,
     r"an output for each new position, .* = \(3, 6\). Received: shape \(3, 12\)"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "options", "call", "error", "words"), ERRORS)
def test_wrong_call_is_refused_in_words(
    step: Any, options: Any, call: Any, error: type[Exception], words: str
) -> None:
    x, _ = inputs_of("plain", "even")
    with pytest.raises(error, match=words):
        compare(layer_of("plain"), decoding(step, **options), x, **call)
