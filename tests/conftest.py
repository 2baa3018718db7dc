"""The backends that the tests run on, how hypothesis draws, and which files start first.

A framework that is not installed skips its tests, with the reason printed. The variable
``ANYMHA_EXPECT_BACKENDS="numpy,torch"`` names those that must be there: a missing one fails.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported anywhere
# PyTorch's threads wait without spinning, which takes two thirds of the processor where workers
# of pytest share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

from anymha.framework.registry import Backend, get_backend
from tests.frameworks import EXPECTED, skip_or_fail

FOLDED = 3
"""Of how many calls `folded_once` keeps what mistakes make of them."""

BACKENDS = ("numpy", "torch", "tensorflow", "jax")

# These take longest: where workers share the files, none starts one of them when the others end.
LONG = ("test_keras_layer.py", "test_conformance.py", "test_torch_tools.py", "test_semantics.py",
        "test_adapters.py", "test_selftest.py", "test_jax_half.py")  # fmt: skip

PROGRAMS = 200
"""How many programs of JAX share a context of MLIR, which keeps all their types and constants."""

FINISHED: list[str] = []
"""The tests that have ended in this process."""

GROWN = 500 << 20
"""When the process has grown by so many bytes, all garbage is searched for,"""

SEARCHED = [0]
"""and so great it was after each search."""

settings.register_profile("anymha", max_examples=8, deadline=None, derandomize=True, database=None)
settings.load_profile("anymha")


def usable(name: str) -> Backend:
    """The backend of that name, its framework imported; else skips the test, or fails it."""
    found = get_backend(name)
    if not found.installed:
        skip_or_fail(name, f"{found.framework} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks, while they are imported
        assert found.ops.name == name
    return found


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn, with its framework imported."""
    return usable(request.param)


@pytest.fixture
def quick_programs(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The compilers of JAX and TensorFlow work for less long: no more than the rounding changes.

    For tests that hold results against others within rounding, where compiling is most of the
    time. What must not depend on the compiler, bits and excluded positions, has tests without it,
    or with the mark `as_users_compile` in a file that has it.
    """
    if request.node.get_closest_marker("as_users_compile"):
        yield
        return
    option = "jax_disable_most_optimizations"
    before = os.environ.get(option.upper(), "0")
    monkeypatch.setenv(option.upper(), "1")  # for a JAX that the test imports
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(option, True)
        compiler = importlib.import_module("jax._src.compiler")
        options_of: Any = getattr(compiler, "get_compile_options", None)  # JAX's own affair

        def quicker(*args: Any, **named: Any) -> Any:
            options = options_of(*args, **named)
            options.env_option_overrides += [("xla_cpu_use_fusion_emitters", False)]
            return options

        if options_of is not None:
            monkeypatch.setattr(compiler, "get_compile_options", quicker)
    optimizer = sys.modules["tensorflow"].config.optimizer if "tensorflow" in sys.modules else None
    if optimizer is not None:
        optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    if optimizer is not None:
        optimizer.set_experimental_options({"disable_meta_optimizer": False})
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(option, before == "1")


@pytest.fixture(scope="session", autouse=True)
def unhurried() -> Iterator[None]:
    """`compare` searches as long as it takes: what it finds is tested, not how fast this is."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("anymha.parity.diagnose.diagnosis.ALONE_SECONDS", 600.0)
        patched.setattr("anymha.parity.diagnose.diagnosis.PARTS_SECONDS", 60.0)
        patched.setattr("anymha.parity.diagnose.diagnosis.PAIRS_SECONDS", 60.0)
        yield


@pytest.fixture
def no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two mistakes together and none in a part, where one is the cause or none is asked for."""
    for name in ("PARTS_SECONDS", "PAIRS_SECONDS", "CALLS_SECONDS"):
        monkeypatch.setattr(f"anymha.parity.diagnose.diagnosis.{name}", 0.0)


@pytest.fixture(scope="module")
def folded_once() -> Iterator[None]:
    """`compare` knows of calls alike one right recipe, and what mistakes make of it.

    For many faults in one call, which only what is reported tells apart. Of the last calls alone:
    what is made of one takes 200 MB.
    """
    module = importlib.import_module("anymha.parity.comparison.compare")
    fold: Any = module.fold
    kept: dict[bytes, Any] = {}

    def folded(problem: Any) -> Any:
        key = pickle.dumps(problem)
        if key not in kept:
            while len(kept) >= FOLDED:
                del kept[next(iter(kept))]
            kept[key] = fold(problem)
        return kept[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "fold", folded)
        yield


@pytest.fixture(scope="session")
def installed() -> list[Backend]:
    """All backends that are installed, with their frameworks imported; expected ones must be."""
    return [usable(name) for name in BACKENDS if get_backend(name).installed or name in EXPECTED]


def pytest_runtest_setup() -> None:
    """Keep frameworks that are imported from making again what no result depends on.

    TensorFlow walks the deep stack of a test for each node that it makes, to say in errors where:
    a fifth of the time of its tests. JAX loads all dialects of MLIR for each program: a quarter.
    """
    for module, name, reused in (
        ("tensorflow.python.util.tf_stack", "extract_stack", cache),
        ("jax._src.interpreters.mlir", "make_ir_context", in_turn),
    ):
        make: Any = getattr(sys.modules.get(module), name, None)  # the frameworks' own affair
        if make is not None and not hasattr(make, "__wrapped__"):
            setattr(sys.modules[module], name, reused(make))


def in_turn(make: Callable[[], Any]) -> Callable[[], Any]:
    """A function that gives a context of MLIR to so many programs, then makes another.

    A program that is compiled while another is built, and would be built into it, has its own.
    """
    contexts: Any = importlib.import_module("jax._src.lib.mlir").ir.Context
    made: Any = None
    calls = itertools.count()

    @wraps(make)
    def given() -> Any:
        nonlocal made
        if contexts.current is not None:
            return make()
        if next(calls) % PROGRAMS == 0:
            made = make()
        return made

    return given


@pytest.hookimpl(trylast=True)  # after pytest's own order, by the parameters of fixtures
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the long files first."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from searching the frameworks' objects again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # Python's own 700, 10 and 10 take a twentieth of the time


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Likewise what tests leave: JAX keeps the programs, a million objects after some files.

    Searching them took a tenth of the whole run. Cycles that are garbage are collected before. What
    becomes garbage later is searched for where the process has grown.
    """
    FINISHED.append(nodeid)
    if len(FINISHED) % 20 == 0:
        grown = resident() > SEARCHED[-1] + GROWN
        if grown:
            gc.unfreeze()
        gc.collect(2 if grown else 1)
        gc.freeze()
        if grown:
            SEARCHED.append(resident())


def resident() -> int:
    """The resident memory of this process in bytes, where Linux tells it; else 0."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if told.exists() else 0
