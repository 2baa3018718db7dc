"""Mistakes with the weights: transposed, in another order, of another head, left out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from anymha.parity.diagnose.changes import Maker, Row, listed, no_families
from anymha.parity.diagnose.head_maps import in_heads, in_words
from anymha.parity.oracle.recipe import Arrays, Recipe, Variants

NAMES = ("query", "key", "value")
Changed = Mapping[str, np.ndarray | None]
SMALL = 1 << 14
"""How many numbers weights may have to be compared with each other's."""

SHARDS = (2, 3, 4, 8)
"""Into how many parts kernels are cut, beside the numbers of heads."""

MOST_HEADS = 4
"""Up to so many heads all their orders are tried."""


def _once(make: Maker) -> Maker:
    """The variants whose weights no variant before them has, where weights are small."""

    def variants(recipe: Recipe) -> Variants:
        own, before = recipe.weights, set[tuple[Any, ...]]()
        small = sum(array.size for array in own.values()) <= SMALL
        for words, wrong in make(recipe):
            changed = [(n, a) for n, a in wrong.weights.items() if a is not own.get(n)]
            key = tuple((n, a.shape, a.tobytes()) for n, a in changed) if small else ()
            if not small or key not in before:
                before.add(key)
                yield words, wrong

    return variants


def _transposed(recipe: Recipe) -> Variants:
    turned: Arrays = {}
    for name in (*NAMES, "output"):
        matrix, shape = _matrix(recipe, name), recipe.weights[f"{name}.kernel"].shape
        if len(matrix) == matrix.shape[1]:
            turned[f"{name}.kernel"] = matrix.T.reshape(shape)
    yield from _each(recipe, turned, NAMES)


def _scales_exchanged(recipe: Recipe) -> Variants:
    """Quantised kernels of which the scale of each column is that of the row, or the reverse.

    The greatest number of a column is 127 or 7 times its scale.
    """
    for wrong_one, what, axis in (("row", "column", 0), ("column", "row", 1)):
        changed: Arrays = {}
        for name in (*NAMES, "output"):
            matrix, shape = _matrix(recipe, name), recipe.weights[f"{name}.kernel"].shape
            scales = np.abs(matrix).max(axis, keepdims=True)
            if len(matrix) == matrix.shape[1] and scales.all():
                changed[f"{name}.kernel"] = (matrix / scales * scales.T).reshape(shape)
        words = f"whole numbers have the scale of each {wrong_one}, not of each {what}"
        yield from ((f"{words}, {named}", wrong) for named, wrong in _each(recipe, changed, NAMES))


def _interleaved(recipe: Recipe) -> Variants:
    """The features of a kernel read as (width, heads) in place of (heads, width)."""
    changed: Arrays = {}
    back: Arrays = {}
    for name in NAMES:
        for key, array in _own(recipe, name).items():
            *front, heads, width = array.shape
            changed[key] = array.reshape(*front, width, heads).swapaxes(-1, -2)
            back[key] = array.swapaxes(-1, -2).reshape(array.shape)
    yield from _each(recipe, changed, NAMES)
    for words, arrays, part in (
        ("the kernel alone", changed, ".kernel"),
        ("the bias alone", changed, ".bias"),
        ("the bias alone, the other way round", back, ".bias"),
    ):
        one = {n: a for n, a in arrays.items() if n.endswith(part)}
        if 0 < len(one) < len(changed):
            for named, wrong in _each(recipe, one, NAMES):
                yield f"{named}, {words}", wrong


def _output_interleaved(recipe: Recipe) -> Variants:
    """The output's kernel read with (width, heads) in place of (heads, width)."""
    kernel = recipe.weights["output.kernel"]
    heads, width, features = kernel.shape
    turned = kernel.reshape(width, heads, features).swapaxes(0, 1)
    yield "", _with(recipe, {"output.kernel": turned})


def _heads_permuted(recipe: Recipe) -> Variants:
    """The heads in another order before the output's projection, or of the queries alone."""
    heads = recipe.heads[0]
    for order in _orders(heads):
        words = _order_in_words(order)
        kernel = recipe.weights["output.kernel"][list(order)]
        yield (
            f"of the output's kernel, in the order {words}",
            _with(recipe, {"output.kernel": kernel}),
        )
    for name in NAMES:
        count = recipe.weights[f"{name}.kernel"].shape[1]
        for order in _orders(count):
            words = _order_in_words(order)
            changed = {n: a[..., list(order), :] for n, a in _own(recipe, name).items()}
            yield f"of {name}, in the order {words}", _with(recipe, changed)


@lru_cache(maxsize=1 << 12)
def _order_in_words(order: tuple[int, ...]) -> str:
    """Words for an order of all heads; a search asks for the same ones again and again."""
    return in_words(np.array(order), len(order), len(order))


def _packed_order(recipe: Recipe) -> Variants:
    """Query, key and value taken from a packed kernel in another order."""
    for order in itertools.permutations(NAMES):
        moved = [pair for pair in zip(NAMES, order, strict=True) if pair[0] != pair[1]]
        if moved and all(_alike(recipe, pair) for pair in moved):
            changed: dict[str, np.ndarray | None] = dict.fromkeys(
                key for name in NAMES for key in _own(recipe, name)
            )
            for name, other in zip(NAMES, order, strict=True):
                changed |= {
                    f"{name}.{key.partition('.')[2]}": array
                    for key, array in _own(recipe, other).items()
                }
            words = [f"{name} has those of the {other}" for name, other in moved]
            yield listed(words), _with(recipe, changed)


def _packed_heads(recipe: Recipe) -> Variants:
    """A packed kernel cut by head where it lies by block, or the other way round."""
    if not _alike(recipe):
        return
    whole = [p for p in ("kernel", "bias") if all(f"{n}.{p}" in recipe.weights for n in NAMES)]
    orders = {"by head in place of by block": -3, "by block in place of by head": -2}
    for (words, at), parts in itertools.product(orders.items(), (whole, whole[:1])):
        changed: Arrays = {}
        for part in parts:
            three = [recipe.weights[f"{name}.{part}"] for name in NAMES]
            packed = np.stack(three, axis=at)  # (D, 3, H, d), or (D, H, 3, d)
            *front, _, _, width = packed.shape
            heads = three[0].shape[-2]
            shape = (heads, 3, width) if at == -3 else (3, heads, width)
            again = np.moveaxis(packed.reshape(*front, *shape), -2 if at == -3 else -3, 0)
            changed |= {f"{n}.{part}": a for n, a in zip(NAMES, again, strict=True)}
        yield words + ", the biases are right" * (parts != whole), _with(recipe, changed)


STORED = ("PHdD", "DPHd", "HPdD", "DHPd", "PdHD", "DPdH", "HdPD", "DHdP", "dHPD", "DdHP", "dPHD",
          "DdPH")  # fmt: skip
"""The orders in which a packed kernel lies in memory: features first (Dense) or last (Linear)."""


def _reshaped(recipe: Recipe) -> Variants:
    """Kernels whose memory is read in another order of axes than that in which it was written."""
    groups = [names for names in (NAMES, ("key", "value")) if _alike(recipe, names)]
    for names in (*groups, *((name,) for name in (*NAMES, "output"))):
        orders = STORED if len(names) > 1 else _orders_of_one(names[0])
        for written, read in itertools.permutations(orders, 2):
            for parts in (("kernel", "bias"), ("kernel",)):
                changed = _as_read(recipe, names, parts, written, read)
                if changed:
                    of = f"packed {listed(names)}" if len(names) > 1 else names[0]
                    words = f"{of}, written as {written}, read as {read}"
                    alone = "" if len(parts) > 1 else ", the biases are right"
                    yield words + alone, _with(recipe, changed)


def _orders_of_one(name: str) -> tuple[str, ...]:
    """The orders of the axes of one projection's kernel."""
    inner = ("Hd", "dH")
    return tuple(order for hd in inner for order in (f"P{hd}D", f"DP{hd}", f"P{hd[0]}D{hd[1]}"))


def _as_read(
    recipe: Recipe, names: tuple[str, ...], parts: tuple[str, ...], written: str, read: str
) -> Arrays:
    changed: Arrays = {}
    for part in parts:
        arrays = [recipe.weights.get(f"{name}.{part}") for name in names]
        if any(array is None for array in arrays) or (part == "bias" and names == ("output",)):
            continue
        axes = ("HdD" if names == ("output",) else "DHd") if part == "kernel" else "Hd"
        pack = np.stack([np.asarray(array) for array in arrays])  # (P, ...)
        own = "P" + axes
        sizes = dict(zip(own, pack.shape, strict=True))
        before, after = ("".join(a for a in order if a in own) for order in (written, read))
        memory = np.transpose(pack, [own.index(a) for a in before]).reshape(-1)
        again = memory.reshape([sizes[a] for a in after])
        again = np.transpose(again, [after.index(a) for a in own])
        changed |= {f"{n}.{part}": a for n, a in zip(names, again, strict=True)}
    return changed


def _cut(recipe: Recipe) -> Variants:
    """Packs of parts of several widths, cut in another order, or by head and by block."""
    for names in (("key", "value"), NAMES):
        kernels = [recipe.weights[f"{name}.kernel"] for name in names]
        if len({len(kernel) for kernel in kernels}) > 1:
            continue
        heads = min(kernel.shape[-2] for kernel in kernels)
        every = [*itertools.permutations(range(len(names)))]
        orders = [(groups, order) for groups in dict.fromkeys((1, heads)) for order in every]
        pairs = [*itertools.permutations(orders, 2)]
        # Shards are joined, or cut, as they lie: parts stand in one order.
        for shards in (n for n in range(2, heads) if heads % n == 0):
            for groups, order in orders:
                one, other = (shards, order), (groups, order)
                pairs += [(one, other), (other, one)]
        for written, read in pairs:
            changed: Arrays = {}
            for part in ("kernel", "bias"):
                arrays = [recipe.weights.get(f"{name}.{part}") for name in names]
                if all(array is not None for array in arrays):
                    again = _unpacked(_packed([np.asarray(a) for a in arrays], *written),
                                      [np.asarray(a) for a in arrays], *read)  # fmt: skip
                    changed |= {f"{n}.{part}": a for n, a in zip(names, again, strict=True)}
            kinds = {1: "by block", heads: "by head"}
            words = [
                f"{', '.join(names[i] for i in order)} {kinds.get(n, f'in {n} shards')}"
                for n, order in (written, read)
            ]
            yield f"written in the order {words[0]}, split as {words[1]}", _with(recipe, changed)
        widths = {kernel.shape[-1] for kernel in kernels}
        for parts in (("kernel", "bias"), ("kernel",)) if len(widths) == 1 else ():
            changed = {}
            for part in parts:
                arrays = [_own(recipe, name).get(f"{name}.{part}") for name in names]
                there = [np.asarray(array) for array in arrays if array is not None]
                if len(there) == len(names):
                    pack = np.concatenate(there, -2)  # (D, heads, d)
                    again = pack.reshape(*pack.shape[:-2], *pack.shape[:-3:-1]).swapaxes(-1, -2)
                    cuts = np.cumsum([array.shape[-2] for array in there])[:-1]
                    again = np.split(again, cuts, axis=-2)
                    changed |= {f"{n}.{part}": a for n, a in zip(names, again, strict=True)}
            of = " and ".join(names)
            yield f"all heads of {of} interleaved with their width", _with(recipe, changed)


def _packed(arrays: list[np.ndarray], groups: int, order: tuple[int, ...]) -> np.ndarray:
    """One array of all, in groups of heads, each with its part of every array."""
    parts = [arrays[i].reshape(*arrays[i].shape[:-2], groups, -1) for i in order]
    pack = np.concatenate(parts, -1)
    return pack.reshape(*pack.shape[:-2], -1)


def _unpacked(pack: np.ndarray, like: list[np.ndarray], groups: int,
              order: tuple[int, ...]) -> list[np.ndarray]:  # fmt: skip
    whole = pack.reshape(*pack.shape[:-1], groups, -1)
    widths = [like[i].shape[-2] * like[i].shape[-1] // groups for i in order]
    parts = np.split(whole, np.cumsum(widths)[:-1], axis=-1)
    by_name = dict(zip(order, parts, strict=True))
    return [by_name[i].reshape(array.shape) for i, array in enumerate(like)]


def _other_heads(recipe: Recipe) -> Variants:
    """Another number of heads for the same kernels, with the scale of their width, or the right."""
    heads, shared = recipe.heads
    widths = [recipe.weights[f"{name}.kernel"].shape[2] for name in ("query", "value")]
    if recipe.sections:
        return
    options = {(h, k) for h in range(1, 2 * heads * widths[0] + 1) for k in (h, shared, 1)
               if h % k == 0}  # fmt: skip
    for h, k in sorted(options):
        counts = {"query": h, "key": k, "value": k, "output": h}
        changed = {name: _split(array, name, counts[name.partition(".")[0]])
                   for name, array in recipe.weights.items() if name != "output.bias"}  # fmt: skip
        shapes = {n: a.shape for n, a in changed.items() if a is not None}
        fits = len(shapes) == len(changed) and (h, k) != (heads, shared)
        if not fits or shapes["query.kernel"][2] != shapes["key.kernel"][2]:
            continue
        if shapes["value.kernel"][2] != shapes["output.kernel"][1]:
            continue
        masks = [m for m in (*recipe.masks.values(), recipe.bias, recipe.kept) if m is not None]
        if any(np.ndim(m) > 3 and np.shape(m)[1] != 1 for m in masks):
            continue
        words = f"{h} head{'s' if h > 1 else ''} in place of {heads}"
        words += "" if heads == shared and h == k else f", {k} of keys in place of {shared}"
        width = shapes["query.kernel"][2]
        wrong = _with(recipe, changed)
        own = recipe.scale * (widths[0] / width) ** 0.5
        yield words, wrong.but(scale=own)
        yield f"{words}, with the scale of {heads}", wrong


def _split(array: np.ndarray, name: str, heads: int) -> np.ndarray | None:
    """A projection's array with another number of heads; None where that does not divide it."""
    *front, own, width = array.shape[:2] if name == "output.kernel" else array.shape
    back = array.shape[2:] if name == "output.kernel" else ()
    if own * width % heads:
        return None
    return array.reshape(*front, heads, own * width // heads, *back)


def _tied(recipe: Recipe) -> Variants:
    """One head's weights in all heads, or features in reverse."""
    groups = [(name,) for name in NAMES] + [("key", "value"), ("query", "key")]
    parts: list[tuple[str, ...]] = [
        tuple(n for name in names for n in _own(recipe, name)) for names in groups
    ]
    parts += [(n,) for names in groups[:3] for n in _own(recipe, *names)]
    for keys in dict.fromkeys(parts):
        owners = dict.fromkeys(key.partition(".")[0] for key in keys)
        (first, *more), owner = keys, next(iter(owners))
        whole = more or f"{owner}.bias" not in recipe.weights
        words = " and ".join(owners) if whole else first.replace(".", "'s ")
        arrays = {key: recipe.weights[key] for key in keys}
        for how, change in {
            "that of the first head": lambda a: a[..., :1, :] + 0 * a,
            "that of the last head": lambda a: a[..., -1:, :] + 0 * a,
            "the features of each head in reverse": lambda a: a[..., ::-1],
        }.items():
            yield f"{words}: {how}", _with(recipe, {key: change(a) for key, a in arrays.items()})


def _of_another(recipe: Recipe) -> Variants:
    """A projection with the weights of another, whose matrix has the same shape."""

    def taken(name: str, other: str) -> Changed:
        shape = recipe.weights[f"{name}.kernel"].shape
        shapes = {"kernel": shape, "bias": shape[2:] if name == "output" else shape[1:]}
        own = {part: recipe.weights.get(f"{other}.{part}") for part in shapes}
        return {f"{name}.{part}": None if array is None else array.reshape(shapes[part])
                for part, array in own.items()}  # fmt: skip

    for name, other in itertools.permutations((*NAMES, "output"), 2):
        if _matrix(recipe, name).shape == _matrix(recipe, other).shape:
            changed = taken(name, other)
            yield f"{name} has those of the {other}", _with(recipe, changed)
            kernel = {n: array for n, array in changed.items() if n.endswith("kernel")}
            if any(changed.get(n) is not recipe.weights.get(n) for n in changed.keys() - kernel):
                yield f"{name} has the kernel of the {other}", _with(recipe, kernel)
            if name > other:
                swapped = _with(recipe, {**changed, **taken(other, name)})
                yield f"{other} and {name} swapped", swapped


def _bias_left_out(recipe: Recipe) -> Variants:
    yield from _each(
        recipe, {name: None for name in recipe.weights if name.endswith(".bias")}, NAMES
    )


def _bias_doubled(recipe: Recipe) -> Variants:
    doubled = {n: 2 * w for n, w in recipe.weights.items() if n.endswith(".bias")}
    yield from _each(recipe, doubled, NAMES)
    if "output.bias" in recipe.weights:
        often = recipe.heads[0] * recipe.weights["output.bias"]
        yield "output, once for each head", _with(recipe, {"output.bias": often})


def _bias_subtracted(recipe: Recipe) -> Variants:
    yield from _each(
        recipe, {n: -w for n, w in recipe.weights.items() if n.endswith(".bias")}, NAMES
    )
    bias, kernel = recipe.weights.get("output.bias"), recipe.weights["output.kernel"]
    if bias is not None and bias.size == kernel.shape[0] * kernel.shape[1]:
        through = np.einsum("hv,hvo->o", bias.reshape(kernel.shape[:2]), kernel)
        yield "that of the output before its projection", _with(recipe, {"output.bias": through})


def _twice(recipe: Recipe) -> Variants:
    """A projection of the results of a projection, as of its own; or none at all."""
    own = {name: _own(recipe, name) for name in (*NAMES, "output")}
    kernels = {name: recipe.weights[f"{name}.kernel"] for name in own}
    flat = {name: _matrix(recipe, name) for name in own}
    biases = {n: recipe.weights.get(f"{n}.bias", np.zeros(flat[n].shape[1])) for n in own}
    alike = all(np.array_equal(x, recipe.inputs["query"]) for x in recipe.inputs.values())
    for name, other in [*itertools.product(NAMES, repeat=2), ("output", "output")]:
        if flat[other].shape[1] == len(flat[name]) and (alike or name == other):
            bias = biases[other].reshape(-1) @ flat[name] + biases[name].reshape(-1)
            changed = {f"{name}.kernel": (flat[other] @ flat[name]).reshape(
                len(flat[other]), *kernels[name].shape[1:]) if name != "output" else (
                flat[other] @ flat[name]).reshape(kernels[name].shape)}  # fmt: skip
            if np.any(bias):
                shape = kernels[name].shape[1:] if name != "output" else bias.shape
                changed[f"{name}.bias"] = bias.reshape(shape)
            words = "applied twice" if name == other else f"of the {other}, not of its input"
            yield f"{name}, {words}", _with(recipe, changed)
        if name == other and len(flat[name]) == flat[name].shape[1]:
            plain = np.eye(len(flat[name])).reshape(kernels[name].shape)
            yield f"{name}, its kernel is left out", _with(recipe, {f"{name}.kernel": plain})
            none = dict.fromkeys(own[name]) | {f"{name}.kernel": plain}
            if name != "output":
                yield f"{name}, left out", _with(recipe, none)


def _bias_of_another(recipe: Recipe) -> Variants:
    """A projection with the bias of another."""
    biases = {name: recipe.weights.get(f"{name}.bias") for name in NAMES}
    for name, other in itertools.permutations(NAMES, 2):
        one, two = biases[name], biases[other]
        if one is not None and two is not None and one.shape == two.shape:
            yield f"{name} has that of {other}", _with(recipe, {f"{name}.bias": two})
            yield f"{name} has that of {other} too", _with(recipe, {f"{name}.bias": one + two})
    for name, other in itertools.combinations(NAMES, 2):
        one, two = biases[name], biases[other]
        if one is not None and two is not None and one.shape == two.shape:
            swapped = {f"{name}.bias": two, f"{other}.bias": one}
            yield f"the biases of {name} and {other} are swapped", _with(recipe, swapped)


def _output_not_by_head(recipe: Recipe) -> Variants:
    """The output's kernel not applied to each head's own part."""
    kernel = recipe.weights["output.kernel"]
    heads = len(kernel)
    first = np.broadcast_to(kernel[:1], kernel.shape)
    yield "every head has the first head's part", _with(recipe, {"output.kernel": first})
    yield "the heads' outputs are averaged", _with(recipe, {"output.kernel": kernel / heads})


def _without_output(recipe: Recipe) -> Variants:
    """The heads side by side for the output."""
    kernel = recipe.weights["output.kernel"]
    if len(kernel) * kernel.shape[1] == kernel.shape[2]:
        plain = np.eye(kernel.shape[2]).reshape(kernel.shape)
        yield "", _with(recipe, {"output.kernel": plain, "output.bias": None})


def _orders(heads: int) -> Iterator[tuple[int, ...]]:
    """Orders of the heads but their own."""
    if heads <= MOST_HEADS:
        yield from itertools.islice(itertools.permutations(range(heads)), 1, None)
    else:
        yield tuple(reversed(range(heads)))
        yield from (tuple((h + n) % heads for h in range(heads)) for n in (1, -1, heads // 2))
        for groups in (n for n in range(2, heads) if heads % n == 0):
            yield tuple(h % groups * (heads // groups) + h // groups for h in range(heads))


def _doubled(recipe: Recipe) -> Variants:
    """The queries' or keys' weights twice, where that is as without a scale.

    Elsewhere the factor of the logits is measured.
    """
    for name in ("query", "key") if math.isclose(2 * recipe.scale, 1.0) else ():
        changed = {n: 2 * array for n, array in _own(recipe, name).items()}
        what = "kernel and bias" if len(changed) > 1 else "kernel"
        yield f"{name}'s {what}, 2 times", _with(recipe, changed)


def _doubled_in_part(recipe: Recipe) -> Variants:
    """A kernel alone, or the weights of one head, twice or half as great."""
    for name, times in itertools.product(("query", "key"), (2.0, 0.5)):
        own = _own(recipe, name)
        kernel = f"{name}.kernel"
        if len(own) > 1:
            words = f"{name}'s kernel, {times:g} times"
            yield words, _with(recipe, {kernel: times * own[kernel]})
        heads = own[kernel].shape[1]
        for head in range(heads) if heads <= 16 else ():
            factors = np.where(np.arange(heads) == head, times, 1.0)[:, None]
            for what, names in {"kernel and bias": tuple(own), "kernel": (kernel,)}.items():
                if what == "kernel" or len(names) > 1:
                    words = f"{name}'s {what}, of which {in_heads(factors[:, 0])}"
                    yield words, _with(recipe, {n: own[n] * factors for n in names})


def _shards(recipe: Recipe) -> Variants:
    """Parts of kernels, as of several devices, in the place of others, or left out."""
    every = (*NAMES, "output")
    groups = [(name,) for name in every] + [("key", "value"), NAMES, every]
    alone = {part: [(n,) for n in every if f"{n}.bias" in recipe.weights] for part in PARTS[1:]}
    for part, names in ((p, n) for p in PARTS for n in alone.get(p, groups)):
        for along in ("heads", "features"):
            arrays = {n: a for name in names for n, a in _own(recipe, name).items()
                      if part in ("", n.partition(".")[2])}  # fmt: skip
            # Biases lie along the heads, that of the output along its features.
            arrays = {n: a for n, a in arrays.items() if n.endswith("kernel")
                      or (n == "output.bias") == (along == "features")}  # fmt: skip
            cuts = {n: _cut_axis(n, a, along) for n, a in arrays.items()}
            sizes = [len(cut) for cut in cuts.values()]
            counts = {*SHARDS, *recipe.heads} - {1} if arrays else set[int]()
            for count in sorted(n for n in counts if all(size % n == 0 for size in sizes)):
                for words, order in _of_shards(count):
                    changed = {n: _in_shards(n, cut, along, count, order).reshape(arrays[n].shape)
                               for n, cut in cuts.items()}  # fmt: skip
                    of = listed(names) if len(names) < 4 else "all projections"
                    what = {"": of, "bias": f"{of}'s bias", "kernel": f"{of}'s kernel"}[part]
                    cut = f"cut into {count} along the {along}"
                    yield f"{what}, {cut}: {words}", _with(recipe, changed)


PARTS = ("", "kernel", "bias")
"""Kernel and bias together, and each alone."""


Order = tuple[int, ...]


def _cut_axis(name: str, array: np.ndarray, along: str) -> np.ndarray:
    """An array with the axis first that is cut: heads with their width, or the other one."""
    if name == "output.bias":
        return array
    if name == "output.kernel":
        flat = array.reshape(-1, array.shape[-1])
        return flat if along == "heads" else flat.T
    flat = array.reshape(*array.shape[:-2], -1)
    return flat.T if along == "heads" else flat


def _in_shards(name: str, cut: np.ndarray, along: str, count: int, order: Order) -> np.ndarray:
    """An array, cut along its first axis, whose parts are others of them; -1: zeros."""
    parts = cut.reshape(count, -1, *cut.shape[1:])[[*order]]
    if -1 in order:
        parts[order.index(-1)] = 0  # one at most is missing
    again = parts.reshape(-1, *cut.shape[1:])
    return again.T if (name == "output.kernel") != (along == "heads") else again


def _of_shards(count: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Which part stands where, counted from 0, with words."""
    every = tuple(range(count))
    yield "the first part for all", (0,) * count
    if count > 2:
        yield "the last part for all", (count - 1,) * count
        yield "in the order of the last to the first", every[::-1]
        yield "each part in the place of the one before it", (*every[1:], 0)
        yield "each part in the place of the one after it", (count - 1, *every[:-1])
    else:
        yield "exchanged", (1, 0)
        yield "the second part for both", (1, 1)
    for groups in (n for n in range(2, count) if count % n == 0):
        words = f"of each {count // groups} parts the first for all"
        yield words, tuple(at // (count // groups) * (count // groups) for at in every)
        yield (
            f"in the order of {groups} groups by turns",
            tuple(at % groups * (count // groups) + at // groups for at in every),
        )
    if count % 2 == 0 and count > 2:
        yield "each two exchanged", tuple(at ^ 1 for at in every)
    for at in every:
        yield f"part {at} is missing", (*every[:at], -1, *every[at + 1 :])
    for at, other in ((a, b) for a in every for b in (a - 1, a + 1) if count > 2):
        if 0 <= other < count:
            words = f"part {other} twice, part {at} missing"
            yield words, (*every[:at], other, *every[at + 1 :])


def _alike(recipe: Recipe, names: tuple[str, ...] = NAMES) -> bool:
    return len({recipe.weights[f"{name}.kernel"].shape for name in names}) == 1


def _each(recipe: Recipe, changed: Changed, together: tuple[str, ...] = ()) -> Variants:
    """Each projection changed alone; then those of `together`, and all."""
    names = list(dict.fromkeys(name.partition(".")[0] for name in changed))
    groups: list[tuple[str, ...]] = [(name,) for name in names]
    for group in (together, tuple(names)):
        if len(group) > 1 and set(group) <= set(names) and group not in groups:
            groups.append(group)
    for group in groups:
        own = {n: a for n, a in changed.items() if n.partition(".")[0] in group}
        yield listed(group), _with(recipe, own)


def _with(recipe: Recipe, changed: Changed) -> Recipe:
    """The recipe with these weights; None leaves one out."""
    weights = {**recipe.weights, **changed}
    return recipe.but(weights={n: a for n, a in weights.items() if a is not None})


def _matrix(recipe: Recipe, name: str) -> np.ndarray:
    """A projection's kernel as a matrix (in, out)."""
    kernel = recipe.weights[f"{name}.kernel"]
    return kernel.reshape((-1, kernel.shape[-1]) if name == "output" else (len(kernel), -1))


def _own(recipe: Recipe, name: str) -> Arrays:
    """A projection's kernel and bias, as far as it has them, by their names."""
    return {n: a for n, a in recipe.weights.items() if n in (f"{name}.kernel", f"{name}.bias")}


SCALED = "Load each weight as it is, and scale no projection; an update is merged once."

MISTAKES: tuple[Row, ...] = (
    ("transposed kernel", "A Linear of torch holds (out, in), a Dense of Keras (in, out): "
     "transpose the kernel.", _transposed),
    ("quantised weights scaled on the other axis", "A quantised kernel has a scale for each "
     "output, or for each input: multiply along that axis.", _scales_exchanged),
    ("packed weights in another order", "Split the packed kernel into query, key, value "
     "in this order.", _packed_order),
    ("packed weights split wrongly", "A packed kernel lies by block (all queries, all "
     "keys, all values) or by head (query, key, value of each head): split it as it was packed.",
     _packed_heads),
    ("heads interleaved", "The features of a projection are (heads, width): reshape in "
     "this order.", _interleaved),
    ("missing bias", "The projection has a bias: load it.", _bias_left_out),
    ("doubled bias", "Add the bias once.", _bias_doubled),
    ("bias subtracted or elsewhere", "Add each bias once, after its own product.",
     _bias_subtracted),
    ("projection twice or left out", "Apply each projection once, to its own input.", _twice),
    ("bias of another projection", "Give each projection its own bias.",
     _bias_of_another),
    ("output kernel interleaved", "The rows of the output's kernel are (heads, width): "
     "merge the heads in this order.", _output_interleaved),
    ("output projection left out", "Project the heads, side by side, to the output.",
     _without_output),
    ("output projection not applied by head", "The output's kernel has a part of its "
     "own for each head, (H, d_v, O); the heads' results are added.", _output_not_by_head),
    ("heads permuted", "Bring the heads into one order.", _heads_permuted),
    ("weights of another projection", "Give each projection its own kernel and bias.",
     _of_another),
    ("weights scaled", SCALED, _doubled),
    ("weights scaled", SCALED, _doubled_in_part, no_families, True),
    ("another number of heads", "Give both the same number of heads: the shapes of kernels as "
     "matrices do not tell it.", _other_heads, no_families, True),
    ("one head for all", "Each head has its own part of kernel and bias: do not broadcast one.",
     _tied, no_families, True),
    ("packed parts cut wrongly", "Cut a packed kernel in the order and by the widths by which it "
     "was packed.", _once(_cut), no_families, True),
    ("weights reshaped without a transpose", "The axes of a kernel in memory are packed parts P, "
     "heads H, width d, features D in some order: read them in the order in which they were "
     "written, and transpose them then.", _once(_reshaped), no_families, True),
    ("shards loaded wrongly", "Devices have parts of kernels: join each part once, in their "
     "order, along the axis along which they were cut.", _once(_shards), no_families, True),
)  # fmt: skip
