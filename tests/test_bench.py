"""The benchmark: its checks, its arithmetic and its files. No test asserts a time."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import benchmarks.measure as measure
import benchmarks.worker as worker
from anymha.framework.registry import BUILT_IN
from benchmarks.cases import CASES, MASKS, Case, make_problem
from benchmarks.check import allowed, change, drops_as, error_beside, error_of
from benchmarks.entries import (  # fmt: skip
    EXACT,
    NATIVE,
    Entry,
    Machine,
    Ready,
    from_linear,
    pack,
    to_linear,
    unpack,
)
from benchmarks.frameworks import numpy as numpy_layers
from benchmarks.goals import GOALS, Goal, judge
from benchmarks.measure import FOREIGN, Sample, interleaved, peak_memory
from benchmarks.processes import run_framework
from benchmarks.reference import make_reference
from benchmarks.results import CaseResult, Timing, from_dict, ratio, spread
from benchmarks.terminal import duration
from benchmarks.worker import run_case
from tests.frameworks import skip_or_fail
from tests.written_oracle import attention_oracle

SMALL: dict[str, Any] = {"batch": 2, "length": 8, "features": 16, "heads": 2}
HERE = Machine({})
CLEAR_REFS = os.access("/proc/self/clear_refs", os.W_OK)
"""Whether the system tells the memory of a call."""

# Every layer of every framework.

EVERYWHERE = [
    Case("forward", 2, 256, 256, 2, mask="bool"),
    Case("scores", **SMALL, mask="padding", scores=True, dtype="bfloat16"),
    Case("train", **SMALL, mode="train", mask="causal", dropout=0.25),
]
FORWARD = Case("forward", **SMALL, mask="causal")
SCORES, DROPOUT = Case("scores", **SMALL, scores=True), EVERYWHERE[2]
PEERS = {
    ("numpy", FORWARD): "numpy.matmul",
    ("numpy", SCORES): "numpy.matmul",
    ("numpy", DROPOUT): "",
    ("torch", FORWARD): "torch.nn.MultiheadAttention; Linear + SDPA; keras",
    ("torch", SCORES): "torch.nn.MultiheadAttention; Linear + softmax; keras",
    ("torch", DROPOUT): "torch.nn.MultiheadAttention; Linear + SDPA; keras",
    **{
        ("tensorflow", case): "keras, tf.function; keras, XLA; tf.matmul, tf.function; "
        "tf.matmul, XLA"
        for case in (FORWARD, SCORES, DROPOUT)
    },
    ("jax", FORWARD): "flax, jit; equinox, jit; haiku, jit; keras, jit; "
    "jax.nn.dot_product_attention, jit",
    ("jax", SCORES): "keras, jit; jax.numpy, jit",
    ("jax", DROPOUT): "flax, jit; equinox, jit; keras, jit; jax.numpy, jit",
}


@pytest.mark.parametrize("framework", [backend.name for backend in BUILT_IN])
def test_every_layer_gives_the_right_values_and_is_timed(
    framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = next(one for one in BUILT_IN if one.name == framework)
    if not backend.installed:
        skip_or_fail(framework, f"{framework} is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if framework == "jax":  # XLA compiles for longer than it computes; no time is looked at
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    facts: dict[str, Any] = {}
    results = run_framework(framework, EVERYWHERE, repeats=1, budget=1.0, facts=facts)
    assert facts[framework]
    for case, result in zip(EVERYWHERE, results, strict=True):
        assert (result.framework, result.case) == (framework, case)
        assert result.sound
        if framework == "numpy" and case.dtype == "bfloat16":
            assert (list(result.timings), result.note) == ([], "bfloat16 is not computed there")
            continue
        names = [timing.name for timing in result.timings]
        assert len(set(names)) == len(names)
        for timing in result.timings:
            assert timing.fault == "", timing
            assert timing.error is not None, timing
            assert 0 <= timing.error <= 1
            assert 0 < timing.median < math.inf
            assert len(timing.seconds) == len(timing.foreign) >= 1
            assert (timing.memory is None) != CLEAR_REFS
            if timing.memory is not None and case.length > 100:
                assert 400_000 < timing.memory < 50_000_000, timing  # the output takes 524,288
        options = {timing.option for timing in result.timings if timing.ours}
        assert options == ({"", NATIVE} if case.dropout else {""})


@pytest.mark.parametrize(
    ("framework", "case"), PEERS, ids=lambda value: getattr(value, "name", value)
)
def test_every_peer_that_is_installed_takes_part(
    framework: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = worker.framework_module(framework)
    peers = PEERS[framework, case].split("; ") if PEERS[framework, case] else []
    for there in (True, False):
        monkeypatch.setattr(module, "installed", lambda package, there=there: there, raising=False)
        names = [one.name for one in module.entries(make_problem(case), "cpu") if not one.ours]
        others = ("keras", "flax", "equinox", "haiku")
        assert names == [name for name in peers if there or not name.startswith(others)]


def test_peers_are_timed_eagerly_too_where_the_case_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for framework in ("tensorflow", "jax"):
        module = worker.framework_module(framework)
        monkeypatch.setattr(module, "installed", lambda package: True)
        for eager in (False, True):
            problem = make_problem(Case("plain", **SMALL, eager=eager))
            names = [one.name for one in module.entries(problem, "cpu")]
            assert ("keras" in names) == eager
            assert "anymha" in names


# The reference and the check.


@pytest.mark.parametrize("mask", MASKS)
def test_reference_is_what_the_oracle_of_the_parity_report_gives(mask: str) -> None:
    problem = make_problem(Case("case", 2, 6, 8, 2, mode="train", mask=mask, scores=True))
    found = make_reference(problem)
    seen = problem.allowed(np.arange(6))
    truth = attention_oracle(
        problem.weights,
        dict.fromkeys(("query", "value", "key"), problem.x),
        scale=0.5,
        allowed=None if seen is None else seen[:, None],
        d_output=problem.cotangent,
    )
    right = truth.gradients | {"output": truth.output, "scores": truth.scores}
    right["x"] = right.pop("query") + right.pop("key") + right.pop("value")
    assert list(found.rows) == list(range(6))
    assert found.values.keys() == right.keys() == found.sizes.keys()
    for name, value in right.items():
        np.testing.assert_allclose(found.values[name], value, atol=1e-13, err_msg=name)
        assert found.sizes[name] >= np.abs(value).max()


def test_long_reference_is_some_rows_of_the_whole_with_first_and_last() -> None:
    case = Case("case", 2, 100, 16, 2, mask="causal", scores=True)
    some, whole = (
        make_reference(make_problem(case)),
        make_reference(make_problem(replace(case, mode="train"))),
    )
    assert some.rows[0] == 0
    assert some.rows[-1] == 99
    assert len(some.rows) == 32
    for name, value in some.values.items():
        np.testing.assert_array_equal(value, whole.values[name][..., some.rows, :])


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_matters_and_leaves_every_query_a_key(mask: str) -> None:
    problem = make_problem(Case("case", **SMALL, mask=mask))
    seen = problem.allowed(np.arange(8))
    if mask == "none":
        assert seen is None
    else:
        assert not seen.all()
        assert seen.any(-1).all()


def test_problem_in_half_precision_has_only_its_numbers() -> None:
    problem = make_problem(Case("case", **SMALL, dtype="bfloat16"))
    for array in (*problem.weights.values(), problem.x, problem.cotangent):
        assert array.dtype == np.float32
        assert not np.any(array.view(np.uint32) & 0xFFFF)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_passes_one_just_where_rounding_does_not_explain_it(dtype: str) -> None:
    case = Case("case", **SMALL, dtype=dtype)
    reference = make_reference(make_problem(case))
    limit = allowed(case, reference.sizes["output"])
    assert limit < 1e-4 if dtype == "float32" else 1e-3 < limit < 0.5
    for factor in (0.5, 2.0):
        values = {"output": reference.values["output"].copy()}
        values["output"][1, 3, 5] += factor * limit
        assert error_of(case, values, reference) == pytest.approx(factor, rel=1e-6)
    assert error_of(case, {"output": values["output"] * np.nan}, reference) == math.inf
    with pytest.raises(ValueError, match="gives no output"):
        error_of(case, {}, reference)
    with pytest.raises(ValueError, match=r"output has shape \(2, 8, 1\), not \(2, 8, 16\)"):
        error_of(case, {"output": values["output"][..., :1]}, reference)


def test_row_that_the_reference_does_not_have_is_held_against_ours() -> None:
    case = Case("case", 1, 100, 16, 2)
    reference = make_reference(make_problem(case))
    ours = {"output": np.zeros((1, 100, 16))}
    values = {"output": ours["output"].copy()}
    assert error_beside(case, values, ours, reference) == 0
    (row,) = {1, 2} - set(reference.rows) & {1}
    values["output"][0, row, 0] = 1.0
    assert error_beside(case, values, ours, reference) > 1


def test_gradient_of_the_key_bias_is_judged_by_its_terms() -> None:
    """It is zero, but what it is summed from is not: rounding leaves something there."""
    case = Case("case", **SMALL, mode="train")
    reference = make_reference(make_problem(case))
    assert np.abs(reference.values["key.bias"]).max() < 1e-14
    assert reference.sizes["key.bias"] > 1e-2


def faulty(fault: str) -> Ready:
    """The peer of NumPy with a fault."""
    problem = make_problem(FORWARD)
    sound = numpy_layers.entries(problem, "cpu")[1].make()

    def values(result: Any) -> dict[str, np.ndarray]:
        found = sound.values(result)
        if fault == "other values":
            found["output"] = found["output"] * np.float32(1.001)
        if fault == "no mask":
            plain = make_problem(replace(FORWARD, mask="none"))
            peer = numpy_layers.entries(plain, "cpu")[1].make()
            found = peer.values(peer.call())
        if fault == "NaN":
            found["output"][1, 7] = np.nan
        if fault == "no output":
            found = {}
        return found

    def call() -> Any:
        if fault == "an error":
            raise RuntimeError("no [such] kernel\nand more")
        return sound.call()

    return Ready(call, values, call)


FAULTS = {
    "other values": r"other values: an error of \d+.* times what is allowed",
    "no mask": "other values: an error of .* times what is allowed",
    "NaN": "other values: an error of inf times what is allowed",
    "no output": "ValueError: gives no output",
    "an error": r"RuntimeError: no \[such\] kernel",
}


def layers(*planted: Entry, beside: slice = slice(None)) -> Any:
    """NumPy's module with these layers first, beside its own."""

    def entries(problem: Any, device: str) -> list[Entry]:
        return [*planted, *numpy_layers.entries(problem, device)[beside]]

    return SimpleNamespace(entries=entries)


@pytest.mark.parametrize("whose", ["anymha", "peer"])
@pytest.mark.parametrize("fault", FAULTS)
def test_layer_with_a_fault_is_not_timed_and_the_others_are(fault: str, whose: str) -> None:
    planted = Entry(whose, "", "", lambda: faulty(fault))
    module = layers(planted, beside=slice(int(whose == "anymha"), None))
    held = run_case(module, HERE, FORWARD, repeats=1, budget=1.0)
    result = CaseResult("numpy", FORWARD, [from_dict(one) for one in held["timings"]])
    first, *others = result.timings
    assert re.fullmatch(FAULTS[fault], first.fault)
    assert (list(first.seconds), first.median) == ([], math.inf)
    assert others
    assert all(one.fault == "" and one.seconds for one in others)
    assert result.sound == (whose == "peer")


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 3.0])
def test_dropout_that_does_not_act_as_ours_is_a_fault(factor: float) -> None:
    ours = numpy_layers.entries(make_problem(DROPOUT), "cpu")[0].make()

    def call() -> Any:
        plain, dropped = ours.plain(), ours.call()
        return plain[0] + np.float32(factor) * (dropped[0] - plain[0]), dropped[1]

    peer = Entry("peer", "", "", lambda: Ready(call, ours.values, ours.plain))
    module = SimpleNamespace(entries=lambda *_: [*numpy_layers.entries(*_)[:1], peer])
    held = run_case(module, HERE, DROPOUT, repeats=1, budget=1.0)
    fault = held["timings"][1]["fault"]
    assert fault == "" if factor == 1.0 else "its dropout changes the output by " in fault


def test_change_is_the_root_of_the_mean_square() -> None:
    values = {"output": np.array([1.0, 2.0, 3.0, 4.0])}
    assert change(values, {"output": np.array([1.0, 2.0, 3.0, 8.0])}) == 2.0
    assert [drops_as(x, 1.0) for x in (0.49, 0.51, 1.9, 2.1)] == [False, True, True, False]


def test_peers_that_need_more_memory_than_there_is_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "available_memory", lambda: FORWARD.dense_bytes)
    held = run_case(numpy_layers, HERE, FORWARD, repeats=1, budget=1.0)
    assert [one["name"] for one in held["timings"]] == ["anymha"]
    assert held["note"].startswith("peers left out: they may need ")


def test_weights_come_back_from_linear_and_packed_layers() -> None:
    weights = make_problem(Case("case", 1, 2, 12, 3)).weights
    linear = to_linear(weights)
    x = np.random.default_rng(0).standard_normal((5, 12))
    there = np.einsum("td,dhk->thk", x, weights["key.kernel"]).reshape(5, 12)
    np.testing.assert_allclose(x @ linear["key.kernel"].T, there, atol=1e-6)
    back = np.einsum("thk,hkd->td", x.reshape(5, 3, 4), weights["output.kernel"])
    np.testing.assert_allclose(x @ linear["output.kernel"].T, back, atol=1e-6)
    packed = pack(linear)
    assert packed["packed.kernel"].shape == (36, 12)
    again = from_linear(unpack(packed), weights)
    assert again.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(again[name], weight)


# Measuring.


def test_rounds_are_interleaved_and_disturbed_ones_made_up_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    noise = iter([0.0, 0.0, 0.5, 0.0, 0.0, 0.01, None, None])

    def sample(call: Callable[[], Any], count: int) -> Sample:
        assert count == 3
        return Sample(call(), next(noise))

    monkeypatch.setattr(measure, "sample", sample)
    monkeypatch.setattr(measure, "calls_for", lambda call: 3)
    calls = [lambda: order.append("A") or 1.0, lambda: order.append("B") or 2.0]
    first, second = interleaved(calls, 3, budget=1e9)
    assert "".join(order) == "ABABABAB"
    assert [one.seconds for one in first] == [1.0] * 4
    assert [one.foreign for one in second] == [0.0, 0.0, 0.01, None]


@pytest.mark.parametrize(
    ("noise", "ticks", "rounds"), [(1.0, 0.0, 10), (0.0, 0.0, 5), (1.0, 11.0, 3), (0.0, 11.0, 3)]
)
def test_rounds_end_at_twice_the_wanted_or_when_the_time_is_up(
    noise: float, ticks: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(np.arange(100) * ticks)
    monkeypatch.setattr(measure, "sample", lambda call, count: Sample(1.0, noise))
    (found,) = interleaved([int], 5, budget=10.0, clock=lambda: float(next(now)))
    assert len(found) == rounds


def test_slow_layer_far_behind_the_others_has_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "sample", lambda call, count: Sample(call(), 0.0))
    calls = [lambda: 0.1, lambda: 0.4, lambda: 0.9, lambda: 1.1]
    assert [len(one) for one in interleaved(calls, 4, budget=1e9)] == [4, 4, 4, 1]
    calls = [lambda: 0.001, lambda: 0.4]  # far behind, but quick
    assert [len(one) for one in interleaved(calls, 4, budget=1e9)] == [4, 4]


def test_sample_tells_the_seconds_of_one_call_and_what_others_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([10.0, 10.5])
    own, everyone = iter([3.0, 3.4]), iter([7.0, 7.9])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(measure.time, "process_time", lambda: next(own))
    monkeypatch.setattr(measure, "counter", lambda: (lambda: next(everyone), 0.1))
    called: list[int] = []
    found = measure.sample(lambda: called.append(1), 5)
    assert len(called) == 5
    assert found.seconds == pytest.approx(0.1)
    assert found.foreign == pytest.approx((0.9 - 0.4 - 0.1) / 0.5)


def test_sample_has_no_mark_where_nothing_tells_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "counter", lambda: (None, 0.0))
    assert measure.sample(int, 1).foreign is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the counters")
def test_counter_counts_the_work_of_this_process() -> None:
    read, _ = measure.counter()
    assert read is not None
    before, own = read(), time.process_time()
    while time.process_time() - own < 0.1:
        pass
    assert read() - before > 0.05


@pytest.mark.skipif(not CLEAR_REFS, reason="only Linux tells it")
def test_peak_memory_is_that_of_the_call_again_and_again() -> None:
    size = 12 << 20  # small enough that the allocator would keep it, far above Linux's batches

    def call() -> np.ndarray:
        return [np.ones(size, np.uint8), np.ones(2 * size, np.uint8)][0]

    for _ in range(3):
        found = peak_memory(call)
        assert found is not None
        assert 2.7 * size < found < 3.5 * size  # Linux counts pages in batches of each processor


def test_peak_memory_is_not_told_where_the_system_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, text: str) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert peak_memory(int) is None


# What follows from the samples.


def timing(name: str, *seconds: float, foreign: float = 0.0, memory: int | None = None) -> Timing:
    layer, _, rest = name.partition(", ")
    form, _, option = rest.partition("; ")
    return Timing(layer, form, option, seconds, [foreign] * len(seconds), memory, 0.1)


def test_median_is_of_the_undisturbed_samples_where_there_are_enough() -> None:
    one = Timing("peer", seconds=[1.0, 2.0, 3.0, 90.0], foreign=[0.0, FOREIGN, None, 0.5])
    assert (one.median, one.disturbed) == (2.0, False)
    few = Timing("peer", seconds=[1.0, 2.0, 3.0, 90.0], foreign=[0.0, 0.5, 0.0, 0.5])
    assert (few.median, few.disturbed) == (2.5, True)
    assert Timing("peer", fault="gone").median == math.inf


def test_ratio_and_spread_of_planted_samples() -> None:
    ours = timing("anymha", 1.0, 2.0, 3.0, 4.0, memory=10 << 20)
    peer = timing("peer", 4.0, 4.0, 4.0, 4.0, memory=40 << 20)
    assert ratio(ours, peer) == 0.625
    assert ratio(ours, peer, "memory") == 0.25
    assert spread(ours, peer) == (0.4375, 0.8125)
    assert ratio(ours, None) is ratio(ours, Timing("peer", fault="gone")) is None
    assert ratio(ours, timing("peer", 1.0), "memory") is None
    assert ratio(timing("anymha", 1.0, memory=0), timing("peer", 1.0, memory=0), "memory") == 1.0


def result(name: str, *timings: Timing, framework: str = "torch") -> CaseResult:
    (case,) = [case for case in CASES if case.name == name]
    return CaseResult(framework, case, timings)


def test_best_form_of_ours_stands_beside_the_best_peer() -> None:
    found = result(
        "m1k", timing("anymha", 5.0), timing("anymha, jit", 3.0), timing("anymha, jit; x", 1.0),
        timing("a", 4.0), timing("b", 2.0), Timing("c", fault="gone"),
    )  # fmt: skip
    assert (found.best_own.name, found.best_peer.name) == ("anymha, jit", "b")
    rows = {row["name"]: row["ratio"] for row in found.to_dict()["layers"]}
    assert rows == {
        "anymha": 2.5, "anymha, jit": 1.5, "anymha, jit, x": 0.5, "a": 2.0, "b": 1.0, "c": None
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_reproducible_mode_is_timed_beside_the_plain_one(mode: str) -> None:
    case = Case("exact", **SMALL, mode=mode, exact=True, peers=False)
    held = run_case(numpy_layers, HERE, case, repeats=1, budget=1.0)
    plain, exact = (from_dict(one) for one in held["timings"])
    assert (plain.option, exact.option) == ("", EXACT)
    assert exact.fault == plain.fault == ""
    assert exact.error is not None
    assert plain.error is not None
    assert 0 <= exact.error <= plain.error <= 1
    assert CaseResult("numpy", case, [plain, exact]).best_own == exact


def test_price_of_the_reproducible_mode_is_beside_ours_without_it() -> None:
    found = result("m1k-exact", timing("anymha", 2.0), timing(f"anymha, ; {EXACT}", 5.0))
    assert ratio(found.best_own, found.best_peer) == 2.5


@pytest.mark.parametrize(
    ("seconds", "value", "met", "close"),
    [
        ([1.9, 1.9, 1.9], 0.95, True, False),
        ([2.5, 2.5, 2.5], 1.25, False, False),
        ([1.5, 2.1, 2.5], 1.05, False, True),
    ],
)
def test_goal_is_met_where_the_ratio_is_no_more(
    seconds: list[float], value: float, met: bool, close: bool
) -> None:
    found = result(
        "m1k", timing("anymha", *seconds), timing("Linear + SDPA", 2.0, 2.0, 2.0),
        timing("torch.nn.MultiheadAttention", 8.0, 8.0, 8.0),
    )  # fmt: skip
    first, second = judge(found)
    assert (first.value, first.met, first.close) == (pytest.approx(value), met, close)
    assert first.goal.told == "against Linear + SDPA"
    assert (second.value, second.met) == (pytest.approx(value / 4), True)


def test_goals_of_memory_amounts_forms_and_our_own_dropout() -> None:
    memory = result("l4k", timing("anymha", 1.0, memory=4 << 20),
                    timing("flax, jit", 1.0, memory=100 << 20), framework="jax")  # fmt: skip
    assert {v.goal.quantity: v.value for v in judge(memory)} == {"time": 1.0, "memory": 0.04}

    long = result("x8k", timing("anymha", 1.0, memory=101_000_000))
    assert [(v.value, v.met) for v in judge(long)] == [(101.0, False)]

    tiny = result(
        "tiny", timing("anymha", 1.2e-4), timing("anymha, jit", 8e-5), timing("keras", 9e-5),
        timing("flax, jit", 1e-4), framework="jax",
    )  # fmt: skip
    assert {v.goal.told: (pytest.approx(v.value), v.met) for v in judge(tiny)} == {
        "eager microseconds": (120, True),
        "compiled microseconds": (80, False),
        "eager against compiled best peer": (1.2, True),
    }

    dropout = result(
        "s128-train-dropout", timing("anymha", 1.2), timing(f"anymha, ; {NATIVE}", 1.0)
    )
    assert [(v.goal.told, v.value, v.met) for v in judge(dropout)] == [
        ("against native dropout", 1.2, False)
    ]


def test_every_goal_is_of_a_case_and_a_peer_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {case.name: case for case in CASES}
    for goal in GOALS:
        case = replace(cases[goal.case], batch=1, length=4)
        for framework in [goal.framework] if goal.framework else ["numpy", "torch"]:
            module = worker.framework_module(framework)
            monkeypatch.setattr(module, "installed", lambda package: True, raising=False)
            timings = [
                replace(timing("x", 1.0, memory=1), layer=e.layer, form=e.form, option=e.option)
                for e in module.entries(make_problem(case), "cpu")
            ]
            assert goal in [v.goal for v in judge(CaseResult(framework, case, timings))], goal


def test_goal_without_its_peer_is_not_judged() -> None:
    assert judge(result("m1k", timing("anymha", 1.0)), [Goal("torch", "m1k", 1.0)]) == []
    assert judge(result("m1k", timing("peer", 1.0)), [Goal("torch", "m1k", 1.0)]) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5.04e-5, "50.4 us"), (0.9996e-3, "1.00 ms"), (0.1234, "123 ms"), (1.5, "1.50 s")],
)
def test_duration_has_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
