"""What a call costs beside its products, in two trees of the project.

A tree is a folder that has `anymha` and `backends`: this checkout ("after"), and with --against
another one ("before"), such as a worktree of an earlier commit:

    git worktree add ../before HEAD~5
    python -m benchmarks.calls --against ../before

A process can import only one `anymha`, so each tree runs in a process of its own for each
framework. A round is a few short pieces, in each of which one tree computes and then the other,
and the order is swapped from piece to piece; a ratio is after/before of one round, and the table
has the median and the quartiles over the rounds. So what disturbs the machine disturbs both.
Layers of both trees have the same weights and must give the same values, to 1e-5, before a clock
is started. Everything is float32 and eager; JAX and TensorFlow are waited for at each call, torch
runs under `no_grad` but in the case that ends in -gradients.

By default each process has one thread, and a time is the processor time that it took: what others
do meanwhile then counts little, and small products gain nothing from threads. With more threads,
or to see what waiting costs: --threads 2 --clock wall.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anymha.cli.process import run_process
from anymha.errors import UsageError
from anymha.framework.registry import get_backend
from anymha.interchange.files.atomic_write import check_writable, write_atomically
from benchmarks.cases import Arrays, Case, make_problem
from benchmarks.command import listed
from benchmarks.processes import WorkerError, end_of, environment, machine
from benchmarks.results import quartiles
from benchmarks.terminal import new_table, progress

SCHEMA = "anymha.calls/1"
HERE = Path(__file__).resolve().parents[1]
FRAMEWORKS = ("numpy", "torch", "jax", "tensorflow")
USUAL = ("numpy", "torch")
COMPILING = ("jax", "tensorflow")
"""Each new shape is compiled there, once for a process: a length is new only the first time."""

SLOWING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Variables that some machines set, and that make NumPy's products twice as slow."""

CLOCKS = {"processor": "process_time", "wall": "perf_counter"}
THREADS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)  # fmt: skip
XLA_ALONE = "--xla_cpu_multi_thread_eigen=false"
TOLERANCE = 1e-5
PIECE = 32
"""Calls that one tree makes before the other has its turn, where each has another length."""

PIECES = 8
"""Into how many pieces a round of the same calls is cut."""

NUMBERED = ("1st", "2nd", "3rd", "4th")


@dataclass(frozen=True)
class Calls:
    """A kind of call, and how it is timed.

    Args:
        name: Its name, as `--cases` has it.
        told: What it is, for `--help`.
        way: "again": the same call again and again; "sweep": a key more at every call; "new":
            another length at every call; "first": the first calls of a layer.
        batch: B, likewise the length T, the features D and the heads H.
        mask: "causal", or "padding" for a `value_mask`.
        cross: Whether the value is another array than the query.
        scores: Whether the probabilities are returned.
        gradients: Whether torch records what gradients need; only torch has the case, then.
    """

    name: str
    told: str
    way: str = "again"
    batch: int = 1
    length: int = 16
    features: int = 64
    heads: int = 4
    mask: str = "none"
    cross: bool = False
    scores: bool = False
    gradients: bool = False

    def lengths(self, framework: str) -> list[int] | None:
        """The length at each call of a pass; None where all are `length`."""
        compiling = framework in COMPILING
        if self.way == "sweep":
            return list(range(1, 65 if compiling else self.length))
        if self.way == "new":
            mixed = np.random.default_rng(3).permutation(np.arange(1, self.length)).tolist()
            return mixed[:24] if compiling else mixed
        return None

    def to_case(self, framework: str) -> tuple[Any, ...]:
        """The arguments of the worker's `prepare`."""
        case = Case(self.name, self.batch, self.length, self.features, self.heads, mask=self.mask)
        problem = make_problem(case)
        arrays: Arrays = {"query": problem.x}
        if self.cross or self.way == "sweep":
            arrays["value"] = problem.cotangent  # other numbers of the same shape
        if self.way == "sweep":
            arrays["query"] = problem.x[:, :1].copy()
        if problem.padding is not None:
            arrays["value_mask"] = problem.padding
        options = {
            "num_heads": case.heads, "key_dim": case.key_dim, "query_features": case.features,
            "seed": 0,
        }  # fmt: skip
        flags = {"use_causal_mask": self.mask == "causal", "return_attention_scores": self.scores}
        flags = {name: True for name, is_on in flags.items() if is_on}
        return (
            options, problem.weights, arrays, flags,
            ("value",) if self.way == "sweep" else ("query",), self.lengths(framework),
            self.gradients,
        )  # fmt: skip


CALLS = (
    Calls("small", "self-attention, B 1, T 16, D 64, H 4, the same call again and again"),
    Calls("small-causal", "the same with a causal mask", mask="causal"),
    Calls("small-mask", "the same with a value_mask", mask="padding"),
    Calls("small-cross", "the same with another array as value", cross=True),
    Calls("small-scores", "the same with the probabilities returned", scores=True),
    Calls("small-gradients", "`small` with torch's gradient mode on", gradients=True),
    Calls(
        "decode",
        "a query of length 1 against keys of length 1, 2, .. 511 (JAX, TensorFlow: .. 64): the "
        "first sweep of a fresh layer, and the second",
        "sweep", length=512,
    ),
    Calls(
        "new-lengths",
        "self-attention by a fresh layer, with a length that it has not seen at every call: 1 to "
        "400 in mixed order (JAX, TensorFlow: 24 of them, new to the process too)",
        "new", length=401,
    ),
    Calls(
        "causal-1024",
        "causal self-attention, B 2, T 1024, D 512, H 8: each of the first four calls of a layer",
        "first", batch=2, length=1024, features=512, heads=8, mask="causal",
    ),
)  # fmt: skip


@dataclass
class Row:
    """What was measured of one kind of call.

    Args:
        framework: In which framework.
        name: The case, and which of its calls.
        seconds: Of a call in each round, for each tree; one tree alone is this checkout.
        fault: Why it was not timed.
    """

    framework: str
    name: str
    seconds: list[list[float]] = field(default_factory=list)
    fault: str = ""

    @property
    def medians(self) -> list[float]:
        """Of each tree."""
        return [statistics.median(one) for one in self.seconds if one]

    @property
    def ratios(self) -> list[float]:
        """After/before, of each round."""
        if len(self.seconds) < 2:
            return []
        before, after = self.seconds
        return [b / a for a, b in zip(before, after, strict=True)]

    def to_dict(self, labels: Sequence[str]) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "framework": self.framework, "case": self.name, "fault": self.fault,
            "seconds": dict(zip(labels, self.seconds, strict=False)),
            "median": dict(zip(labels, self.medians, strict=False)),
            "ratio": statistics.median(self.ratios) if self.ratios else None,
            "quartiles": quartiles(self.ratios) if self.ratios else None,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tree:
    """A process that runs one tree's layer in one framework.

    Args:
        process: It.
        errors: What it prints.
    """

    process: subprocess.Popen[bytes]
    errors: IO[str]

    def send(self, method: str, *arguments: Any) -> None:
        """Tell the worker to do something."""
        pipe: Any = self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # `receive` says why
            pickle.dump((method, arguments), pipe)
            pipe.flush()

    def receive(self) -> Any:
        """What the worker gives.

        Raises:
            WorkerError: it could not do it, or its process ended.
        """
        pipe: Any = self.process.stdout
        try:
            good, answer = pickle.load(pipe)
        except EOFError:
            raise WorkerError(end_of(self.errors, self.process.wait())) from None
        if not good:
            raise WorkerError(answer)
        return answer

    def ask(self, method: str, *arguments: Any) -> Any:
        """Have the worker do something, and give what it gives."""
        self.send(method, *arguments)
        return self.receive()


def with_threads(framework: str, threads: int) -> dict[str, str]:
    """The variables of a process of a framework that has so many threads."""
    variables = environment(framework, "cpu") | {"PYTHONHASHSEED": "0"}
    variables |= dict.fromkeys(THREADS, str(threads))
    if threads == 1:
        variables["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"  # no hand-over to another thread
        variables["XLA_FLAGS"] = f"{variables.get('XLA_FLAGS', '')} {XLA_ALONE}".strip()
    for name in SLOWING:
        variables.pop(name, None)
    return variables


@contextlib.contextmanager
def tree_process(folder: Path, framework: str, clock: str, threads: int) -> Iterator[Tree]:
    """A process for one tree."""
    worker = Path(__file__).with_name("call_worker.py")
    arguments = [str(worker), str(folder), framework, CLOCKS[clock]]
    variables = with_threads(framework, threads)
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=variables,
        ) as process,
    ):  # fmt: skip
        try:
            yield Tree(process, errors)
        finally:
            process.kill()


@contextlib.contextmanager
def processes(
    folders: Sequence[Path], framework: str, clock: str, threads: int
) -> Iterator[list[Tree]]:
    """A process for each tree."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(tree_process(folder, framework, clock, threads))
            for folder in folders
        ]


def prepare(calls: Calls, trees: Sequence[Tree], framework: str) -> None:
    """Give the trees a case's arrays.

    Raises:
        WorkerError: a tree cannot run it, or they give different values.
    """
    arguments = calls.to_case(framework)
    for tree in trees:
        tree.send("prepare", *arguments)
    answers = [tree.receive() for tree in trees]
    for arrays in zip(*answers, strict=True):
        worst = max(float(np.max(np.abs(array - arrays[0]))) for array in arrays)
        if not worst <= TOLERANCE:  # NaN is none
            raise WorkerError(f"the trees give different values, by {worst:.2g}")


Seconds = dict[str, list[list[float]]]
"""Of a call: by the row's name, for each tree, in each round."""


class Rounds:
    """Has the trees do the same in small pieces, in turn, and keeps the seconds of each round."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        self.trees = trees
        self.seconds: Seconds = {}
        self._pieces = 0

    def in_turn(self, piece: Callable[[Tree], float]) -> list[float]:
        """What each tree gives; another one begins each time."""
        found = [0.0] * len(self.trees)
        places = range(len(self.trees))
        for place in places[:: -1 if self._pieces % 2 else 1]:
            found[place] = piece(self.trees[place])
        self._pieces += 1
        return found

    def keep(self, name: str, pieces: Sequence[Sequence[float]], calls: int = 1) -> None:
        """Keep a round of several pieces, of so many calls in all."""
        held = self.seconds.setdefault(name, [[] for _ in self.trees])
        for seconds, *own in zip(held, *pieces, strict=True):
            seconds.append(sum(own) / calls)

    def walk(self, name: str, number: int) -> None:
        """A round in which each tree makes its calls once, in pieces."""
        starts = range(0, number, PIECE)
        self.keep(
            name,
            [self.in_turn(lambda tree, i=i: tree.ask("run", 1, i, i + PIECE)) for i in starts],
            number,
        )

    def again(self, name: str, counts: Mapping[Tree, int]) -> None:
        """A round of the same call again and again, so many times in a piece."""

        def piece(tree: Tree) -> float:
            tree.ask("run", 1 + counts[tree] // 10)  # the caches were the other process's
            return tree.ask("run", counts[tree]) / counts[tree]

        self.keep(name, [self.in_turn(piece) for _ in range(PIECES)], PIECES)

    def fresh(self) -> None:
        """Let each tree make a new layer."""
        for tree in self.trees:
            tree.ask("fresh")


def measure(
    calls: Calls, trees: Sequence[Tree], framework: str, rounds: int, burst: float
) -> Seconds:
    """Time a case, for which the trees are prepared.

    Args:
        calls: The case.
        trees: The trees.
        framework: Their framework.
        rounds: The rounds.
        burst: Seconds that a tree computes in a round of the same calls.
    """
    timed, number = Rounds(trees), len(calls.lengths(framework) or ())
    first = f"{calls.name}, 1st sweep" if calls.way == "sweep" else calls.name
    if calls.way == "again":
        counts: dict[Tree, int] = {}
        for tree in trees:
            tree.ask("run", 20)  # a layer may change its way after some calls
            counts[tree] = max(1, round(burst / PIECES * 20 / tree.ask("run", 20)))
        for _ in range(rounds):
            timed.again(calls.name, counts)
    elif calls.way == "first":
        several = rounds // 5 if framework in COMPILING else rounds * 3 // 5
        for _ in range(max(3, several)):
            timed.fresh()
            for which in NUMBERED:
                found = timed.in_turn(lambda tree: tree.ask("run", 1))
                timed.keep(f"{calls.name}, {which} call", [found])
    elif framework in COMPILING:
        for i in range(number):
            timed.keep(first, [timed.in_turn(lambda tree, i=i: tree.ask("run", 1, i, i + 1))])
        for _ in range(rounds if calls.way == "sweep" else 0):
            timed.walk(f"{calls.name}, later sweeps", number)
    else:
        for _ in range(rounds):
            timed.fresh()
            timed.walk(first, number)
            if calls.way == "sweep":
                timed.walk(f"{calls.name}, 2nd sweep", number)
    return timed.seconds


def measured(
    framework: str,
    chosen: Sequence[Calls],
    folders: Sequence[Path],
    options: argparse.Namespace,
    told: Callable[[str, str], None],
) -> list[Row]:
    """The rows of a framework."""
    rows: list[Row] = []
    opened = partial(processes, folders, framework, options.clock, options.threads)
    with opened() as shared:
        for calls in chosen:
            if calls.gradients and framework != "torch":
                continue
            told(framework, calls.name)
            alone = framework in COMPILING and calls.way in ("sweep", "new")
            try:
                with contextlib.ExitStack() as stack:
                    trees = stack.enter_context(opened()) if alone else shared
                    prepare(calls, trees, framework)
                    found = measure(calls, trees, framework, options.rounds, options.burst / 1e3)
                rows += [Row(framework, name, seconds) for name, seconds in found.items()]
            except WorkerError as error:
                rows.append(Row(framework, calls.name, fault=str(error)))
    return rows


def report(framework: str, rows: Sequence[Row], both: bool) -> Table:
    """A framework's table."""
    table = new_table(f"{framework}: us a call")
    table.add_column("case", no_wrap=True)
    titles = ("before", "after", "ratio", "quartiles") if both else ("time", "quartiles")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        if row.fault:
            table.add_row(escape(row.name), *["-"] * len(titles))
            continue
        medians = [_microseconds(seconds) for seconds in row.medians]
        if both:
            low, high = quartiles(row.ratios)
            shown = [*medians, f"{statistics.median(row.ratios):.3f}", f"{low:.3f} - {high:.3f}"]
        else:
            shown = [*medians, " - ".join(map(_microseconds, quartiles(row.seconds[0])))]
        table.add_row(escape(row.name), *shown)
    return table


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.{1 if seconds < 1e-3 else 0}f}"


def compare(options: argparse.Namespace, console: Console) -> int:
    """Measure and report; gives the exit status."""
    began = time.perf_counter()
    chosen, frameworks = _chosen(options.cases), _frameworks(options.frameworks)
    folders = [HERE] if options.against is None else [_tree(options.against), HERE]
    labels = ("before", "after")[-len(folders) :]
    if options.json is not None:
        check_writable(options.json)
    for label, folder in zip(labels, folders, strict=True):
        console.print(f"{label}: {folder}", markup=False, highlight=False, soft_wrap=True)
    rows: list[Row] = []
    with progress(console, len(chosen) * len(frameworks)) as told:
        for framework in frameworks:
            rows += measured(framework, chosen, folders, options, told)
    for framework in frameworks:
        own = [row for row in rows if row.framework == framework]
        console.print()
        console.print(report(framework, own, len(folders) == 2))
    faults = [row for row in rows if row.fault]
    for row in faults:
        console.print(
            f"{row.framework}, {row.name}: not timed: {row.fault}", style="bold red",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    if options.json is not None:
        found = {
            "schema": SCHEMA, "sound": not faults, "machine": machine(),
            "trees": {label: str(folder) for label, folder in zip(labels, folders, strict=True)},
            "options": {
                name: getattr(options, name) for name in ("rounds", "burst", "threads", "clock")
            },
            "seconds": round(seconds, 1), "rows": [row.to_dict(labels) for row in rows],
        }  # fmt: skip
        write_atomically(options.json, json.dumps(found, indent=1, allow_nan=False) + "\n")
    console.print(f"\n{seconds:.0f} s", highlight=False)
    return 1 if faults else 0


def _chosen(patterns: str | None) -> list[Calls]:
    if patterns is None:
        return list(CALLS)
    wanted = listed(patterns)
    for pattern in wanted or [patterns]:
        if not any(fnmatchcase(calls.name, pattern) for calls in CALLS):
            names = ", ".join(calls.name for calls in CALLS)
            raise UsageError(f"`--cases` must be of {names}. Received: {pattern!r}.")
    return [calls for calls in CALLS if any(fnmatchcase(calls.name, one) for one in wanted)]


def _frameworks(text: str | None) -> list[str]:
    if text is None:
        return [name for name in USUAL if get_backend(name).installed]
    names = list(dict.fromkeys(listed(text)))
    for name in names or [text]:
        if name not in FRAMEWORKS:
            raise UsageError(
                f"`--frameworks` must be of {', '.join(FRAMEWORKS)}. Received: {name!r}."
            )
        _ = get_backend(name).ops if not get_backend(name).installed else None  # says how
    return names


def _tree(folder: Path) -> Path:
    for part in ("anymha", "backends"):
        if not (folder / part).is_dir():
            raise UsageError(
                f"`--against` must be a folder with anymha/ and backends/. {folder} has no {part}/."
            )
    return folder.resolve()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, and give the exit status."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.rounds, options.burst = 5, 10.0
    return run_process(lambda: compare(options, Console()))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _parser() -> argparse.ArgumentParser:
    width = max(len(calls.name) for calls in CALLS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calls", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="cases:\n"
        + "\n".join(f"  {calls.name:{width}}  {calls.told}" for calls in CALLS)
        + "\n\nexit status: 0 done; 1 a tree failed, or they give different values; 2 a wrong call",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=Path, metavar="PATH",
        help="the other tree, \"before\"; without it: this checkout's times alone",
    )  # fmt: skip
    parser.add_argument(
        "--frameworks", metavar="A,B",
        help=f"of {', '.join(FRAMEWORKS)}; default: {', '.join(USUAL)}",
    )  # fmt: skip
    parser.add_argument("--cases", metavar="A,B", help="names or patterns; default: all")
    parser.add_argument(
        "--rounds", type=_positive, default=15, metavar="N", help="rounds; default: 15"
    )
    parser.add_argument(
        "--burst", type=float, default=50.0, metavar="MS",
        help="milliseconds of the same call in a round; default: 50",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="of each process; default: 1"
    )
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="processor", help="default: processor"
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds, bursts of 10 ms: a sketch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main())
