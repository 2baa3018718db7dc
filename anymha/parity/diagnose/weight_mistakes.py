"""Mistakes with the weights: transposed, in another order, of another head, left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from anymha.parity.diagnose.changes import Maker
from anymha.parity.oracle.recipe import Arrays, Recipe, Variants

NAMES = ("query", "key", "value")
Changed = Mapping[str, np.ndarray | None]
MOST_HEADS = 4
"""Up to so many heads all their orders are tried."""


def _transposed(recipe: Recipe) -> Variants:
    turned: Arrays = {}
    for name in (*NAMES, "output"):
        kernel = recipe.weights[f"{name}.kernel"]
        split = 2 if name == "output" else 1
        rows, columns = np.prod(kernel.shape[:split]), np.prod(kernel.shape[split:])
        if rows == columns:
            turned[f"{name}.kernel"] = kernel.reshape(rows, columns).T.reshape(kernel.shape)
    yield from _each(recipe, turned, NAMES)


def _interleaved(recipe: Recipe) -> Variants:
    """The features of a kernel read as (width, heads) in place of (heads, width)."""
    changed: Arrays = {}
    for name in NAMES:
        for key, array in _own(recipe, name).items():
            *front, heads, width = array.shape
            changed[key] = array.reshape(*front, width, heads).swapaxes(-1, -2)
    yield from _each(recipe, changed, NAMES)


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
        words = ", ".join(map(str, order))
        kernel = recipe.weights["output.kernel"][list(order)]
        yield f"before the output, to {words}", _with(recipe, {"output.kernel": kernel})
    for name in NAMES:
        count = recipe.weights[f"{name}.kernel"].shape[1]
        for order in _orders(count):
            words = ", ".join(map(str, order))
            changed = {n: a[..., list(order), :] for n, a in _own(recipe, name).items()}
            yield f"of {name}, to {words}", _with(recipe, changed)


def _packed_order(recipe: Recipe) -> Variants:
    """Query, key and value taken from a packed kernel in another order."""
    if not _alike(recipe):
        return
    for order in itertools.permutations(NAMES):
        if order != NAMES:
            changed: dict[str, np.ndarray | None] = dict.fromkeys(
                key for name in NAMES for key in _own(recipe, name)
            )
            for name, other in zip(NAMES, order, strict=True):
                changed |= {
                    f"{name}.{key.partition('.')[2]}": array
                    for key, array in _own(recipe, other).items()
                }
            yield f"query, key, value got those of {', '.join(order)}", _with(recipe, changed)


def _packed_heads(recipe: Recipe) -> Variants:
    """A packed kernel cut by head where it lies by block, or the other way round."""
    if not _alike(recipe):
        return
    parts = [p for p in ("kernel", "bias") if all(f"{n}.{p}" in recipe.weights for n in NAMES)]
    for words, at in (("by head in place of by block", -3), ("by block in place of by head", -2)):
        changed: Arrays = {}
        for part in parts:
            three = [recipe.weights[f"{name}.{part}"] for name in NAMES]
            packed = np.stack(three, axis=at)  # (D, 3, H, d), or (D, H, 3, d)
            *front, _, _, width = packed.shape
            heads = three[0].shape[-2]
            shape = (heads, 3, width) if at == -3 else (3, heads, width)
            again = np.moveaxis(packed.reshape(*front, *shape), -2 if at == -3 else -3, 0)
            changed |= {f"{n}.{part}": a for n, a in zip(NAMES, again, strict=True)}
        yield words, _with(recipe, changed)


def _bias_left_out(recipe: Recipe) -> Variants:
    yield from _each(recipe, {name: None for name in recipe.weights if name.endswith(".bias")})


def _bias_doubled(recipe: Recipe) -> Variants:
    doubled = {n: 2 * w for n, w in recipe.weights.items() if n.endswith(".bias")}
    yield from _each(recipe, doubled)
    if "output.bias" in recipe.weights:
        often = recipe.heads[0] * recipe.weights["output.bias"]
        yield "output, once for each head", _with(recipe, {"output.bias": often})


def _bias_of_another(recipe: Recipe) -> Variants:
    """A projection with the bias of another."""
    biases = {name: recipe.weights.get(f"{name}.bias") for name in NAMES}
    for name, other in itertools.permutations(NAMES, 2):
        one, two = biases[name], biases[other]
        if one is not None and two is not None and one.shape == two.shape:
            yield f"{name} has that of {other}", _with(recipe, {f"{name}.bias": two})


def _output_not_by_head(recipe: Recipe) -> Variants:
    """The output's kernel not applied to each head's own part."""
    kernel = recipe.weights["output.kernel"]
    heads, width, features = kernel.shape
    first = np.broadcast_to(kernel[:1], kernel.shape)
    yield "every head has the first head's part", _with(recipe, {"output.kernel": first})
    mean = np.broadcast_to(kernel.mean(0, keepdims=True), kernel.shape)
    yield "heads are averaged before it", _with(recipe, {"output.kernel": mean})
    yield "the heads' outputs are averaged", _with(recipe, {"output.kernel": kernel / heads})
    if heads * width == features:
        plain = np.eye(features).reshape(kernel.shape)
        yield "it is left out", _with(recipe, {"output.kernel": plain, "output.bias": None})


def _orders(heads: int) -> Iterator[tuple[int, ...]]:
    """Orders of the heads but their own."""
    if heads <= MOST_HEADS:
        yield from itertools.islice(itertools.permutations(range(heads)), 1, None)
    else:
        yield tuple(reversed(range(heads)))
        yield from (tuple((h + n) % heads for h in range(heads)) for n in (1, -1, heads // 2))


def _alike(recipe: Recipe) -> bool:
    return len({recipe.weights[f"{name}.kernel"].shape for name in NAMES}) == 1


def _each(recipe: Recipe, changed: Changed, together: tuple[str, ...] = ()) -> Variants:
    """Each projection changed alone; then those of `together`, and all."""
    names = list(dict.fromkeys(name.partition(".")[0] for name in changed))
    groups: list[tuple[str, ...]] = [(name,) for name in names]
    for group in (together, tuple(names)):
        if len(group) > 1 and set(group) <= set(names) and group not in groups:
            groups.append(group)
    for group in groups:
        own = {n: a for n, a in changed.items() if n.partition(".")[0] in group}
        yield " and ".join(group), _with(recipe, own)


def _with(recipe: Recipe, changed: Changed) -> Recipe:
    """The recipe with these weights; None leaves one out."""
    weights = {**recipe.weights, **changed}
    return recipe.but(weights={n: a for n, a in weights.items() if a is not None})


def _own(recipe: Recipe, name: str) -> Arrays:
    """A projection's kernel and bias, as far as it has them, by their names."""
    return {n: a for n, a in recipe.weights.items() if n in (f"{name}.kernel", f"{name}.bias")}


MISTAKES: tuple[tuple[str, str, Maker], ...] = (
    ("transposed kernel", "A Linear of torch holds (out, in), a Dense of Keras (in, out): "
     "transpose the kernel.", _transposed),
    ("packed weights in another order", "Split the packed kernel into query, key, value "
     "in this order.", _packed_order),
    ("packed weights split wrongly", "A packed kernel lies by block (all queries, all "
     "keys, all values) or by head (query, key, value of each head): split it as it was packed.",
     _packed_heads),
    ("heads interleaved", "The features of a projection are (heads, width): reshape in "
     "this order.", _interleaved),
    ("missing bias", "The projection has a bias: load it.", _bias_left_out),
    ("doubled bias", "Add the bias once.", _bias_doubled),
    ("bias of another projection", "Give each projection its own bias.",
     _bias_of_another),
    ("output kernel interleaved", "The rows of the output's kernel are (heads, width): "
     "merge the heads in this order.", _output_interleaved),
    ("output projection not applied by head", "The output's kernel has a part of its "
     "own for each head, (H, d_v, O); the heads' results are added.", _output_not_by_head),
    ("heads permuted", "Bring the heads into one order.", _heads_permuted),
)  # fmt: skip
