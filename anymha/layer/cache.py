"""What a layer has read, kept for the calls that follow: the cache of decoding, and memories.

A cache is a value. A call appends to it and gives a new one; `truncate`, `reorder` and
`join_caches` give new ones too. Where a framework lets arrays be written, the new one may share
them with the old one: the old one keeps its meaning, since what it holds is copied before it is
overwritten.

Position p of a row lies in slot p, and in a ring of C slots in slot ``p % C``. Keys are held as
attention takes them, normed and turned; where their rotation depends on the length, as projected.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from operator import attrgetter, is_
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, cast
from weakref import ref

import numpy as np

from anymha.errors import ArgumentError, CacheError, ShapeError
from anymha.framework.dtypes import dtype_name, is_floating
from anymha.framework.names import answers
from anymha.framework.protocol import Array, Index, Ops, Shaped
from anymha.framework.registry import backend_of, get_ops
from anymha.framework.shapes import described, is_known, product
from anymha.framework.validation import checked_flag
from anymha.layer.checks import is_integer
from anymha.options.config import AttentionConfig


def shown_array(x: Any) -> str:
    """The shape and the dtype of an array, or what a framework has put into its place."""
    return described(x) if hasattr(x, "dtype") else repr(x)


class Nested:
    """What the structures of frameworks take apart into its arrays, and put together again."""

    ARRAYS: ClassVar[tuple[str, ...]]

    def __len__(self) -> int:
        """The number of its arrays: Keras asks it of what it finds nested in a call."""
        return len(flatten(self)[0])

    def __reduce_ex__(self, protocol: Any) -> Any:
        keys: Any = getattr(self, "keys", None)
        if getattr(keys, "dtype", None) is None or dtype_name(keys.dtype) != "float64":
            return super().__reduce_ex__(protocol)
        backend = backend_of(keys)
        is_lasting = dtype_name(backend.ops.asarray(np.zeros(1)).dtype) == "float64"
        if is_lasting or known_values(backend.ops, keys) is None:
            return super().__reduce_ex__(protocol)
        state: Any = self.__getstate__()  # JAX itself would read float64 as float32
        state |= {n: None if state[n] is None else np.asarray(backend.ops.to_numpy(state[n]))
                  for n in self.ARRAYS}  # fmt: skip
        return _unpickled, (type(self), backend.ops.name, state)

    def __tf_flatten__(self) -> tuple[Any, Any]:
        leaves, static = flatten(self)
        return static, tuple(leaves)

    @classmethod
    def __tf_unflatten__(cls, static: Any, leaves: Any) -> Any:
        return unflatten(cls, static, leaves)


@dataclass(eq=False)
class Memory(Nested):
    """Keys and values of another sequence, projected once: `MultiHeadAttention.make_memory`.

    Attributes:
        keys: (B, K, S, d_k), normed and turned as the layer's options say.
        values: (B, K, S, d_v).
        key_positions: (1 or B, S) integers, where they were given; else None.

    Raises:
        ArgumentError: a call has it beside a `value` or a `key`.
        CacheError: it has not the sizes of the layer's heads.

    Example:
        >>> import anymha, numpy as np
        >>> options = {"query_features": 8, "value_features": 6, "backend": "numpy"}
        >>> layer = anymha.MultiHeadAttention(2, 4, **options)
        >>> memory = layer.make_memory(np.ones((1, 5, 6), "float32"))
        >>> layer(np.ones((1, 1, 8), "float32"), memory=memory).shape
        (1, 1, 8)
    """

    ARRAYS: ClassVar[tuple[str, ...]] = ("keys", "values", "key_positions")
    STATIC: ClassVar[tuple[str, ...]] = ()

    keys: Array
    values: Array
    key_positions: Array | None = None

    def __repr__(self) -> str:
        arrays = [(name, getattr(self, name)) for name in self.ARRAYS]
        shown = [f"{name}: {shown_array(x)}" for name, x in arrays if x is not None]
        return f"Memory({'; '.join(shown)})"

    def __deepcopy__(self, memo: Any) -> Memory:
        try:
            arrays = copy.deepcopy([getattr(self, name) for name in self.ARRAYS], memo)
        except RuntimeError:  # of PyTorch's tensors that have a gradient to flow through
            return self.reorder(np.arange(self.keys.shape[0]))
        return Memory(*arrays)

    @answers(indices="beam_idx index order rows")
    def reorder(self, indices: Sequence[int] | Shaped) -> Memory:
        """The memory of other rows, as those of a cache: row i is row ``indices[i]`` of this one.

        Args:
            indices: Integers (N,), 0 to B - 1; N becomes the batch.

        Raises:
            ArgumentError: they are no integers.
            ShapeError: they have another rank.
            CacheError: there is no such row; where indices are traced, the row is NaN.
        """
        ops = backend_of(self.keys).ops
        rows, _, wrong = _numbers_of_rows(ops, indices, self.keys)
        keys, values = (_rows_of(ops, x, rows, None) for x in (self.keys, self.values))
        if wrong is not None:
            wrong = ops.reshape(wrong, (-1, 1, 1, 1))
            keys = _any_dtype(ops, lambda x: ops.where(wrong, math.nan, x), keys)
        positions = self.key_positions
        if positions is not None and positions.shape[0] != 1:
            positions = _rows_of(ops, positions, rows, None)
        return Memory(cast(Array, keys), cast(Array, values), positions)


MOST_POSITIONS = 2**31 - 1
"""How many positions an int32 counts."""


class _Group:
    """Caches that know each other to have the same arrays; a plain object, for compilers to read.

    Attributes:
        overtaken: Whether a compiled program has written into the arrays for a cache of another
            group.
        of_inference: Whether the arrays can be written in inference mode alone.
    """

    overtaken = of_inference = False


class Line:
    """Steps of decoding that follow one another in the same arrays.

    A step begins at the newest cache, and does not ask the others. Any other call that writes into
    the arrays ends the line first.

    Attributes:
        step: What the steps have in common: sizes, options, the way that they take.
        arrays: Refer to the keys and the values; a line keeps neither in memory.
        turn: The length of the newest cache's rows. The call that removes it may write; the list is
            empty while a step runs, after a step has failed, and after the line has ended.
        reached: Up to which length the steps have written.
        begin: The length of the first cache's rows.
        end: Before which length a step is one of the line.
        kept: The fields `KEPT`, which all caches of the line have in common. A cache to which a
            user has assigned another value is not of the line.
    """

    KEPT: ClassVar[tuple[str, ...]] = (
        "overflowed", "starts", "segment_ids", "key_positions", "max_length", "window", "donate",
        "_stale_to", "_group", "_is_newest",
    )  # fmt: skip
    values_of: ClassVar[Any] = attrgetter(*KEPT)

    def __init__(self, step: Any, cache: Cache, end: int) -> None:
        self.step, self.begin, self.end = step, cache._start, end
        self.arrays = ref(cache.keys), ref(cache.values)
        self.turn, self.reached = [cache._start], cache._start
        self.kept = Line.values_of(cache)

    def begin_step(self, cache: Cache, start: int) -> bool:
        """Begin a step from a cache whose rows have this length, if it is the newest.

        Of two threads that begin one, the second is told False.
        """
        keys, values = self.arrays
        if (
            start >= self.end or cache._sharing.is_needed or cache._group.overtaken
            or cache.keys is not keys() or cache.values is not values()
            or not all(map(is_, Line.values_of(cache), self.kept))
        ):  # fmt: skip
            return False
        try:
            newest = self.turn.pop()
        except IndexError:
            return False
        if newest != start:
            self.turn.append(newest)
            return False
        cache.__dict__["_is_newest"] = False
        self.reached = start + 1  # from now on, also if the step fails
        return True

    def give_back(self, cache: Cache) -> None:
        """Note that the step from `cache` has written into copies: it is still the newest."""
        cache.__dict__["_is_newest"] = self.kept[self.KEPT.index("_is_newest")]
        self.turn.append(cache._start)

    def end_step(self, cache: Cache) -> Cache:
        """The cache after the step from `cache`: the newest from now on."""
        new = object.__new__(Cache)
        state, before = new.__dict__, cache.__dict__
        state.update(zip(self.KEPT, self.kept, strict=True))
        state["keys"], state["values"] = before["keys"], before["values"]
        sharing = state["_sharing"] = before["_sharing"]
        state["_start"] = start = before["_start"] + 1
        # Somebody reads them: an addition takes less time than making them of numbers. The first
        # cache of a line has them in any case.
        if "lengths" in before and start > self.begin + 1:
            state["lengths"], state["previous"] = before["lengths"] + 1, before["lengths"]
        sharing.add(new)
        self.turn.append(start)
        return new


class _Sharing:
    """Caches that have the same arrays; a copy of one has others.

    Attributes:
        group: The same caches, as compiled programs know them.
        is_needed: Whether something else needs the arrays as they are: a graph of gradients, or
            a cache of views of them.
        line: The steps that go on in the arrays without a look at the caches; None for none.
        writing: Held by the call that may write; of two threads that go on, the other one copies.
    """

    group: Any = None
    is_needed = False
    line: Line | None = None

    def __init__(self, caches: Iterable[Cache]) -> None:
        self._references: set[ref[Cache]] = set()
        self._reached: Any = None
        self.writing = Lock()
        for cache in caches:
            self.add(cache)

    def add(self, cache: Cache) -> None:
        """Note a cache, for as long as it is there."""
        self._references.add(ref(cache, self._references.discard))

    def __len__(self) -> int:
        return len(self._references)

    def all(self) -> list[Cache]:
        """The caches, whatever other threads add meanwhile."""
        found = [reference() for reference in self._references.copy()]
        return [cache for cache in found if cache is not None]

    @property
    def reached(self) -> Any:
        """Up to which lengths (B,) something has been written, be it of caches that are gone."""
        line, reached = self.line, self._reached
        return reached if line is None or reached is None else np.maximum(reached, line.reached)

    @reached.setter
    def reached(self, lengths: np.ndarray) -> None:
        self._reached = lengths

    def end_line(self) -> bool:
        """End the line; False where a step of it is running, or has failed."""
        line = self.line
        if line is None:
            return True
        try:
            line.turn.pop()
        except IndexError:
            return False
        self._reached, self.line = self.reached, None
        return True

    def __deepcopy__(self, memo: Any) -> None:
        return None


@dataclass(eq=False)
class Cache(Nested):
    """Keys and values of the positions that a layer has read: `MultiHeadAttention.make_cache`.

    Attributes:
        keys: (B, K, C, d_k), C being the number of slots.
        values: (B, K, C, d_v).
        lengths: (B,) int32, how many positions of each row have been appended.
        previous: (B,) int32, how many there were before the last call.
        overflowed: (B,) booleans: whether a compiled call went past the end of the row, or asked
            for positions that a ring no longer holds. From then on the row's outputs are NaN.
        starts: (B,) int32 in a ring, the first position that is still held; else None.
        segment_ids: (B, C) integers, where calls have had them; else None.
        key_positions: (B, C) integers, where calls have had `positions` that options need again.
        max_length: How many positions a row may have.
        window: The layer's `sliding_window`, where the cache is a ring; else None.
        donate: Whether compiled steps may write into the arrays, as `make_cache` says.

    Raises:
        CacheError: a call has more new positions than a row has room for, or the cache has not the
            sizes of the layer's heads.

    Example:
        >>> import anymha, numpy as np
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
        >>> cache = layer.make_cache(batch_size=1, max_length=10)
        >>> for length in (5, 1, 1):
        ...     output, cache = layer(np.ones((1, length, 8), "float32"), cache=cache)
        >>> cache.lengths.tolist(), cache.truncate(6).lengths.tolist()
        ([7], [6])
    """

    ARRAYS: ClassVar[tuple[str, ...]] = (
        "keys", "values", "lengths", "previous", "overflowed", "starts", "segment_ids",
        "key_positions",
    )  # fmt: skip
    STATIC: ClassVar[tuple[str, ...]] = ("max_length", "window")
    _known: ClassVar[Any]  # of an instance its lengths in numbers, None where they are not known
    _lost: ClassVar[Any] = None  # of an instance the positions (B,) before which all is overwritten
    # of an instance the one length of its rows, once a call knows it; the arrays of lengths are
    # made of it when they are asked for
    _start: ClassVar[Any] = None
    # of an instance its group; None where nothing is known of the arrays
    _group: ClassVar[Any] = None
    # of an instance whether no other cache with its arrays holds later positions, or may write them
    _is_newest: ClassVar[bool] = False

    keys: Array
    values: Array
    lengths: Array
    previous: Array
    overflowed: Array
    starts: Array | None
    segment_ids: Array | None
    key_positions: Array | None
    max_length: int
    window: int | None
    donate: bool = field(default=False, repr=False, kw_only=True)
    # Fields, so that `dataclasses.replace` keeps them: all caches with these arrays; and, where
    # these do not tell, the slot up to which something is to be cleared at the next call.
    _sharing: Any = field(default=None, repr=False, kw_only=True)
    _stale_to: int = field(default=0, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        sharing = self._sharing
        if sharing is None:
            return
        same = [(self.keys is one.keys, self.values is one.values) for one in sharing.all()]
        if any(map(any, same)):
            self.__dict__["_group"] = sharing.group
            if self.window is not None and sharing.reached is not None:  # maybe by later caches
                self.__dict__["_lost"] = sharing.reached - int(self.keys.shape[2])
            sharing.add(self)
        else:  # new ones, or views of theirs
            for one in sharing.all():
                one._keep_arrays()
        if (True, True) not in same:  # not all are known to be these caches' alone
            self._sharing = None

    if not TYPE_CHECKING:  # to type checkers a cache would have attributes of every name

        def __getattr__(self, name: str) -> Any:
            start = self._start
            if name == "_known":
                if start is None:
                    return None
                self.__dict__["_known"] = known = np.full(self.keys.shape[0], start, np.int64)
                return known
            if start is None or name not in ("lengths", "previous"):
                raise AttributeError(f"Cache has no attribute `{name}`.", name=name, obj=self)
            ops = backend_of(self.keys).ops
            count = start - (name == "previous")
            # By the framework's functions: a program that is compiled then serves all lengths.
            made = ops.arange(count, count + 1, dtype=ops.int32, device=ops.device(self.keys))
            made = ops.broadcast_to(made, (self.keys.shape[0],)) + 0  # with memory of its own
            setattr(self, name, made)
            return made

    def __getstate__(self) -> dict[str, Any]:
        state = {field.name: getattr(self, field.name) for field in fields_of(self)}
        del state["_sharing"]  # what is pickled or copied deeply has arrays of its own
        state["_stale_to"] = self._top()
        if self._lost is None:
            return state
        ops = backend_of(self.lengths).ops
        if known_lengths(ops, self) is not None:
            first = np.maximum(ops.to_numpy(self.starts), self._lost).astype(np.int32)
            state["starts"] = ops.asarray(first, device=ops.device(self.starts))
        return state

    def __deepcopy__(self, memo: Any) -> Cache:
        try:
            return Cache(**copy.deepcopy(self.__getstate__(), memo))
        except RuntimeError:  # of PyTorch's tensors that have a gradient to flow through
            return self.copy()

    def __copy__(self) -> Cache:
        new = Cache(**self.__getstate__())
        new.__dict__["_group"] = self._group
        if self._sharing is None:
            return new
        new.__dict__["_start"] = self._start
        return new._share(self, self.__dict__.get("_known"))

    def __repr__(self) -> str:
        kind = "" if self.window is None else f", window={self.window}"
        shown = shown_array(self.keys)
        return f"Cache(lengths={self.lengths}, max_length={self.max_length}{kind}, keys: {shown})"

    @answers(lengths="length new_length to")
    def truncate(self, lengths: Index | Sequence[int] | Shaped) -> Cache:
        """The cache without the last positions of its rows, as after tokens that were refused.

        A row that keeps none is as in a new cache, whatever a ring holds and whether it overflowed.

        Args:
            lengths: How many positions each row keeps: an int, or integers (B,), none above
                `self.lengths`.

        Raises:
            ArgumentError: `lengths` are no integers.
            ShapeError: they are not (B,).
            CacheError: a row has not so many positions, or its ring no longer holds what the
                window of its next position sees; where lengths are traced, `overflowed` says so.
        """
        _check_is_single(self)
        ops = backend_of(self.lengths).ops
        known = known_lengths(ops, self)
        batch = self.lengths.shape[0]
        wanted = _integers(ops, lengths, "lengths", batch, like=self.lengths)
        numbers = None if known is None else known_values(ops, wanted)
        new = Cache(**{**self.__getstate__(), "lengths": wanted, "previous": wanted})
        new.overflowed = ops.logical_and(self.overflowed, wanted > 0)
        starts = None if new.starts is None else known_values(ops, new.starts)
        if new.starts is not None:
            new.starts = ops.where(wanted > 0, new.starts, 0)
        if numbers is not None and (self.starts is None or starts is not None):
            return self._truncated(ops, new, np.asarray(numbers, np.int64), known, starts)
        too_many = wanted > self.lengths
        wrong = ops.where(new.overflowed, new.overflowed, too_many)
        wrong = ops.where(wanted < 0, wanted < 0, wrong)
        if self.starts is not None and self.window is not None:
            first = wanted - (self.window - 1)
            lost = new.starts > ops.where(first > 0, first, 0)
            wrong = ops.where(lost, lost, wrong)
        new.overflowed = wrong
        kept = ops.where(wanted < 0, 0, wanted)
        new.lengths = new.previous = ops.where(too_many, self.lengths, kept)
        return new._cleared(ops)

    def _truncated(
        self, ops: Ops, new: Cache, wanted: np.ndarray, known: Any, starts: Any
    ) -> Cache:
        """The truncated cache, where all lengths are known."""
        first = np.zeros_like(wanted)
        if starts is not None and self.window is not None:
            first = np.where((starts > 0) & (wanted > 0), starts + self.window - 1, 0)
        _check_truncated(wanted, known, first, self)
        is_same = bool((wanted == known).all())
        if self._sharing is None or not (is_same or ops.capabilities.writes_in_place):
            new.__dict__["_known"] = wanted
            new.__dict__["_group"] = self._group
            return new if is_same else new._cleared(ops)
        return new._share(self, wanted)  # the next call clears what lies beyond

    @answers(indices="beam_idx index order rows")
    def reorder(self, indices: Sequence[int] | Shaped) -> Cache:
        """The cache of other rows, as beams go on: row i is row ``indices[i]`` of this one.

        Args:
            indices: Integers (N,), 0 to B - 1; N becomes the batch.

        Raises:
            ArgumentError: they are no integers.
            ShapeError: they have another rank.
            CacheError: there is no such row; where indices are traced, `overflowed` says so.
        """
        _check_is_single(self)
        ops = backend_of(self.lengths).ops
        rows, numbers, wrong = _numbers_of_rows(ops, indices, self.lengths)
        state, known = self.__getstate__(), known_lengths(ops, self)
        end = self._end(ops, known)
        taken = {name: _rows_of(ops, state[name], rows, end) for name in self.ARRAYS}
        new = Cache(**{**state, **taken})
        if wrong is not None:
            new.overflowed = ops.where(wrong, wrong, new.overflowed)
        if known is not None and numbers is not None:
            new._own(known[numbers])
        return new

    def copy(self) -> Cache:
        """The same cache in arrays of its own."""
        return self.reorder(np.arange(self.lengths.shape[0], dtype=np.int32))

    def _end(self, ops: Ops, known: np.ndarray | None) -> int | None:
        """The slot after the last that is held; None where it is not known, or copies keep all."""
        if known is None or not ops.capabilities.writes_in_place:
            return None
        return min(most_of(known), int(self.keys.shape[2]))

    def _own(self, known: np.ndarray) -> Cache:
        """Note that the arrays are this cache's alone."""
        self.__dict__["_known"] = known
        self.__dict__["_sharing"] = sharing = _Sharing([self])
        sharing.reached = known
        if not self._is_newest:
            self._alone(backend_of(self.lengths).ops)
        sharing.group = self._group
        return self

    def _adopt(self, known: np.ndarray) -> None:
        """Take over the arrays that a compiled program has made, whatever else may have them."""
        before = self._group
        before.overtaken = True
        self._is_newest = False  # pyright: ignore
        self._own(known)
        self._group.of_inference = before.of_inference
        self._is_newest = not before.of_inference  # pyright: ignore

    def _alone(self, ops: Ops) -> None:
        """Note that this cache is the newest with its arrays, and knows no other."""
        self._group = _Group()  # pyright: ignore
        inference = ops.capabilities.is_inference
        # What inference makes cannot be written elsewhere; a compiler cannot ask for it.
        newest = inference is None or is_compiled(ops) or not inference()
        self._group.of_inference = not newest
        self._is_newest = newest  # pyright: ignore

    def _share(self, other: Cache, known: np.ndarray | None) -> Cache:
        """Note that the arrays are those of another cache."""
        if known is not None:
            self.__dict__["_known"] = known
        self.__dict__["_sharing"] = other._sharing
        self.__dict__["_group"] = other._group
        other._sharing.add(self)
        return self

    def _hand_over(self) -> bool:
        """Whether a program that is compiled now may write into the arrays.

        They are its new cache's from then on; this one keeps its meaning: what it holds is not
        written, and its next call copies that. A ring would lose what it holds.
        """
        if not (self.donate and self._is_newest and self.window is None) or self._stale_to:
            return False
        self._is_newest = False  # pyright: ignore
        self._group.overtaken = True
        return True

    def _is_clean(self, ops: Ops) -> bool:
        """Whether slots that hold nothing are known to be zero.

        A compiler cannot read `_top`; nor does a program that it compiles write into a ring.
        """
        if not ops.capabilities.writes_in_place:
            return True
        if is_compiled(ops):
            return self.window is not None or (self._is_newest and not self._stale_to)
        return self._group is not None and not self._top()

    def _written(self, arrays: Mapping[str, Array], known: np.ndarray) -> None:
        """Note what has been written into the arrays, whatever becomes of the call.

        Args:
            arrays: "keys" and "values" of the cache after the call.
            known: The lengths (B,) that it has.
        """
        if arrays["keys"] is not self.keys and arrays["values"] is not self.values:
            return
        sharing = self._sharing
        # What lies past this cache's own end is to be cleared, even if the call fails now.
        self.__dict__["_stale_to"] = int(self.keys.shape[2])
        last = sharing.reached is self._known
        sharing.reached = known if last else np.maximum(sharing.reached, known)
        if self.window is not None:
            lost = known - self.keys.shape[2]
            for other in sharing.all():
                most = lost if other._lost is None else np.maximum(other._lost, lost)
                other.__dict__["_lost"] = most

    def _after(self, cache: Cache, known: np.ndarray, start: int | None) -> Cache:
        """Note that this one comes from a call with that cache, and has these lengths now.

        Args:
            cache: The cache before the call.
            known: The lengths (B,).
            start: The one length of all rows; None where they differ.
        """
        if self.keys is not cache.keys and self.values is not cache.values:
            self._own(known)
        elif cache._sharing is None:
            self.__dict__["_known"] = known
        else:
            self._share(cache, known)
            older = [cache] if cache._is_newest else cache._sharing.all()
            for one in older:
                one.__dict__["_is_newest"] = False
            self.__dict__["_is_newest"] = not self._group.of_inference
        lost = cache._lost
        if lost is not None and (lost > known - self.keys.shape[2]).any():
            self.__dict__["_lost"] = lost
        self.__dict__["_start"] = start
        return self

    def _top(self) -> int:
        """Up to which slot something may have been written, of what is cleared at the next call."""
        if self._group is not None and self._group.overtaken:
            return int(self.keys.shape[2])
        sharing = self._sharing
        if sharing is not None and sharing.line is not None and self._is_newest:
            return self._stale_to  # no other call has written since
        reached = None if sharing is None else sharing.reached
        if reached is None or reached is self._known:
            return self._stale_to
        if self._known is not None and not (reached > self._known).any():
            return self._stale_to
        size = int(self.keys.shape[2])
        return size if self.window is not None else max(self._stale_to, min(most_of(reached), size))

    def _first(self, ops: Ops) -> Array:
        """The first position of each row that a ring still holds, (B, 1)."""
        starts: Any = self.starts
        if self._lost is not None:
            lost = ops.asarray(self._lost.astype(np.int32), device=ops.device(starts))
            starts = ops.where(lost > starts, lost, starts)
        return ops.reshape(starts, (-1, 1))

    def _note_output(self, ops: Ops, output: Array) -> None:
        """Note that an output comes from the arrays, whose gradient may be asked for."""
        differentiated = ops.capabilities.is_differentiated
        if differentiated is not None and differentiated(output):
            self._keep_arrays()

    def _keep_arrays(self) -> None:
        """Note that something else needs the arrays as they are: nobody writes into them."""
        self._is_newest = False  # pyright: ignore
        if self._sharing is not None:
            self._sharing.is_needed = True

    def _claim(self, known: np.ndarray) -> Any:
        """What a call that may write positions after `known` holds until `_after`; else None.

        After a call that fails nothing is written any more: the next one copies.
        """
        sharing = self._sharing
        if sharing is None or self._group.overtaken or not sharing.writing.acquire(blocking=False):
            return None
        if sharing.end_line() and self._may_write(known):
            return sharing.writing
        sharing.writing.release()
        return None

    def _may_write(self, known: np.ndarray) -> bool:
        """Whether no other cache holds what positions after `known` would overwrite."""
        sharing = self._sharing
        if sharing.is_needed:
            return False
        for other in sharing.all() if len(sharing) > 1 else ():
            if other is self:
                continue
            theirs = other._known
            if theirs is None or (theirs > known).any():
                return False
            size = int(self.keys.shape[2])
            if self.window is not None and (known - size >= theirs - self.window + 1).any():
                return False
        return True

    def _cleared(self, ops: Ops) -> Cache:
        """The cache, zero in slots that hold nothing: NaN of what is gone must not be read."""
        self.keys, self.values = self._arrays_cleared(ops)
        self._stale_to = 0
        self._sharing = None
        self._alone(ops)
        return self if self._known is None else self._own(self._known)

    def _arrays_cleared(self, ops: Ops) -> tuple[Array, Array]:
        """New arrays of keys and values, zero in slots that hold nothing."""
        size, known = self.keys.shape[2], known_lengths(ops, self)
        if self.window is None:
            held = slots(ops, size, self.lengths) < ops.reshape(self.lengths, (-1, 1))
        else:
            held = ring_positions(ops, size, self.lengths, self.lengths) >= self._first(ops)
        held = ops.reshape(held, (-1, 1, size, 1))
        end = None if self.window is not None else self._end(ops, known)

        def cleared(x: Array) -> Array:
            if end is None or known is None or ops.capabilities.take_rows is None:
                return _any_dtype(ops, lambda x: ops.where(held, x, 0.0), x)
            x, begin = self._copied(ops, x, end), int(known.min()) if known.size else 0
            if begin == end:
                return x
            part = ops.where(held[:, :, begin:end], x[:, :, begin:end], 0.0)
            write: Any = ops.capabilities.write_slots
            return write(x, part, begin, True)

        return cleared(self.keys), cleared(self.values)

    def _copied(self, ops: Ops, x: Array, end: int | None) -> Array:
        """A copy of keys or values, of whose slots those before `end` are held."""
        every = np.arange(self.lengths.shape[0], dtype=np.int32)
        rows = ops.asarray(every, device=ops.device(self.lengths))
        return cast(Array, _rows_of(ops, x, rows, end))


def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """The arrays of a cache or a memory that are there, and all else that it consists of."""
    named = {name: getattr(value, name) for name in type(value).ARRAYS}
    # A framework may put None into the place of an array, where it maps a function over a tree.
    places = value.__dict__.get("_places", ())
    names = tuple([name for name, x in named.items() if x is not None or name in places])
    static = tuple([getattr(value, name) for name in type(value).STATIC])
    return [named[name] for name in names], (names, static)


def _unpickled(kind: type[Any], backend: str, state: dict[str, Any]) -> Any:
    """A cache or a memory of a framework, whose arrays come from NumPy."""
    ops = get_ops(backend)
    arrays = {n: ops.from_numpy(x) for n, x in state.items() if isinstance(x, np.ndarray)}
    return kind(**(state | arrays))


class Structure(tuple[Any, ...]):
    """What `flatten` gives besides arrays; and the cache, for what maps a function over it."""

    origin: Any = None

    def __reduce__(self) -> Any:
        return tuple, (tuple(self),)


def flatten_linked(value: Any) -> tuple[list[Any], Structure]:
    """As `flatten`; `unflatten_linked` then knows the cache again by its arrays."""
    if isinstance(value, Cache) and value._top():
        value._cleared(backend_of(value.lengths).ops)
    leaves, static = flatten(value)
    if isinstance(value, Cache):
        state = value.__getstate__()
        leaves = [state[name] for name in static[0]]
    structure = Structure(static)
    structure.origin = ref(value)
    return leaves, structure


def unflatten_linked(kind: type[Any], static: Any, leaves: Iterable[Any]) -> Any:
    """As `unflatten`; the cache itself where the arrays are its own, which may be written to."""
    origin = getattr(static, "origin", None)
    origin = None if origin is None else origin()
    leaves = list(leaves)
    if origin is not None:
        own, _ = flatten(origin)
        same = [x is y for x, y in zip(own, leaves, strict=False)]
        if len(own) == len(leaves) and all(same):
            return origin
        if isinstance(origin, Cache):
            if any(same):
                return replace(unflatten(kind, static, leaves), _sharing=origin._sharing)
            origin._keep_arrays()  # of which these may be views
    return unflatten(kind, static, leaves)


def unflatten(kind: type[Any], static: Any, leaves: Sequence[Any]) -> Any:
    """The cache or the memory of what `flatten` gives."""
    names, values = static
    arrays = dict.fromkeys(kind.ARRAYS) | dict(zip(names, leaves, strict=True))
    value = kind(**arrays, **dict(zip(kind.STATIC, values, strict=True)))
    if any(x is None for x in leaves):
        value.__dict__["_places"] = names
    return value


def make_cache(
    ops: Ops,
    config: AttentionConfig,
    computing: str,
    batch_size: int,
    max_length: int,
    rewind: int,
    dtype: str | None,
    device: Any = None,
    donate: bool = False,
) -> Cache:
    """An empty cache; `anymha.layer.native.NativeLayer.make_cache` has the arguments.

    `computing` is the dtype in which the layer computes.

    Raises:
        CacheError: a size is not a positive integer, or the layer attends over other axes.
    """
    for name, value, least in (("batch_size", batch_size, 0), ("max_length", max_length, 1),
                               ("rewind", rewind, 0)):  # fmt: skip
        if isinstance(value, bool) or not is_integer(value) or value < least:
            raise CacheError(f"`{name}` must be an integer, at least {least}. Received: {value!r}.")
    if max_length > MOST_POSITIONS:
        raise CacheError(
            f"`max_length` must be at most {MOST_POSITIONS}, as positions are counted in 32 bits. "
            f"Received: {max_length}."
        )
    if config.attention_axes not in (None, (1,), (-2,)):
        raise CacheError(
            "A cache needs a layer that attends over one axis of (B, T, D). Received: "
            f"attention_axes={config.attention_axes}. Make the layer without `attention_axes`."
        )
    window, max_length = config.sliding_window, int(max_length)  # no NumPy integer, of any width
    size = max_length if window is None else min(max_length, window + int(rewind))
    is_ring = window is not None and window < max_length
    held = dtype_name(ops.dtype(computing)) if dtype is None else dtype_name(dtype)
    if not is_floating(held) or held == "float64" != computing:
        raise CacheError(
            "`dtype` must be float16, bfloat16 or float32; or float64, where the layer computes in "
            f"it. Received: {dtype!r}, and a layer that computes in {computing}. Leave it out for "
            "the dtype in which the layer computes."
        )

    def zeros(shape: tuple[int, ...], of: Any) -> Array:
        return ops.asarray(np.zeros(shape, of), device=device)

    def storage(width: Any) -> Array:
        shape = (batch_size, config.key_value_heads, size, width)
        if held == "float64":
            x = ops.from_numpy(np.zeros(shape, np.float64))
            return x if device is None else ops.asarray(x, device=device)
        x = zeros(shape, np.float32)
        return x if held == "float32" else ops.astype(x, ops.dtype(held))

    rows = [zeros((batch_size,), np.int32) for _ in range(3)]
    overflowed = zeros((batch_size,), np.bool)
    cache = Cache(
        storage(config.key_dim), storage(config.value_dim), rows[0], rows[1], overflowed,
        rows[2] if is_ring else None, None, None, max_length, window if is_ring else None,
        donate=checked_flag(donate, "donate"),
    )  # fmt: skip
    return cache._own(np.zeros(batch_size, np.int64))


@answers()
def join_caches(caches: Sequence[Cache]) -> Cache:
    """One cache of all the rows of several, as prompts that were read one by one.

    Rows keep their lengths and positions; nothing is turned anew.

    Args:
        caches: Caches of one layer, made with the same `max_length`, `dtype` and `rewind`; or its
            memories of values of one length, which become one memory.

    Raises:
        ArgumentError: there is none, or one is no cache.
        CacheError: they do not have the same sizes or the same parts.

    Example:
        >>> import anymha, numpy as np
        >>> layer = anymha.MultiHeadAttention(2, 4, backend="numpy", query_features=8)
        >>> caches = []
        >>> for length in (2, 3):
        ...     x = np.ones((1, length, 8), "float32")
        ...     caches.append(layer(x, cache=layer.make_cache(1, 10))[1])
        >>> anymha.join_caches(caches).lengths.tolist()
        [2, 3]
    """
    given: Any = caches
    caches = list(given) if isinstance(given, Iterable) else []
    if caches and all(isinstance(memory, Memory) for memory in caches):
        return cast(Any, _join_memories(cast(Any, caches)))
    if not caches or not all(isinstance(cache, Cache) for cache in caches):
        received = [type(cache).__name__ for cache in caches] or type(given).__name__
        raise ArgumentError(
            f"`caches` must be a list of at least one cache, of one layer. Received: {received}."
        )
    for cache in caches:
        _check_is_single(cache)
    ops = backend_of(caches[0].lengths).ops

    def kind(cache: Cache) -> tuple[Any, ...]:
        keys, values = cache.keys, cache.values
        return (cache.max_length, cache.window, *keys.shape[1:], *values.shape[1:],
                dtype_name(keys.dtype), type(keys).__module__.partition(".")[0])  # fmt: skip

    first = kind(caches[0])
    for cache in caches[1:]:
        if kind(cache) != first:
            raise CacheError(
                "Caches that are joined must be of one layer, and made with the same `max_length`, "
                f"`dtype` and `rewind`. Received: {first} and {kind(cache)} as (max_length, "
                "window, sizes of keys and values, dtype, framework)."
            )
    parts: dict[str, Any] = {}
    states = [cache.__getstate__() for cache in caches]
    for name in Cache.ARRAYS:
        own = [state[name] for state in states]
        if all(x is None for x in own):
            parts[name] = None
            continue
        dtypes = list({dtype_name(x.dtype): x.dtype for x in own if x is not None}.items())
        if len(dtypes) > 1:
            raise CacheError(
                f"Caches that are joined must have `{name}` of one dtype. Received: "
                f"{' and '.join(dtype for dtype, _ in dtypes)}. Cast them before the calls."
            )
        # A cache without ids has none but 0, one without positions its indices.
        own = [ops.astype(_default(ops, name, cache), dtypes[0][1]) if x is None else x
               for cache, x in zip(caches, own, strict=True)]  # fmt: skip
        parts[name] = _any_dtype(ops, lambda *xs: ops.concat(list(xs), axis=0), *own)
    donate = all(cache.donate for cache in caches)
    new = Cache(**parts, max_length=caches[0].max_length, window=caches[0].window, donate=donate)
    known = [known_lengths(ops, cache) for cache in caches]
    stale = max(cache._top() for cache in caches)
    if all(lengths is not None for lengths in known):
        new._own(np.concatenate([np.asarray(lengths) for lengths in known]))
    return new._cleared(ops) if stale else new


def _join_memories(memories: Sequence[Memory]) -> Memory:
    """One memory of all the rows of several."""
    first, *others = memories
    ops = backend_of(first.keys).ops

    def kind(memory: Memory) -> tuple[Any, ...]:
        return (*memory.keys.shape[1:], *memory.values.shape[1:], dtype_name(memory.keys.dtype),
                memory.key_positions is not None, backend_of(memory.keys).ops.name)  # fmt: skip

    for memory in others:
        if kind(memory) != kind(first):
            raise CacheError(
                "Memories that are joined must be of one layer, and of values of one length. "
                f"Received: {kind(first)} and {kind(memory)} as (sizes of keys and values, dtype, "
                "whether they have positions, framework). Pad the values, and hide the padding by "
                "`value_mask` in the calls."
            )

    def joined(name: str) -> Array:
        own = [getattr(memory, name) for memory in memories]
        if name == "key_positions":
            own = [ops.broadcast_to(x, (memory.keys.shape[0], x.shape[1]))
                   for x, memory in zip(own, memories, strict=True)]  # fmt: skip
        return _any_dtype(ops, lambda *xs: ops.concat(list(xs), axis=0), *own)

    names = [name for name in Memory.ARRAYS if getattr(first, name) is not None]
    return Memory(**{name: joined(name) for name in names})


def is_compiled(ops: Ops) -> bool:
    """Whether the call becomes a part of a program that may write into arrays that it is given."""
    compiles_writes = ops.capabilities.compiles_writes
    return compiles_writes is not None and compiles_writes()


def slots(ops: Ops, size: Any, like: Array) -> Array:
    """The numbers of slots, (1, C)."""
    return ops.reshape(ops.arange(0, size, dtype=ops.int32, device=ops.device(like)), (1, -1))


def ring_positions(ops: Ops, size: int, lengths: Array, like: Array) -> Array:
    """The position that each slot of a ring holds, (B, C); below 0 where it holds none yet."""
    last = ops.reshape(lengths, (-1, 1)) - 1
    return last - ops.remainder(last - slots(ops, size, like), size)


def _default(ops: Ops, name: str, cache: Cache) -> Array:
    """The ids or the positions (B, C) that a cache has where calls had none."""
    return default_rows(ops, name, cache.keys.shape[2], cache.window, cache.lengths)


def default_rows(ops: Ops, name: str, size: int, window: int | None, lengths: Array) -> Array:
    """The ids or the positions (B, C) of what was held without them: 0, and their indices."""
    if name == "key_positions" and window is not None:
        return ring_positions(ops, size, lengths, lengths)
    index = slots(ops, size, lengths)
    rows = ops.reshape(lengths, (-1, 1)) * 0
    return index + rows if name == "key_positions" else index * 0 + rows


def known_values(ops: Ops, x: Array) -> np.ndarray | None:
    """The values of an array; None where a compiler runs the program."""
    has_values = ops.capabilities.has_values
    if has_values is None:
        try:
            return np.asarray(ops.to_numpy(x))
        except Exception:  # a backend without the capability has an error of its own for it
            return None
    return np.asarray(ops.to_numpy(x)) if has_values(x) else None


def known_lengths(ops: Ops, cache: Cache) -> np.ndarray | None:
    """The lengths (B,) in numbers; None where they are traced, or a row has overflowed."""
    has_values = ops.capabilities.has_values
    if has_values is not None and not has_values(cache.lengths):
        return None
    if cache._known is None:
        lengths, flags = known_values(ops, cache.lengths), known_values(ops, cache.overflowed)
        if lengths is None or flags is None or np.any(flags):
            return None
        cache.__dict__["_known"] = np.asarray(lengths, np.int64)
    return cache._known


def _rows_of(ops: Ops, x: Array | None, rows: Array, end: int | None) -> Array | None:
    """Rows of an array (B, ...), as int32 (N,) tells them; of (B, K, C, d) the slots before `end`.

    Args:
        ops: The backend.
        x: The array, or None.
        rows: Their numbers.
        end: The slot after the last that is held; None for all.
    """
    if x is None:
        return None
    shape, take = ops.shape(x), ops.capabilities.take_rows
    if take is not None and len(shape) == 4:
        return _any_dtype(ops, lambda x: take(x, rows, end), x)
    flat = ops.reshape(x, (1, shape[0], product(shape[1:])))
    taken = _any_dtype(ops, ops.gather, flat, ops.reshape(rows, (1, -1)), axis=1)
    return ops.reshape(taken, (ops.shape(rows)[0], *shape[1:]))


def _any_dtype(ops: Ops, function: Any, *arrays: Array, **options: Any) -> Any:
    """``function(*arrays)``, where float64 exists if they are of it."""
    if arrays[0].dtype != ops.float64:
        return function(*arrays, **options)
    named = {str(i): x for i, x in enumerate(arrays)}
    return ops.in_float64(lambda x: function(*[x[name] for name in named], **options), named)


def _integers(ops: Ops, value: Any, name: str, count: Any, like: Array) -> Array:
    """Integers (count,) as an int32 array of the framework, from any form that a user has."""
    if ops.is_array(value):
        if "int" not in dtype_name(value.dtype):
            raise ArgumentError(
                f"`{name}` must be integers. Received: {described(value)}. Cast them first."
            )
        _check_width(known_values(ops, value), name)
        if dtype_name(value.dtype) == "int64":  # traced, it has no values yet
            value = ops.where(value > MOST_POSITIONS, MOST_POSITIONS, value)
            value = ops.where(value < -1, -1, value)
        found = ops.astype(value, ops.int32)
    else:
        try:
            numbers = np.asarray(value)
        except ValueError:  # of lists of several lengths
            numbers = np.asarray(None)
        if numbers.dtype.kind not in "iu" and numbers.size:
            raise ArgumentError(f"`{name}` must be integers. Received: {value!r}.")
        _check_width(numbers, name)
        found = ops.asarray(numbers.astype(np.int32), device=ops.device(like))
    if not len(found.shape) and count is not None:
        found = ops.broadcast_to(ops.reshape(found, (1,)), (count,))
    wanted = "(N,)" if count is None else f"({count},), or one integer"
    if len(found.shape) != 1 or (
        count is not None and is_known(count) and is_known(found.shape[0])
        and found.shape[0] != count
    ):  # fmt: skip
        raise ShapeError(f"`{name}` must have shape {wanted}. Received: {described(found)}.")
    return found


def _numbers_of_rows(
    ops: Ops, indices: Any, like: Array
) -> tuple[Array, np.ndarray | None, Array | None]:
    """Numbers of rows (N,): as an array, as they are known, and which of traced ones are wrong.

    Args:
        ops: The backend.
        indices: The numbers, in any form that a user has; those that are wrong become 0.
        like: An array (B, ...) of these rows.
    """
    found, batch = _integers(ops, indices, "indices", None, like=like), like.shape[0]
    numbers = known_values(ops, found)
    if numbers is None:
        wrong = ops.where(found < 0, found < 0, found > batch - 1)
        return ops.where(wrong, 0, found), None, wrong
    if ((numbers < 0) | (numbers >= batch)).any():
        raise CacheError(
            f"`indices` must be numbers of rows, 0 to {batch - 1}. "
            f"Received: {np.asarray(numbers).tolist()}."
        )
    return found, numbers, None


def _check_is_single(cache: Cache) -> None:
    """Refuse caches that a framework's function has stacked, one of each layer, say."""
    shape = cache.lengths.shape
    if len(shape) != 1:
        raise CacheError(
            f"`cache.lengths` must be (B,). Received: {described(cache.lengths)}, as of several "
            "caches in one. Take one of them, or map a function over them, as by `jax.vmap`."
        )


def _check_width(numbers: np.ndarray | None, name: str) -> None:
    """Refuse integers that 32 bits do not hold."""
    if numbers is not None and ((numbers > MOST_POSITIONS) | (numbers < -MOST_POSITIONS)).any():
        raise CacheError(
            f"`{name}` must be integers of 32 bits. Received: {np.asarray(numbers).tolist()}."
        )


def _check_truncated(
    wanted: np.ndarray, known: np.ndarray, first: np.ndarray, cache: Cache
) -> None:
    """Refuse lengths that a cache cannot go back to.

    Args:
        wanted: (B,).
        known: The lengths that it has, (B,).
        first: The shortest lengths of which a ring still holds what is seen, (B,).
        cache: The cache.
    """
    if ((wanted < 0) | (wanted > known)).any():
        raise CacheError(
            "`lengths` must be from 0 to the lengths that the rows have, "
            f"{known.tolist()}. Received: {wanted.tolist()}."
        )
    lost = (wanted < first) & (wanted != known)
    if lost.any():
        raise CacheError(
            f"A ring holds the last {cache.keys.shape[2]} positions of a row: the next query of "
            f"rows {np.flatnonzero(lost).tolist()} would see positions that are overwritten. "
            f"Received: lengths {wanted.tolist()}, at least {first.tolist()} can be had. Make the "
            "cache with `rewind=`, by how many positions `truncate` is to go back."
        )


def most_of(known: np.ndarray) -> int:
    """The greatest of lengths; 0 of none."""
    return int(known.max()) if known.size else 0


def is_uniform(known: np.ndarray) -> bool:
    """Whether all rows have one length."""
    return known.size == 0 or int(known.min()) == int(known.max())
