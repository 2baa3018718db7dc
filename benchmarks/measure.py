"""Time, the processor time that other processes took meanwhile, and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOREIGN = 0.08
"""The share of one core that others may take during a sample, for it to count as undisturbed."""

SHORTEST = 0.05
"""A sample lasts at least so many seconds: quick calls are repeated."""


SLOW = 0.5
"""A call of so many seconds has its memory measured once, a faster one three times."""

BEHIND = 10
"""A slow call that takes so many times the fastest's seconds has one sample."""


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Args:
        seconds: Of one call.
        foreign: Cores that other processes took meanwhile; None where that cannot be told.
    """

    seconds: float
    foreign: float | None


def _version_1() -> float:
    return int(Path("/sys/fs/cgroup/cpuacct/cpuacct.usage").read_text()) / 1e9


def _version_2() -> float:
    fields = Path("/sys/fs/cgroup/cpu.stat").read_text().split()
    return int(fields[fields.index("usage_usec") + 1]) / 1e6


def _whole_machine() -> float:
    user, nice, system, _, _, interrupts, more, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + interrupts + more + steal) * _TICK


_LAG = 0.004
"""A group's counter lags behind the process's own clock by a tick of the scheduler."""

_TICK = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01


@cache
def counter() -> tuple[Callable[[], float] | None, float]:
    """What tells the processor seconds of all processes, and how finely; None if nothing does."""
    for read, step in ((_version_2, _LAG), (_version_1, _LAG), (_whole_machine, _TICK)):
        try:
            read()
        except (OSError, ValueError, IndexError):
            continue
        return read, step
    return None, 0.0


def calls_for(call: Callable[[], Any]) -> int:
    """How many calls make a sample."""
    began = time.perf_counter()
    call()
    seconds = max(time.perf_counter() - began, 1e-7)
    return max(1, round(SHORTEST / seconds))


def sample(call: Callable[[], Any], calls: int) -> Sample:
    """Time that many calls."""
    read, step = counter()
    used = read() if read else 0.0
    own = time.process_time()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - began
    own = time.process_time() - own
    if read is None:
        return Sample(seconds / calls, None)
    others = max(0.0, read() - used - own - step)
    return Sample(seconds / calls, others / seconds)


def interleaved(
    calls: Sequence[Callable[[], Any]],
    repeats: int,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[Sample]]:
    """Samples of each call, in rounds A B C A B C, so that all meet the same disturbances.

    Rounds in which other processes took part are made up for, up to as many again. What is slow
    and far behind the fastest has one sample, which says enough.

    Args:
        calls: What is timed.
        repeats: The undisturbed rounds that are wanted.
        budget: Seconds after which no further round begins, once there are three.
        clock: Tells the seconds.
    """
    counts = [calls_for(call) for call in calls]
    samples: list[list[Sample]] = [[] for _ in calls]
    began, clean, slow = clock(), 0, set[int]()
    for done in range(2 * repeats):
        late = done >= min(3, repeats) and clock() - began > budget
        if clean == repeats or late:
            break
        taken = {i: sample(calls[i], counts[i]) for i in range(len(calls)) if i not in slow}
        for i, one in taken.items():
            samples[i].append(one)
        clean += all((one.foreign or 0.0) <= FOREIGN for one in taken.values())
        if not done:
            behind = BEHIND * min((one.seconds for one in taken.values()), default=0.0)
            slow = {i for i, one in taken.items() if one.seconds > max(SLOW, behind)}
    return samples


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes of memory that a call needs at its peak, results included; None if Linux is not there.

    The greatest of several calls, after one that is not measured.
    """
    with _giving_back():
        began = time.perf_counter()
        call()
        times = 1 if time.perf_counter() - began > SLOW else 3
        gc.collect()
        found = [_peak(call) for _ in range(times)]
    known = [one for one in found if one is not None]
    return max(known) if len(known) == len(found) else None


def _peak(call: Callable[[], Any]) -> int | None:
    if _libc is not None:
        _libc.malloc_trim(0)
    try:
        # A "5" sets the peak to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmHWM")
    except (OSError, ValueError):
        return None
    result = call()
    after = resident("VmHWM")
    del result
    return max(0, after - before)


def resident(field: str) -> int:
    """The resident memory of this process in bytes: VmRSS now, VmHWM at its highest."""
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index(f"{field}:") + 1]) * 1024


def _glibc() -> Any:
    """The C library, where it is GNU's and nobody has set its allocator."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "mallopt") else None
    except OSError:
        return None


_libc = _glibc()
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_TIGHT, _LARGEST = 1 << 16, 1 << 25


@contextmanager
def _giving_back() -> Iterator[None]:
    """Let freed memory go back to the system at once, so that using it again counts.

    Afterwards the allocator is as it becomes by itself in a process that has freed large arrays.
    """
    if _libc is None:
        yield
        return
    _libc.mallopt(_MMAP_THRESHOLD, _TIGHT)
    _libc.mallopt(_TRIM_THRESHOLD, _TIGHT)
    try:
        yield
    finally:
        _libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        _libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)


def available_memory() -> int | None:
    """Bytes that are free for new arrays; None if Linux is not there."""
    try:
        fields = Path("/proc/meminfo").read_text().split()
        return int(fields[fields.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return None
