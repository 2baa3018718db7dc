"""Damage files and have them read, format by format; keep those that fail."""

from __future__ import annotations

import argparse
import json
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import mutated
from tests.fuzz.samples import LOADED, SAMPLES, Files, installed

SECONDS = 10
"""The most that one file may take."""
CHECKED = ("npz", "torch", "keras", "tensorflow")
"""Formats with checksums: no damage of theirs goes unseen, unless it makes the checksum right."""
REMADE = ("zip_member", "table_entry")
PER_WORKER = 1000


@dataclass
class Worker:
    """A process that reads; it is started when it is needed, and anew after it ended."""

    folder: Path
    library: str | None = None
    process: Any = None
    count: int = 0

    def ask(self, path: Path, honest: str) -> dict[str, Any]:
        """What became of a file."""
        if self.process is None:
            library = [self.library] if self.library else []
            command = [sys.executable, "-m", "tests.fuzz.worker", *library]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        self.process.stdin.write(json.dumps({"path": str(path), "honest": honest}) + "\n")
        self.process.stdin.flush()
        limit = SECONDS if self.count else 60  # the first one waits for the imports
        self.count += 1
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else ""
        if line:
            if self.count >= PER_WORKER:
                self.end()
            return json.loads(line)
        reason = f"took more than {limit} s" if not ready else "ended the process"
        _, told = self.end()
        return {"done": "failed", "words": f"{reason}: {told[-3000:]}", "peak": 0}

    def end(self) -> tuple[str, str]:
        """End the process; what it still has to say."""
        if self.process is None:
            return "", ""
        self.process.kill()
        told = self.process.communicate()
        self.process, self.count = None, 0
        return told


@dataclass
class Tally:
    """The outcomes of a format."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def place(files: Files, folder: Path) -> Path:
    """Write the files of a sample in the place of others, and give the path to open.

    The folders of the others stay, as removing them takes longer than reading a file.
    """
    for old in folder.rglob("*"):
        if not old.is_dir():
            old.unlink()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    first = next(iter(files))
    return folder / "x" if first.startswith("x/") else folder / first


def cases(kinds: dict[str, Files], seed: str, numbers: Sequence[int]) -> Iterator[
    tuple[int, str, Files, str]
]:  # fmt: skip
    """Number, kind, damaged files and words of each case; each has a seed of its own."""
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        kind = rng.choice(list(kinds))
        files, words = mutated(kinds[kind], list(kinds.values()), rng)
        yield number, kind, files, words


def fuzz(name: str, seed: int, numbers: Sequence[int], kept: Path) -> Tally:
    """Damage the samples of a format and have them read."""
    tally, began = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        root = Path(temporary)
        (root / "made").mkdir()
        kinds = {kind: make(root / "made") for kind, make in SAMPLES[name].items()}
        honest = {kind: place(files, root / f"honest {kind}") for kind, files in kinds.items()}
        worker = Worker(root, LOADED.get(name))
        for kind, path in honest.items():
            if (result := worker.ask(path, str(path)))["done"] != "arrays":
                tally.failures.append(f"honest {kind}: {result['words']}")
        before = _listing(root)
        for number, kind, files, words in cases(kinds, f"{seed} {name}", numbers):
            path = place(files, root / f"case {kind}")
            exact = name in CHECKED and not any(one in words for one in REMADE)
            result = worker.ask(path, str(honest[kind]) if exact else "")
            if _listing(root) != before:
                result = {"done": "failed", "words": "a file beside the case was touched"}
                before = _listing(root)
            tally.outcomes[result["done"]] += 1
            if result["done"] == "failed":
                folder = kept / f"{name} {seed} {number}"
                place(files, folder)
                (folder / "words.txt").write_text(f"{kind}, {words}\n{result['words']}")
                tally.failures.append(f"{folder}: {words}\n{result['words'][-1500:]}")
        worker.end()
    tally.seconds = time.monotonic() - began
    return tally


def _listing(root: Path) -> dict[str, tuple[int, int]]:
    """The size and time of each file that is not part of a case."""
    folders = [one for one in root.iterdir() if not one.name.startswith("case ")]
    files = [file for one in folders for file in (one, *one.rglob("*")) if file.is_file()]
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; 1 where a file fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--format", action="append", choices=list(SAMPLES), dest="formats",
                        help="default: all; may be repeated")  # fmt: skip
    parser.add_argument("--count", type=int, default=300, help="files of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="the case of this number alone")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), metavar="FOLDER",
                        help="where files that fail are kept")  # fmt: skip
    options = parser.parse_args(arguments)
    failed = False
    for name in options.formats or SAMPLES:
        if not installed(name):
            print(f"{name:12} skipped: the library that reads it is not installed")
            continue
        numbers = range(options.count) if options.only is None else [options.only]
        tally = fuzz(name, options.seed, numbers, options.keep)
        told = ", ".join(f"{count} {word}" for word, count in sorted(tally.outcomes.items()))
        print(f"{name:12} {told}, {tally.seconds:.0f} s", flush=True)
        for failure in tally.failures:
            print(failure, file=sys.stderr)
        failed |= bool(tally.failures)
    return int(failed)
