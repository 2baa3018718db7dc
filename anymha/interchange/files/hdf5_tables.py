"""HDF5's tables of groups and chunks, checked while its library reads them.

The library follows the addresses in a table wherever they lead: a node of a tree that is its own
child or neighbour, or a list of free places that leads back to one, kills the process, or keeps it
for ever. Here a node has one parent, its level is one less than the parent's, and a row of
neighbours and a list of free places end. The tables are those that h5py and Keras write: trees of
version 1 and local heaps.

References:
    The HDF Group, "HDF5 File Format Specification", version 3, sections II, III.A.1 and III.D.
"""

from __future__ import annotations

from itertools import pairwise
from os import SEEK_END
from typing import Any, BinaryIO

_SUPERBLOCK, _NODE, _HEAP = b"\x89HDF\r\n\x1a\n", b"TREE", b"HEAP"
_LAST_FREE = 1


class BrokenTable(ValueError):
    """A table that leads back to a place in it."""


class CheckedTables:
    """A stream for HDF5's library; `readinto` checks each table that it reads.

    Args:
        stream: The file.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream: Any = stream
        self._base, self._address, self._length = 0, 8, 8  # superblock; bytes of an address, a size
        self._half_width = 32  # half of the most children of a node in a tree of chunks
        self._checked: set[int] = set()
        self._levels: dict[int, int] = {}
        self._parents: dict[int, int] = {}
        self._before: dict[int, int] = {}
        self._begins: dict[int, int] = {}  # of each row of neighbours, by its last node
        self._ends: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def readinto(self, buffer: Any) -> int:
        """Read as the stream does.

        Raises:
            BrokenTable: a table leads to a place that it must not lead to.
        """
        place = self._stream.tell()
        count = self._stream.readinto(buffer)
        content = memoryview(buffer)
        if content[:8] == _SUPERBLOCK and len(content) > 26:
            sizes = 13 if content[8] < 2 else 9
            self._base, self._address, self._length = place, *content[sizes : sizes + 2]
            if content[8] == 1:
                self._half_width = _number(content[24:26])
        elif content[:4] in (_NODE, _HEAP) and place not in self._checked:
            self._checked.add(place)
            check = self._check_node if content[:4] == _NODE else self._check_heap
            check(place - self._base, bytes(content))
        return count

    def _check_node(self, node: int, content: bytes) -> None:
        kind, level = content[4:6]
        size, first = self._address, 8 + 2 * self._address
        most = 2 * self._half_width
        key = (len(content) - first - most * size) // (most + 1) if kind else self._length
        step = key + size
        end = first + step * _number(content[6:8])
        children = [content[i - size : i] for i in range(first + step, end + 1, step)]
        _same(self._levels, node, level, "lies at two levels of it")
        for child in map(_number, children if level else ()):
            _same(self._levels, child, level - 1, "lies at two levels of it")
            _same(self._parents, child, node, "has two parents")
        after = content[first - size : first]
        if after.strip(b"\xff"):
            self._join(node, _number(after))

    def _join(self, node: int, after: int) -> None:
        """Put two rows of neighbours together: the one that `node` ends, the one of `after`."""
        _same(self._before, after, node, "has two neighbours before it")
        begin, end = self._begins.pop(node, node), self._ends.pop(after, after)
        if begin == after:
            raise BrokenTable(f"it has a tree whose node at byte {node:,} is its own neighbour")
        self._begins[end], self._ends[begin] = begin, end

    def _check_heap(self, heap: int, content: bytes) -> None:
        ends = [8 + self._length, 8 + 2 * self._length, 8 + 2 * self._length + self._address]
        size, free, data = (_number(content[begin:end]) for begin, end in pairwise((8, *ends)))
        file_size = self._stream.seek(0, SEEK_END)
        self._stream.seek(min(self._base + data, file_size))
        content = self._stream.read(min(size, file_size))
        known: set[int] = set()
        while free != _LAST_FREE and free < size:
            if free in known:
                raise BrokenTable(f"it has a heap at byte {heap:,} whose list of free places loops")
            known.add(free)
            free = _number(content[free : free + self._length])


def _same(known: dict[int, int], node: int, value: int, fault: str) -> None:
    if known.setdefault(node, value) != value:
        raise BrokenTable(f"it has a tree whose node at byte {node:,} {fault}")


def _number(content: bytes | memoryview) -> int:
    return int.from_bytes(content, "little")
