"""A process that reads, inspects and converts files: a line of JSON in, a line out, for each."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np

import anymha
from anymha.cli.inspect import report
from anymha.errors import AnymhaError
from anymha.interchange.convert_model import convert_file
from anymha.interchange.files.formats import open_file

MEMORY = 10**9
"""The bytes that a file may take beyond what the libraries take."""
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod")
NEVER = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "os.fork",
         "pickle.find_class", "ctypes.dlopen")  # fmt: skip
SYSTEM = {"/proc", "/sys", "/dev/null", "/dev/urandom"}


class Watch:
    """What Python touches beside a folder, by its audit events."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.touched: list[str] = []
        own = [sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(anymha.__file__))]
        own += [entry for entry in sys.path if entry]
        self._allowed = tuple({os.path.realpath(one) for one in own} | SYSTEM)
        self._unnamed = tempfile.gettempdir()  # opened for a file without a name
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or event not in ("open", *CHANGES, *NEVER):
            return
        paths = [one for one in arguments[:2] if isinstance(one, (str, bytes))]
        if event == "open":  # its second argument is the mode
            paths, mode = paths[:1], str(arguments[1] or "r")
            if paths == [self._unnamed]:
                return
            if mode[0] == "r" and "+" not in mode:
                paths = [one for one in paths if not self._is_known(one, self._allowed)]
        if event in NEVER or any(not self._is_known(one, (self.folder,)) for one in paths):
            self.touched.append(f"{event} {paths}")

    def _is_known(self, path: str | bytes, folders: tuple[str, ...]) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return any(real == folder or real.startswith(f"{folder}/") for folder in folders)


def read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, after its report was written."""
    with open_file(path) as reader:
        lines = list(report(reader))
        if not all(line.isprintable() for line in lines):
            raise AssertionError("a line of the report cannot be printed")
        return {name: reader.read(name) for name in reader.tensors}


def outcome(path: Path, right: dict[str, np.ndarray] | None, watch: Watch) -> dict[str, Any]:
    """What became of a file: the word "error", "arrays" or "failed", and more in words.

    Args:
        path: The file.
        right: The arrays of the honest file, where no damage can go unseen; None elsewhere.
        watch: What is touched.
    """
    watch.folder, watch.touched = os.path.realpath(path.parent), []
    done, words = "arrays", ""
    try:
        for action in (read, lambda path: anymha.load(path, "numpy"), _convert):
            try:
                result = action(path)
            except AnymhaError as error:
                if not all(line.isprintable() for line in str(error).split("\n")):
                    raise AssertionError(f"the error cannot be printed: {error}") from error
                if len(str(error)) > 4000:
                    raise AssertionError(f"the error is long: {error!s:.200}") from error
                done, words = ("error", str(error)) if action is read else (done, words)
                continue
            if action is read and right is not None:
                _check(result, right)
    except BaseException:  # whatever it is, it is what is looked for
        done, words = "failed", traceback.format_exc()
    watch.folder = None
    if watch.touched:
        done, words = "failed", f"touched: {watch.touched}"
    return {"done": done, "words": words, "peak": peak()}


def _convert(path: Path) -> None:
    target = path.parent / "converted.npz"
    convert_file(path, target, "transformers.bert", "anymha", num_heads=2, others=True)


def _check(found: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    for name, array in found.items():
        if name in right and (array.shape, array.tobytes()) != (
            right[name].shape, right[name].tobytes(),
        ):  # fmt: skip
            raise AssertionError(f"{name!r} has other values, and a checksum")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Answer each line with a path, and one of the honest file where its arrays are to be told.

    The argument is the library that reads the format; it is loaded first.
    """
    for library in sys.argv[1:]:
        importlib.import_module(library)
    # Packages are looked for once, not at every file.
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
    watch, honest = Watch(), {}
    usual = peak()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for line in sys.stdin:
        job = json.loads(line)
        if job["honest"] and job["honest"] not in honest:
            honest[job["honest"]] = read(Path(job["honest"]))
        result = outcome(Path(job["path"]), honest.get(job["honest"]), watch)
        if result["peak"] - usual > MEMORY:
            result = {**result, "done": "failed", "words": f"{result['peak'] - usual} bytes"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
