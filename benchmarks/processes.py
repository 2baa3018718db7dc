"""Runs each framework in a process of its own, since Keras holds one backend for a process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.cases import Case
from benchmarks.measure import available_memory, counter
from benchmarks.results import CaseResult, from_dict

VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_ENABLE_ONEDNN_OPTS",
    "MKL_ENABLE_INSTRUCTIONS", "ANYMHA_TORCH_ONEDNN",
    "TF_NUM_INTRAOP_THREADS", "XLA_FLAGS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
    "LD_PRELOAD", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""Variables that change how fast things are; those that are set are in the JSON."""

Told = Callable[[str, str], None]
"""Is told the framework and the case, with the layer, that come next."""


class WorkerError(Exception):
    """A framework's process ended before its job was done."""


def run_framework(
    framework: str,
    cases: Sequence[Case],
    *,
    repeats: int,
    budget: float,
    device: str = "cpu",
    told: Told = lambda framework, step: None,
    facts: dict[str, Any] | None = None,
    results: list[CaseResult] | None = None,
) -> list[CaseResult]:
    """Measure the cases in one framework.

    Args:
        framework: "numpy", "torch", "tensorflow" or "jax".
        cases: The cases.
        repeats: Undisturbed rounds that are wanted.
        budget: Seconds of a case after which no further round begins.
        device: "cpu" or "cuda".
        told: Is told of each step.
        facts: Is filled with what the framework says about where it runs.
        results: Is filled with the results as they come; so they are there if the process dies.

    Raises:
        WorkerError: the process ended early; the message has the end of what it printed.
    """
    results = [] if results is None else results
    job = {
        "framework": framework, "device": device, "repeats": repeats, "budget": budget,
        "cases": [case.to_dict() for case in cases],
    }  # fmt: skip
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8",
            env=environment(framework, device),
        ) as process:  # fmt: skip
            try:
                _read(process, json.dumps(job), cases, framework, told, facts, results)
            finally:
                process.kill()
        if len(results) < len(cases):
            raise WorkerError(end_of(errors, process.returncode))
    return results


def _read(
    process: subprocess.Popen[str],
    job: str,
    cases: Sequence[Case],
    framework: str,
    told: Told,
    facts: dict[str, Any] | None,
    results: list[CaseResult],
) -> None:
    """Give the process its job and take its results until it ends."""
    if process.stdin is None or process.stdout is None:
        raise WorkerError("the process has no pipes")
    try:
        process.stdin.write(job + "\n")
        process.stdin.close()
    except BrokenPipeError:  # it died at once; what it printed says why
        pass
    current = ""
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "machine" and facts is not None:
            facts.update(event["facts"], absent=event["absent"])
        elif event["event"] == "case":
            current = event["case"]
            told(framework, current)
        elif event["event"] == "layer":
            told(framework, f"{current}: {event['layer']}")
        elif event["event"] == "result":
            timings = [from_dict(one) for one in event["timings"]]
            results.append(CaseResult(framework, cases[len(results)], timings, event["note"]))
    process.wait()


def environment(framework: str, device: str) -> dict[str, str]:
    """The variables of a framework's process: the same packages, one backend for Keras."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    found["KERAS_BACKEND"] = framework
    found.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if device == "cpu":
        found |= {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
    return found


def end_of(errors: IO[str], status: int | None) -> str:
    """Why a process ended: its status, and the last line of what it printed as errors."""
    errors.seek(0)
    lines = [line for line in errors.read().splitlines() if line.strip()]
    ended = f"its process ended with status {status}"
    return f"{ended}: {lines[-1][:300]}" if lines else ended


def machine() -> dict[str, Any]:
    """What is known of this machine."""
    memory = available_memory()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "free_memory": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "marks": counter()[0] is not None,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields: Mapping[str, str] = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    return fields.get("model name", platform.processor())
