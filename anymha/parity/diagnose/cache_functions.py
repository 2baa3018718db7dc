"""In what way a function of a cache is wrong: `truncate`, `reorder` or `join`.

A buffer is filled as the wrong function leaves it. That is tried where a comparison without this
function agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.diagnose.wrong_caches import facts_of, given, in_window
from anymha.parity.oracle.decoded import Decoded
from anymha.parity.oracle.recipe import Recipe

EMPTY = -1
"""Stands for the column of a slot that holds zeros, or what another row had there."""

Lengths = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The lengths (B,) after a truncation, from those that are held and the right ones."""


def _right(held: np.ndarray, right: np.ndarray) -> np.ndarray:
    return right


@dataclass
class _Buffer:
    """A buffer that is truncated or moved wrongly, and what the queries of each call find in it.

    Draft `call * drafted + d` is a copy of column d, read before a call and to be taken back.
    """

    recipe: Recipe
    facts: Decoded
    lengths: Lengths = _right  # How it is truncated
    # Of which rows keys, values and lengths are after the first call, (B,); None: their own
    moved: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    # Another length after the first call for each row, from those that are right
    begun: Callable[[np.ndarray], np.ndarray] | None = None
    cleared: int = 0  # How many of the last positions that are kept are cleared
    newest: bool = False  # Whether the last positions are kept in place of the first
    held: list[list[int]] = field(init=False)  # Of each row the column in each slot
    places: np.ndarray = field(init=False)  # (B, T): the slot of each column
    drafts: np.ndarray = field(init=False)  # (B, drafts): that of each draft
    contents: list[list[list[int]]] = field(init=False)  # Of each call and row

    def __post_init__(self) -> None:
        facts, (rows, length) = self.facts, self.facts.valid.shape
        calls = int(facts.calls[-1]) + 1
        self.held = [[] for _ in range(rows)]
        self.places = facts.places.copy()
        self.drafts, self.contents = np.zeros((rows, calls * facts.drafted), int), []
        for call in range(calls):
            columns = np.flatnonzero(facts.calls == call)
            if call == 1 and self.moved is not None:
                self._move(self.moved[2])
            if call and facts.drafted:
                self._draft(call, range(min(facts.drafted, columns[0])))
                self._truncate(facts.begins[:, columns[0]])
            for row, held in enumerate(self.held):
                for column in columns[facts.valid[row, columns]]:
                    self.places[row, column] = len(held)
                    held.append(int(column))
            self.contents.append([held.copy() for held in self.held])
        self.length = length

    def _move(self, rows: np.ndarray) -> None:
        counts = np.array([len(held) for held in self.held])[rows]
        counts = counts if self.begun is None else self.begun(counts) + 0 * counts
        self.held = [[EMPTY] * int(count) for count in counts]

    def _slots(self, name: str, most: int) -> tuple[np.ndarray, np.ndarray]:
        """What slots hold that hold no column: inputs (B, slots, D), and whether any."""
        x, facts = self.recipe.inputs[name], self.facts
        held, any_held = np.zeros((len(x), most, x.shape[2])), np.zeros((len(x), most), bool)
        if self.moved is not None:
            for row, source in enumerate(self.moved[0 if name == "key" else 1]):
                columns = np.flatnonzero(facts.valid[source] & (facts.calls == 0))
                held[row, : len(columns)] = x[source, columns]
                any_held[row, : len(columns)] = True
        return held, any_held

    def _draft(self, call: int, columns: range) -> None:
        for row, held in enumerate(self.held):
            for column in columns:
                if self.facts.valid[row, column]:
                    draft = call * self.facts.drafted + column
                    self.drafts[row, draft] = len(held)
                    held.append(len(self.facts.calls) + draft)

    def _truncate(self, right: np.ndarray) -> None:
        before = np.array([len(held) for held in self.held])
        for row, count in enumerate(np.maximum(self.lengths(before, right), 0)):
            held = self.held[row]
            kept = held[max(len(held) - count, 0) :] if self.newest else held[:count]
            kept += [EMPTY] * (count - len(kept))
            for slot in range(max(count - self.cleared, 0), count):
                kept[slot] = EMPTY
            self.held[row] = kept

    def made(self) -> Recipe:
        """The recipe: after the columns stand the drafts, and zeros of each slot."""
        recipe, facts, length = self.recipe, self.facts, self.length
        most = max(len(held) for rows in self.contents for held in rows)
        rows, drafts = self.drafts.shape
        slots = np.broadcast_to(np.arange(most), (rows, most))
        columns = np.concatenate([
            np.arange(length),
            np.tile(np.arange(facts.drafted), int(facts.calls[-1]) + 1),
        ])  # fmt: skip
        seen = np.zeros((rows, length, len(columns) + most), bool)
        for at, call in enumerate(facts.calls):
            for row in range(rows):
                for slot, column in enumerate(self.contents[call][row][: self.places[row, at] + 1]):
                    seen[row, at, length + drafts + slot if column == EMPTY else column] = True
        counted = np.concatenate([self.places, self.drafts, slots], axis=1)
        seen &= in_window(recipe, self.places[..., None] - counted[:, None])
        own = given(recipe, self.places, facts.places)
        keys = counted + own[:, :1] - self.places[:, :1]
        masks = {n: mask for n, mask in recipe.masks.items() if n == "query_mask"}
        inputs, holds = dict(recipe.inputs), dict[str, np.ndarray]()
        for name in ("key", "value"):
            more, any_held = self._slots(name, most)
            inputs[name] = np.concatenate([inputs[name][:, columns], more], axis=1)
            own_columns = np.ones((rows, len(columns)), bool)
            holds[name] = np.concatenate([own_columns, any_held], axis=1)[..., None, None]
        wrong = recipe.but(
            inputs=inputs, masks={**masks, "cache": seen[:, None]}, causal=False, window=None,
            decoded=None, positions=own, key_positions=keys,
        )  # fmt: skip
        for name in holds:
            wrong = wrong.after((name,), lambda heads, name=name: heads * holds[name])
        return wrong


def _truncated(recipe: Recipe, facts: Decoded) -> Iterator[tuple[str, _Buffer]]:
    """Words, and the buffer that is truncated so."""
    first = 0 if facts.turned is None else int(facts.turned[0])  # that stands first after call 0
    last = len(facts.valid) - 1 if facts.turned is None else int(facts.turned[-1])
    read = facts.drafted
    told: dict[str, Lengths] = {
        "one position too many is taken back": lambda held, right: right - 1,
        "one position too few is taken back": lambda held, right: np.minimum(right + 1, held),
        "one position too few is taken back, even of none": lambda held, right: right + 1,
        "nothing is taken back": lambda held, right: held,
        "all is taken back": lambda held, right: 0 * right,
        "two positions too many are taken back": lambda held, right: right - 2,
        "three positions too many are taken back": lambda held, right: right - 3,
        "two positions too few are taken back": lambda held, right: right + 2,
    }
    for count in range(1, read + 3):
        words = f"of each row {count} {'is' if count == 1 else 'are'} taken back, whatever was read"
        told[words] = lambda held, right, count=count: held - count
    for of, row in {
        "the longest row": np.max, "the shortest row": np.min, "row 0": lambda x: x[first],
        "the last row": lambda x: x[last], "the row before": lambda x: np.roll(x, 1),
        "the next row": lambda x: np.roll(x, -1),
    }.items() if len(facts.valid) > 1 else ():  # fmt: skip
        told[f"to the length of {of}"] = lambda held, right, row=row: row(right) + 0 * right
        words = f"to the length of {of}, where the row is longer"
        told[words] = lambda held, right, row=row: np.minimum(row(right), held)
        words = f"as many of each row are taken back as of {of}"
        told[words] = lambda held, right, row=row: held - row(held - right)
    for words, lengths in told.items():
        yield words, _Buffer(recipe, facts, lengths)
    yield ("the last position that is kept is cleared",
           _Buffer(recipe, facts, cleared=1))  # fmt: skip
    if "alibi" not in recipe.options:  # where a key's distance would follow its slot
        yield ("the newest positions are kept, not the first ones",
               _Buffer(recipe, facts, newest=True))  # fmt: skip


def _moved(recipe: Recipe, facts: Decoded) -> Iterator[tuple[str, _Buffer]]:
    """Words, and the buffer whose rows are reordered or joined so, after the first call."""
    rows = np.arange(len(facts.valid))
    order = rows if facts.turned is None else facts.turned
    at = np.argsort(order)  # where each row stands after the first call
    sources = {
        "not moved": at, "moved the other way": at[at], "moved twice": order[order[at]],
        "those of the rows from the last to the first": rows[::-1][at],
        "those of the row before": order[(at - 1) % len(rows)],
        "those of the next row": order[(at + 1) % len(rows)],
        "those of the first row for all": 0 * rows, "those of the last row for all":
        0 * rows + rows[-1],
    }  # fmt: skip
    for words, begun in {
        "that of the longest row for all": np.max, "that of the shortest row for all": np.min,
        "0": lambda counts: 0 * counts, "one too great": lambda counts: counts + 1,
        "one too small": lambda counts: counts - 1,
    }.items():  # fmt: skip
        buffer = _Buffer(recipe, facts, moved=(rows, rows, rows), begun=begun)
        yield f"the length is {words}", buffer
    told = {rows.tobytes()}
    for words, source in sources.items():
        if source.tobytes() not in told:
            told.add(source.tobytes())
            for of, which in _PARTS.items():
                moved = [source if part in which else rows for part in range(3)]
                buffer = _Buffer(recipe, facts, moved=(moved[0], moved[1], moved[2]))
                yield f"{of} are {words}", buffer


_PARTS = {
    "keys, values and lengths": (0, 1, 2),
    "keys and values": (0, 1),
    "keys": (0,),
    "values": (1,),
    "lengths": (2,),
    "keys and lengths": (0, 2),
    "values and lengths": (1, 2),
}
"""What is moved wrongly."""


def ways_of(function: str, recipe: Recipe, evidence: Evidence) -> Iterator[str]:
    """The ways in which a function of a cache may be wrong that give the numbers, in words."""
    facts = facts_of(recipe)
    if facts is None or recipe.positions is not None or recipe.segments is not None:
        return
    ways = _truncated if function == "truncate" else _moved
    for words, buffer in ways(recipe, facts):
        try:
            worst = max(evidence.errors(buffer.made()).values())
        except (ValueError, IndexError):
            continue  # an option whose arrays have one place for each position of the call
        if worst <= 1:
            yield words
