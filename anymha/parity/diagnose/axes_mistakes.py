"""Mistakes with axes: attention along another, heads split and merged, the order along one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from anymha.parity.diagnose.changes import Row, listed, no_families
from anymha.parity.oracle.recipe import (
    STEPS,
    Arrays,
    Recipe,
    Step,
    Variants,
    allowed,
    einsum,
    reads,
    softmax,
)

MOST_LOGITS = 1 << 20
"""Where all sequences have no more logits with the keys of all, these are computed."""

MOST_AXES = 4
"""Of no more axes of batch and positions together orders are tried."""

NORM_EPS = (1e-5, 1e-6, 1e-3, 1e-12)
"""What is added to the variance in layers that normalize."""


def _batch_and_time(recipe: Recipe) -> Variants:
    """(T, B, D) taken for (B, T, D), or another axis of the batch for the time."""
    yield from _other_axis(recipe)
    batch, queries, keys = recipe.lengths
    turned = {name: x.swapaxes(0, 1) for name, x in recipe.inputs.items()}
    if queries != keys or recipe.kept is not None or recipe.bias is not None:
        return
    fits = all(m.shape[2] in (1, batch) and m.shape[3] in (1, batch) for m in recipe.masks.values())
    masks = recipe.masks if fits and batch == queries else {}
    offset = recipe.offset if recipe.offset is not None and not np.any(recipe.offset) else None

    def back(recipe: Recipe, stages: Arrays) -> np.ndarray:
        return STEPS["output"](recipe, stages).swapaxes(0, 1)

    wrong = recipe.but(inputs=turned, masks=masks, offset=None if offset is None else offset[:1])
    yield "", wrong.stepping("output", back)


def _other_axis(recipe: Recipe) -> Variants:
    """Attention along an axis of the batch, where inputs have several, in place of its own."""
    axes = recipe.batches
    _, queries, keys = recipe.lengths
    free = recipe.kept is None and recipe.bias is None and not recipe.masks
    if len(axes) < 2 or queries != keys or not free:
        return
    for at, count in enumerate(axes):

        def turned(x: np.ndarray, at: int = at, length: int = queries) -> np.ndarray:
            whole = x.reshape(*axes, length, x.shape[-1])
            return np.swapaxes(whole, at, len(axes)).reshape(-1, axes[at], x.shape[-1])

        def back(recipe: Recipe, stages: Arrays, at: int = at, count: int = count) -> np.ndarray:
            output = STEPS["output"](recipe, stages)
            turned = [*axes, count]
            turned[at] = queries
            whole = np.swapaxes(output.reshape(*turned, output.shape[-1]), at, len(axes))
            return whole.reshape(-1, queries, output.shape[-1])

        inputs = {name: turned(x) for name, x in recipe.inputs.items()}
        wrong = recipe.but(inputs=inputs, offset=None)
        yield (
            f"along axis {at} of the inputs in place of {len(axes)}",
            wrong.stepping("output", back),
        )


def _axes_of_the_batch(recipe: Recipe) -> Variants:
    """Axes of the output or of inputs in another order, where the batch has several."""
    names = [*(f"batch axis {at}" for at in range(len(recipe.batches))), "positions"]
    if not 2 < len(names) <= MOST_AXES:
        return
    letters = "abcd"[: len(names)]
    orders = ["".join(order) for order in itertools.permutations(letters)]
    reads_as = orders if len(names) == 3 else orders[:1]
    known = set[tuple[int, ...]]()
    for read, written in itertools.product(reads_as, orders):

        def moved(x: np.ndarray, written: str = written, read: str = read) -> np.ndarray:
            whole = x.reshape(*recipe.batches, *x.shape[1:])
            return _memory(whole, f"{letters}z", f"{written}z", f"{read}z").reshape(x.shape)

        count = recipe.lengths[0] * recipe.lengths[1]
        places = tuple(moved(np.arange(count).reshape(*recipe.lengths[:2], 1)).ravel().tolist())
        if places in known or places == tuple(range(count)):
            continue
        known.add(places)
        one, other = (f"({', '.join(names[letters.index(a)] for a in order)})"
                      for order in (written, read))  # fmt: skip
        words = f"not moved back: {one} read as {other}"
        yield f"of the output, {words}", recipe.after(("output",), moved)
        for inputs in (("query",), ("key", "value"), ("query", "key", "value")):
            if all(recipe.inputs[n].shape[1] == recipe.lengths[1] for n in inputs):
                arrays = {n: moved(x) if n in inputs else x for n, x in recipe.inputs.items()}
                yield f"of the input of {listed(inputs)}, {words}", recipe.but(inputs=arrays)


def _memory(array: np.ndarray, axes: str, written: str, read: str) -> np.ndarray:
    """An array whose memory is written in one order of its axes, and read in another."""
    sizes = dict(zip(axes, array.shape, strict=True))
    flat = np.transpose(array, [axes.index(a) for a in written]).reshape(-1)
    again = flat.reshape([sizes[a] for a in read])
    return np.transpose(again, [read.index(a) for a in axes])


def _orders() -> list[tuple[str, str]]:
    """Orders in which (B, T, H, d) is written and read, the usual ones first."""
    usual = ("BTHd", "BHTd", "TBHd", "HBTd", "THBd", "HTBd", "BHdT", "BTdH", "BdHT", "BdTH")
    return list(itertools.permutations(usual, 2))


def _over_heads(recipe: Recipe) -> Variants:
    """At each position its heads attend to each other: (B, T, H, d) taken for (B, H, T, d)."""
    if recipe.lengths[1] != recipe.lengths[2]:
        return
    heads, shared = recipe.heads
    for said, order in (("", reads(recipe)), (", not repeated", np.arange(shared))):
        if said and shared == heads:
            continue
        for masked in (False, True) if recipe.causal else (False,):
            causal = np.tri(heads, len(order), dtype=bool) | (not masked)
            for merged in ("BTHd", "BHTd"):

                def step(
                    recipe: Recipe, stages: Arrays, order: np.ndarray = order,
                    causal: np.ndarray = causal, merged: str = merged,
                ) -> np.ndarray:  # fmt: skip
                    key, value = stages["key"][:, :, order], stages["value"][:, :, order]
                    logits = recipe.scale * einsum("bthd,btgd->bthg", stages["query"], key)
                    shares = softmax(np.where(causal, logits, -np.inf))
                    mixed = einsum("bthg,btgd->bthd", shares, value)
                    return _memory(mixed, "BTHd", merged, "BTHd")

                words = f"of each position{said}" + ", the causal mask over the heads" * masked
                words += ", and heads and positions exchanged after it" * (merged != "BTHd")
                yield words, recipe.stepping("context", step)


USUAL = ("BHTd", "BTHd")
"""Heads before positions, and after them: the axes that are most often taken for each other."""


def _merged_usually(recipe: Recipe) -> Variants:
    """Heads merged without an exchange."""
    written, read = USUAL
    own = recipe.steps["context"]

    def step(recipe: Recipe, stages: Arrays) -> np.ndarray:
        return _memory(own(recipe, stages), "BTHd", written, read)

    yield _words(written, read), recipe.stepping("context", step)


def _split_usually(recipe: Recipe) -> Variants:
    """Heads split without an exchange."""
    read, written = USUAL
    for names in SPLITS:
        wrong = recipe
        for name in names:
            wrong = wrong.stepping(name, _read(recipe.steps[name], written, read))
        yield _of(names) + _words(written, read), wrong


def _folded_in_the_batch(recipe: Recipe) -> Variants:
    """Heads folded in the batch, in one order of the two in one place and another in the rest."""
    for names in (("key",), ("value",), ("key", "value"), ("query",)):
        for written, read in (("HBTd", "BHTd"), ("BHTd", "HBTd")):
            wrong = recipe
            for name in names:
                wrong = wrong.stepping(name, _read(recipe.steps[name], written, read))
            yield _of(names) + _words(written, read), wrong


def _merged(recipe: Recipe) -> Variants:
    """The context's memory read in another order of axes as heads are merged."""
    own = recipe.steps["context"]
    for written, read in _orders():
        if (written, read) == USUAL:
            continue

        def step(recipe: Recipe, stages: Arrays, written: str = written,
                 read: str = read) -> np.ndarray:  # fmt: skip
            return _memory(own(recipe, stages), "BTHd", written, read)

        yield _words(written, read), recipe.stepping("context", step)
    for written, read in _orders():
        if written[0] == read[0] == "B":
            words = f"{_words(written, read)}, after a context that is right"
            yield words, _merged_late(recipe, written, read)


def _merged_late(recipe: Recipe, written: str, read: str) -> Recipe:
    """The recipe with a right context, whose heads are merged in another order of axes."""
    own = recipe.steps["output"]

    def step(recipe: Recipe, stages: Arrays) -> np.ndarray:
        context = _memory(stages["context"], "BTHd", written, read)
        return own(recipe, {**stages, "context": context})

    return recipe.stepping("output", step)


def _split(recipe: Recipe) -> Variants:
    """Projections whose memory is read in another order of axes as heads are split."""
    for names in SPLITS:
        for written, read in _orders():
            if written not in ("BTHd", "TBHd") or (read, written) == USUAL:
                continue
            wrong = recipe
            for name in names:
                wrong = wrong.stepping(name, _read(recipe.steps[name], written, read))
            yield _of(names) + _words(written, read), wrong


SPLITS = (("query", "key", "value"), ("value",), ("key",), ("query",), ("key", "value"),
          ("query", "key"))  # fmt: skip
"""Projections whose heads are split wrongly together."""


def _of(names: tuple[str, ...]) -> str:
    return "" if len(names) == 3 else f"of {' and '.join(names)}, "


def _read(own: Step, written: str, read: str) -> Step:
    return lambda recipe, stages: _memory(own(recipe, stages), "BTHd", written, read)


def _words(written: str, read: str) -> str:
    """Which axes are taken for others, in words."""
    for one, other, words in (("B", "H", "batch and heads"), ("T", "H", "heads and positions"),
                              ("H", "d", "heads and width"), ("B", "T", "batch and positions"),
                              ("T", "d", "positions and width")):  # fmt: skip
        if written.translate(str.maketrans(one + other, other + one)) == read:
            return f"{words} not exchanged: written as {_axes(written)}, read as {_axes(read)}"
    return f"written as {_axes(written)}, read as {_axes(read)}"


def _axes(order: str) -> str:
    return f"({', '.join(order)})"


def _reversed(recipe: Recipe) -> Variants:
    """Positions, sequences or features in another order, of an input or of the output."""
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "flipped, in reverse along the positions": lambda x: np.flip(x, 1),
        "flipped, in reverse along the batch": lambda x: np.flip(x, 0),
        "flipped, in reverse along the features": lambda x: np.flip(x, 2),
        **{f"{n} position{'s' if n > 1 else ''} {where}": partial(np.roll, shift=by * n, axis=1)
           for n in (1, 2, 3) for where, by in (("later", 1), ("earlier", -1))},
    }  # fmt: skip
    for words, change in itertools.chain(changes.items(), _folded(recipe.lengths[1])):
        yield f"the output is {words}", recipe.after(("output",), change)
        for names in (("query",), ("key",), ("value",), ("key", "value"), ("query", "key"),
                      ("query", "key", "value")):  # fmt: skip
            inputs = {n: change(x) if n in names else x for n, x in recipe.inputs.items()}
            what = f"the input{'s' if len(names) > 1 else ''} of {' and '.join(names)}"
            yield f"{what}, {words}", recipe.but(inputs=inputs)


def _other_sequences(recipe: Recipe) -> Variants:
    """Another sequence of the batch in the place of each, as where beams share a memory."""
    count = recipe.lengths[0]
    rows, orders = np.arange(count), dict[str, np.ndarray]()
    if count == 1 or recipe.decoded is not None:
        return
    orders["the first for all"], orders["the last for all"] = 0 * rows, 0 * rows + count - 1
    orders["the one before each"] = np.roll(rows, 1)
    orders["the next of each"] = np.roll(rows, -1)
    for parts in (n for n in range(2, count) if count % n == 0):
        sizes = f"({parts}, {count // parts})"
        orders[f"in the order of {sizes} read the other way round"] = rows.reshape(
            parts, -1).T.ravel()  # fmt: skip
        orders[f"the first {parts}, tiled"] = rows % parts
        orders[f"the first {parts}, repeated"] = rows // (count // parts)
        orders[f"the first of each {count // parts}"] = rows - rows % (count // parts)
    yield from _of_all_sequences(recipe)
    for words, order in orders.items():
        for names in (("key", "value"), ("query", "key", "value"), ("query",), ("key",),
                      ("value",)):  # fmt: skip
            inputs = {n: x[order] if n in names else x for n, x in recipe.inputs.items()}
            yield f"{' and '.join(names)}: {words}", recipe.but(inputs=inputs)
        yield f"output: {words}", recipe.after(("output",), lambda x, order=order: x[order])


ALL = "each query sees the keys of all sequences"


def _of_all_sequences(recipe: Recipe) -> Variants:
    """Each query sees the keys of all sequences, as of a batch that is laid end to end."""
    batch, queries, keys = recipe.lengths
    plain = recipe.bias is recipe.kept is recipe.decoded is recipe.segments is None
    if batch == 1 or not plain or batch * recipe.stages["logits"].size > MOST_LOGITS:
        return

    def whole(x: np.ndarray) -> np.ndarray:
        """What all sequences have, one after another."""
        x = np.broadcast_to(x, (batch, *x.shape[1:]))
        return np.broadcast_to(x.reshape(1, -1, *x.shape[2:]), (batch, batch * keys, *x.shape[2:]))

    inputs = {n: x if n == "query" else whole(x) for n, x in recipe.inputs.items()}
    places = {"positions": recipe.places("query"), "key_positions": whole(recipe.places("key"))}
    masks = recipe.masks.items()
    moved = recipe.window is not None or (recipe.offset is not None and np.any(recipe.offset))
    if all(m.shape[1:3] == (1, 1) for _, m in masks) and not moved:
        rows = {
            n: np.broadcast_to(m, (batch, 1, 1, keys)).reshape(1, 1, 1, -1) for n, m in masks
        }  # fmt: skip
        end_to_end = {"inputs": inputs, "masks": rows, "offset": queries * np.arange(batch)}
        yield f"{ALL}, laid end to end", recipe.but(**end_to_end, **places)
        if recipe.sections:
            yield f"{ALL}, laid end to end, and positions go on", recipe.but(**end_to_end)
    seen = np.broadcast_to(allowed(recipe), (batch, *allowed(recipe).shape[1:3], keys))
    tiled = {"masks": {"all": np.tile(seen, batch)}, "causal": False, "window": None}
    if masks or moved or recipe.causal:
        yield f"{ALL}, as it sees its own", recipe.but(inputs=inputs, **tiled, **places)


def _folded(length: int) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Positions of several axes in one, read in another order of these axes."""
    for rows in (n for n in range(2, length) if length % n == 0):
        changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "read the other way round": lambda x: x.swapaxes(1, 2),
            "the first in reverse": lambda x: np.flip(x, 1),
            "the last in reverse": lambda x: np.flip(x, 2),
        }
        for words, change in changes.items():

            def moved(
                x: np.ndarray, rows: int = rows,
                change: Callable[[np.ndarray], np.ndarray] = change,
            ) -> np.ndarray:  # fmt: skip
                if x.shape[1] != length:
                    return x
                return change(x.reshape(len(x), rows, -1, x.shape[-1])).reshape(x.shape)

            yield f"of positions with the axes ({rows}, {length // rows}), {words}", moved


def _norms(axis: int | tuple[int, ...]) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Norms over an axis, without weights."""

    def layer(x: np.ndarray, eps: float) -> np.ndarray:
        apart = x - x.mean(axis, keepdims=True)
        return apart / np.sqrt(np.mean(apart**2, axis, keepdims=True) + eps)

    def rms(x: np.ndarray, eps: float) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis, keepdims=True) + eps)

    def l2(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.sqrt(np.sum(x**2, axis, keepdims=True)), 1e-12)

    for eps in NORM_EPS:
        yield f"layer norm, epsilon {eps:g}", lambda x, eps=eps: layer(x, eps)
        yield f"RMS norm, epsilon {eps:g}", lambda x, eps=eps: rms(x, eps)
    yield "L2 norm", l2


def _normed(recipe: Recipe) -> Variants:
    """Inputs, queries and keys, values, context or output that are normalized once more."""
    for words, norm in _norms(-1):
        every = ("query", "key", "value")
        for names in (every, ("query",), ("key", "value")):
            inputs = {n: norm(x) if n in names else x for n, x in recipe.inputs.items()}
            yield f"{words}, of the input of {listed(names)}", recipe.but(inputs=inputs)
        for names in (("query", "key"), ("query",), ("key",), ("value",), ("context",),
                      ("output",)):  # fmt: skip
            yield f"{words}, of {' and '.join(names)}", recipe.after(names, norm)
        for name, x in recipe.inputs.items():
            if x.shape == recipe.stages["output"].shape:
                wrong = recipe.after(("output",), lambda y, x=x, norm=norm: norm(y + x))
                yield f"{words}, of the output and the {name} added to it", wrong
    for words, norm in _norms((-2, -1)):
        for names in (("query", "key"), ("context",)):
            of = "the context" if len(names) == 1 else "query and key"
            yield f"{words}, of {of} over all heads", recipe.after(names, norm)


MISTAKES: tuple[Row, ...] = (
    ("batch and time exchanged", "One of the two takes (time, batch, features): pass "
     "`batch_first=True`, or exchange the axes.", _batch_and_time),
    ("attention over the heads", "Exchange heads and positions before the attention, which runs "
     "over the last axis but one: (B, T, H, d) to (B, H, T, d).", _over_heads),
    *(("heads merged wrongly", "Exchange heads and positions before the heads are "
       "merged: (B, H, T, d) to (B, T, H, d).", make, no_families, make is _merged)
      for make in (_merged_usually, _merged)),
    *(("heads split wrongly", "Reshape to (B, T, H, d), then exchange the axes to "
       "(B, H, T, d).", make, no_families, make is _split)
      for make in (_split_usually, _folded_in_the_batch, _split)),
    ("in another order of positions", "Leave positions, sequences and features in their order.",
     _reversed, no_families, True),
    ("axes exchanged", "Move the axis of positions back to its place after the attention, and "
     "leave the axes of the batch in their order.", _axes_of_the_batch, no_families, True),
    ("another sequence of the batch", "Each sequence of the batch attends over its own keys and "
     "values: where several queries share one, repeat it in their order.", _other_sequences,
     no_families, True),
    ("normalized once more", "The layer has no norm of its own here: leave it to the block around "
     "it.", _normed, no_families, True),
)  # fmt: skip
