"""The conformance kit is checked: planted faults must be found, by the tests that name them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from anymha.framework.registry import get_backend
from anymha.testing import Conformance
from anymha.testing.capabilities import compiler_of
from tests.backends.faults import CAPABILITIES, FAULTS, FUNCTIONS, Fault, refuse, refuse_capability

TESTS = [name for name, _ in inspect.getmembers(Conformance) if name.startswith("test_")]
MISSING = [
    Fault(
        f"{name} raises",
        refuse(name),
        tuple(test for test in TESTS if f"_{name}_" in test),
        base="torch" if name == "vjp" else "numpy",
    )
    for name in FUNCTIONS
]
RAISING = [
    Fault(
        f"capability {name} raises",
        refuse_capability(name),
        tuple(test for test in TESTS if test.startswith(f"test_{name}_")),
    )
    for name in CAPABILITIES
    if name
    not in (
        *FUNCTIONS,
        "eager_loop",
        "writes_in_place",
        "fused_sinks",
        "initializer_style",
    )  # the last are not called
]
PLANTED = [fault for fault in (*FAULTS, *MISSING, *RAISING) if get_backend(fault.base).installed]


class Faulty(Conformance):
    """The tests of a planted fault, which is in `fault`."""

    __test__ = False
    fault: Fault

    @pytest.fixture
    def compiler(self, ops: Any) -> Any:
        return self.fault.compiler or compiler_of(ops)


class Recorder:
    """Runs only the tests that a fault names, and keeps what became of them."""

    def __init__(self) -> None:
        self.failures: dict[tuple[str, str], list[str]] = {}

    def pytest_pycollect_makeitem(self, collector: Any, name: str, obj: Any) -> list[Any] | None:
        fault = getattr(collector.obj, "fault", None)  # of a class; to make all items takes long
        others = fault is not None and name in TESTS and name not in fault.tests
        return [] if others else None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            item.repr_failure = lambda *args: ""  # takes longer than the tests

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            key = (item.cls.fault.name, item.originalname)
            self.failures.setdefault(key, []).append(str(call.excinfo.value))


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    """The messages of the tests that failed, by fault and test."""
    folder: Path = tmp_path_factory.mktemp("faults")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_faulty_backends.py").write_text(
        "from tests.test_conformance_faults import PLANTED, Faulty\n"
        "for i, fault in enumerate(PLANTED):\n"
        "    members = {'fault': fault, 'backend': fault.backend, '__test__': True}\n"
        "    globals()[f'Test{i}'] = type(f'Test{i}', (Faulty,), members)\n"
    )
    recorder = Recorder()
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:xdist", "-s"]
    pytest.main([str(folder), "-c", str(folder / "pytest.ini"), *quiet], plugins=[recorder])
    return recorder.failures


def need(fault: Fault) -> None:
    if fault not in PLANTED:
        pytest.skip(f"{fault.base} is not installed")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found_by_each_test_that_is_about_it(failures: Any, fault: Fault) -> None:
    need(fault)
    missed = [test for test in fault.tests if (fault.name, test) not in failures]
    assert not missed, f"{fault.name}: not found by {missed}"


@pytest.mark.parametrize("fault", [*MISSING, *RAISING], ids=lambda fault: fault.name)
def test_function_that_raises_is_found_by_a_test_of_its_name(failures: Any, fault: Fault) -> None:
    need(fault)
    assert any((fault.name, test) in failures for test in fault.tests), f"named: {fault.tests}"


def test_message_says_what_was_called_expected_and_received(failures: Any) -> None:
    assert failures["max ignores keepdims", "test_max_over_an_axis"][0] == (
        "ops.max(float32 (3, 4, 5), axis=-1, keepdims=True) must have shape (3, 4, 1). "
        "Received: shape (3, 4)."
    )
    assert failures["where swaps its branches", "test_where_takes_a_scalar"][0].startswith(
        "ops.where(bool (3,), float32 (2, 3), 0.0) must give "
    )
    message = failures["matmul in half precision", "test_layer_agrees_with_the_oracle"][0]
    assert message.startswith("numpy, case 'self': output is off by "), message


def test_message_says_what_a_capability_gave(failures: Any) -> None:
    message = failures["linear without bias", "test_linear_is_tensordot_and_bias"][0]
    assert message.startswith("ops.capabilities.linear(float32 (6, 40), float32 (40, 5), float32 ")


def test_each_test_of_the_kit_finds_some_fault() -> None:
    assert {test for fault in FAULTS for test in fault.tests} == set(TESTS)
