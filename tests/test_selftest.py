"""Injected faults are caught and named, in every framework; correct layers are not blamed."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from anymha.framework.registry import Backend, get_backend
from anymha.parity.diagnose.mistakes import catalogue
from anymha.parity.oracle.features import SECTIONS
from tests import decoding_port
from tests.conftest import usable
from tests.frameworks import EXPECTED, skip_or_fail
from tests.selftest import command, injected_faults, injection
from tests.selftest.command import main
from tests.selftest.injected_faults import FAULTS
from tests.selftest.injection import DTYPES, can_be_combined, find_false_alarms, try_faults

pytestmark = pytest.mark.usefixtures("quick_programs", "folded_once")


def test_every_mistake_of_the_catalogue_is_injected() -> None:
    options = [
        fault for section in SECTIONS.values() for fault in injected_faults.option_faults(section)
    ]
    causes = {fault.cause for fault in (*FAULTS, *options, *decoding_port.FAULTS)}
    several = {"axes exchanged"}  # of inputs with several axes: see test_diagnose_orders.py
    assert {mistake.name for mistake in catalogue()} <= causes | several
    assert len({fault.wrong for fault in FAULTS}) == len(FAULTS)


# The search for a cause is NumPy's whatever the framework: each fault is in one of them, in turn,
# and least often in the one that compiles. `python -m tests.selftest` has all in all.
TURNS = ("numpy", "torch", "tensorflow", "jax", "numpy", "torch", "tensorflow", "torch")
PLACED = [(fault, TURNS[number % len(TURNS)]) for number, fault in enumerate(FAULTS)]


@pytest.mark.parametrize(
    ("fault", "name"), PLACED, ids=[f"{name}-{fault.wrong}" for fault, name in PLACED]
)
def test_an_injected_fault_is_caught_and_named(fault: injected_faults.Fault, name: str) -> None:
    there = get_backend(name).installed or name in EXPECTED
    found = try_faults(usable(name if there else "numpy"), (fault,), reports_stages=True)
    assert (found.caught, found.stage, found.cause) == (True, True, True), found.verdict


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.wrong)
def test_it_is_named_where_outputs_and_scores_alone_are_reported(
    fault: injected_faults.Fault,
) -> None:
    found = try_faults(get_backend("numpy"), (fault,), reports_stages=False, seed=3)
    assert (found.caught, found.stage, found.cause) == (True, True, True), found.verdict


def some_pairs() -> list[tuple[injected_faults.Fault, injected_faults.Fault]]:
    """Pairs in which each fault that can be combined is at least once."""
    every = [(a, b) for i, a in enumerate(FAULTS) for b in FAULTS[i + 1 :] if can_be_combined(a, b)]
    random.Random(0).shuffle(every)
    chosen, seen = [], set()
    for new in (2, 1):
        for pair in every:
            names = {fault.wrong for fault in pair}
            if len(names - seen) >= new:
                chosen.append(pair)
                seen |= names
    return chosen


@pytest.mark.parametrize("pair", some_pairs(), ids=lambda p: f"{p[0].wrong}, {p[1].wrong}")
def test_of_two_mistakes_the_first_is_named(
    pair: tuple[injected_faults.Fault, injected_faults.Fault],
) -> None:
    found = try_faults(get_backend("numpy"), pair, reports_stages=True)
    assert found.caught
    assert found.cause, found.verdict


@pytest.fixture
def at_once(installed: list[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX compiles a gradient as one program, which takes less time than each operation."""
    for ops in (backend.ops for backend in installed if backend.name == "jax"):
        jax, vjp = importlib.import_module("jax"), ops.capabilities.vjp

        def compiled(function: Any, *arrays: Any, jax: Any = jax, vjp: Any = vjp) -> Any:
            options = {"xla_backend_optimization_level": 0}
            return jax.jit(functools.partial(vjp, function), compiler_options=options)(*arrays)

        monkeypatch.setattr(
            ops, "capabilities", dataclasses.replace(ops.capabilities, vjp=compiled)
        )


HALF = ("float16", "bfloat16")  # where programs may round at other places than the formula


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(n, marks=[pytest.mark.as_users_compile] * (n in HALF)) for n in DTYPES],
)
def test_correct_layers_are_not_blamed(dtype: str, installed: list[Backend]) -> None:
    first = {"gradients_of": lambda number: number == 0}  # those of JAX are slow to compile
    quick = [backend for backend in installed if backend.name != "jax"]
    for backends, numbers in ((installed, range(2)), (quick, range(2, 4))):
        for alarms in find_false_alarms(backends, numbers, [dtype], **first):
            assert not alarms, alarms[0].text


SUBTLE = ("scale by the value's width", "output bias left out", "window wider", "rotary pairs",
          "value bias of the key", "no softmax", "next key seen")  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("wrong", SUBTLE)
def test_an_injected_fault_is_caught_in_half_precision(wrong, dtype) -> None:
    """In one dtype with its stages, in the other with its output and scores alone."""
    torch = get_backend("torch")
    if not torch.installed:
        skip_or_fail("torch", "torch is not installed")
    [fault] = [fault for fault in FAULTS if fault.wrong == wrong]
    half = dataclasses.replace(fault, dtype=dtype)
    reports_stages = (SUBTLE.index(wrong) % 2 == 0) == (dtype == "float16")
    found = try_faults(torch, (half,), reports_stages)
    assert (found.caught, found.stage, found.cause) == (True, True, True), found.verdict


def test_the_command_passes_and_writes_what_it_found(tmp_path, monkeypatch, capsys) -> None:
    few = FAULTS[:2]
    monkeypatch.setattr(command, "FAULTS", few)
    monkeypatch.setattr(injection, "FAULTS", few)
    path = tmp_path / "selftest.json"
    call = [
        "--backends",
        "numpy",
        "--honest",
        "2",
        "--dtypes",
        "float16",
        "--json",
        str(path),
    ]
    assert main(call) == 0
    told = capsys.readouterr().out
    assert "4 of 4 caught, the first stage right in 4, the cause in 4." in told
    assert "SELF-TEST PASSES" in told
    report = json.loads(path.read_text())
    assert (report["passed"], len(report["faults"]), report["alarms"]) == (True, 4, [])


def test_the_command_fails_where_a_mistake_is_not_caught(monkeypatch, capsys) -> None:
    harmless = injected_faults.Fault("nothing at all", "inverted mask", "masked_logits")
    monkeypatch.setattr(command, "FAULTS", (harmless,))
    monkeypatch.setattr(injection, "FAULTS", (harmless,))
    assert main(["--backends", "numpy", "--honest", "0"]) == 1
    assert "SELF-TEST FAILS" in capsys.readouterr().out


def test_the_command_fails_where_a_correct_layer_is_blamed(monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "FAULTS", FAULTS[:1])
    monkeypatch.setattr(injection, "FAULTS", FAULTS[:1])
    alarm = injection.Alarm("float32", ("numpy", "numpy"), 0, "the whole text")
    monkeypatch.setattr(command, "find_false_alarms", lambda *_: iter([[alarm]]))
    assert main(["--backends", "numpy", "--honest", "1"]) == 1
    assert "the whole text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["--backends", "nothing"], "nothing"),
        (["--dtypes", "float32,int8"], "`--dtypes` are of float32, float64, float16, bfloat16."),
        (["--honest", "-1"], "`--honest` must be 0 or more. Received: -1."),
        (["--backends", "numpy", "--json", "."], "cannot be written: it is a folder"),
    ],
)
def test_a_wrong_call_is_told_before_anything_runs(call, words, capsys) -> None:
    assert main(call) == 2
    assert words in capsys.readouterr().err.replace("\n", "")


def test_the_page_lists_the_catalogue() -> None:
    page = (Path(__file__).parents[1] / "docs/mistakes.md").read_text(encoding="utf-8")
    table = page.partition("## The self-test")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    expected = [f"| {m.name} | {m.fix.replace('|', '&#124;')} |" for m in catalogue()]
    assert rows == list(dict.fromkeys(expected))
