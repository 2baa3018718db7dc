"""Heads that are taken for others: which for which is measured.

The output is a sum over heads. What each head would add to it with the queries, keys, values,
probabilities or context of each other head is known; how much of each the candidate has, is found
by least squares: a matrix of heads that has one 1 in each row where all is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.changes import listed
from anymha.parity.diagnose.measured import number
from anymha.parity.oracle.recipe import Arrays, Recipe, Variants, context_by, einsum

MOST = 1 << 22
"""The most numbers of all that heads would add."""

NEARER = 0.5
"""What a map may leave of the differences; more, and it explains nothing."""

NEAR = 0.03
"""How far a measured number may be from a simple one."""

CLEAR = 1e-3
"""Factors of heads that are no further apart are the same."""

PLACES = ("key and value", "key", "value", "query", "probabilities", "context")


def head_maps(recipe: Recipe, reported: Arrays) -> Iterator[tuple[tuple[Cause, ...], Recipe]]:
    """The recipes whose heads are those of others, near to the reported output."""
    exact, got = recipe.stages["output"], reported.get("output")
    heads, shared = recipe.heads
    if got is None or got.shape != exact.shape or not np.all(np.isfinite([got, exact])):
        return
    if heads == 1 or heads**2 * exact.size > MOST or exact.size < 2 * heads**2:
        return
    rest = got - recipe.weights.get("output.bias", 0.0)
    before = float(np.linalg.norm(got - exact))
    every, found_maps = dict(_added(recipe)), []
    for place in PLACES:
        if place not in every:
            continue
        terms = every[place]
        count = shared if place in ("key and value", "key", "value") else heads
        columns = terms[:, :count].reshape(heads * count, -1)
        found, _, rank, _ = np.linalg.lstsq(columns.T, rest.reshape(-1), rcond=1e-6)
        if rank < len(found):
            continue
        left = float(np.linalg.norm(rest.reshape(-1) - found @ columns))
        whole = found.reshape(heads, count)
        for matrix in (_simple(whole), _factors(whole)) if left <= NEARER * before else ():
            name, detail = ("", "") if matrix is None else _named(place, matrix)
            if name:
                found_maps.append((name in FACTORS and place != "context", name, detail, place,
                                   matrix))  # fmt: skip
    # A head without a part in the output is told as that, before what may have made it so.
    for _, name, detail, place, matrix in sorted(found_maps, key=lambda one: one[0]):
        for stage, wrong in _mapped(recipe, place, matrix):
            yield (Cause(name, detail, stage, FIX),), wrong


FACTORS = ("heads left out", "heads scaled")
"""What a map with a factor for each head is called."""


FIX = "Give each head its own part of queries, keys, values and output: query head h reads key \
head h // (H / K)."


def _added(recipe: Recipe) -> Iterator[tuple[str, np.ndarray]]:
    """What each head adds to the output with the arrays of each other: (H, heads, B, T, O)."""
    heads, shared = recipe.heads
    kernel, stages, own = recipe.weights["output.kernel"], recipe.stages, np.arange(heads)

    def brought(context: np.ndarray) -> np.ndarray:
        return einsum("bthv,hvo->hbto", context, kernel)

    def with_map(stage: str, to: np.ndarray) -> Arrays:
        """The stages up to the context with a map of heads of a stage, as a row of head numbers."""
        return with_heads(recipe, stage, np.eye(stages[stage].shape[2])[to]).until("context")

    turned = [(own + n) % heads for n in range(heads)]
    contexts = [brought(stages["context"][:, :, turn]) for turn in turned]
    shares = [
        brought(context_by(recipe, {**stages, "dropped_probabilities": stages[
            "dropped_probabilities"][:, turn]}))
        for turn in turned
    ]  # fmt: skip
    queries = [brought(with_map("query", turn)["context"]) for turn in turned]
    yield "context", _by_head(contexts, turned, heads)
    yield "probabilities", _by_head(shares, turned, heads)
    yield "query", _by_head(queries, turned, heads)
    each = [np.full(heads, head) for head in range(shared)]
    values, keys, both = [], [], []
    for one in each:
        of_keys = with_map("key", one)
        values.append(brought(_context(recipe, stages, np.eye(shared)[one])))
        keys.append(brought(of_keys["context"]))
        if shared < heads:  # else it is a permutation of all, or that of the queries
            both.append(brought(_context(recipe, of_keys, np.eye(shared)[one])))
    for place, added in (("value", values), ("key", keys), ("key and value", both)):
        if added:
            yield place, np.stack(added, axis=1)


def _by_head(added: list[np.ndarray], turned: list[np.ndarray], heads: int) -> np.ndarray:
    result = np.empty((heads, heads, *added[0].shape[1:]))
    for array, turn in zip(added, turned, strict=True):
        result[np.arange(heads), turn] = array
    return result


def _context(recipe: Recipe, stages: Arrays, matrix: np.ndarray) -> np.ndarray:
    values = einsum("hg,bsgv->bshv", matrix, stages["value"])
    return einsum("bhts,bshv->bthv", stages["dropped_probabilities"], values)


def _logits(recipe: Recipe, stages: Arrays, matrix: np.ndarray) -> np.ndarray:
    keys = einsum("hg,bsgk->bshk", matrix, stages["key"])
    return recipe.scale * einsum("bthk,bshk->bhts", stages["query"], keys)


def with_heads(recipe: Recipe, place: str, matrix: np.ndarray) -> Recipe:
    """The recipe in which the heads of a stage are read by a map, where they are used."""
    if place == "query":

        def turned(recipe: Recipe, stages: Arrays) -> np.ndarray:
            query = einsum("hr,btrk->bthk", matrix, stages["query"])
            return own(recipe, {**stages, "query": query})

        own = recipe.steps["logits"]
        return recipe.stepping("logits", turned)
    if place == "key":
        return recipe.stepping("logits", partial(_logits, matrix=matrix))
    if place == "value":
        return recipe.stepping("context", partial(_context, matrix=matrix))
    if place == "key and value":
        return with_heads(with_heads(recipe, "key", matrix), "value", matrix)
    before = recipe.steps["context"]

    def mixed(recipe: Recipe, stages: Arrays) -> np.ndarray:
        if place == "context":
            return einsum("hr,btrv->bthv", matrix, before(recipe, stages))
        shares = einsum("hr,brts->bhts", matrix, stages["dropped_probabilities"])
        return before(recipe, {**stages, "dropped_probabilities": shares})

    return recipe.stepping("context", mixed)


def averaged(recipe: Recipe) -> Variants:
    """The mean or the sum of all heads in the place of each."""
    for place in PLACES:
        count = recipe.heads[place in ("key and value", "key", "value")]
        for words, part in (("mean", 1 / count), ("sum", 1.0)) if recipe.heads[0] > 1 else ():
            matrix = np.full((recipe.heads[0], count), part)
            yield f"{place}: {words} of all heads", with_heads(recipe, place, matrix)


def of_groups(recipe: Recipe) -> Variants:
    """The mean of a group of heads, or its first, in the place of each."""
    for place in PLACES:
        count = recipe.heads[place in ("key and value", "key", "value")]
        for group in range(2, count // 2 + 1):
            if count % group == 0:
                for words, one in (("the mean", np.full((group, group), 1 / group)),
                                   ("the first", np.eye(group)[:1].repeat(group, 0))):  # fmt: skip
                    own = np.kron(np.eye(count // group), one)  # [count, count]
                    matrix = own.repeat(recipe.heads[0] // count, 0)
                    yield f"{place}: {words} of each {group} heads", _mixed(recipe, place, matrix)


def _mixed(recipe: Recipe, place: str, matrix: np.ndarray) -> Recipe:
    """The recipe in which heads are read by a map; as they are projected, where that is alike."""
    names = [name for name in place.split(" and ") if name in ("query", "key", "value")]
    square = len(matrix) == matrix.shape[1] == recipe.heads[1]
    if not names or not square or recipe.options.keys() & {"rotary", "query_key_norm"}:
        return with_heads(recipe, place, matrix)
    return recipe.after(names, lambda x: einsum("hr,btrk->bthk", matrix, x))


def _mapped(recipe: Recipe, place: str, matrix: np.ndarray) -> Iterator[tuple[str, Recipe]]:
    """The first stage that is wrong and the recipe: a projection itself, or where it is read."""
    heads, shared = recipe.heads
    if place == "query" or (place in ("key", "value") and shared == heads):
        own = recipe.steps[place]

        def step(recipe: Recipe, stages: Arrays) -> np.ndarray:
            return einsum("hr,btrk->bthk", matrix, own(recipe, stages))

        yield place, recipe.stepping(place, step)
    if place == "context":
        kernel = einsum("hr,hvo->rvo", matrix, recipe.weights["output.kernel"])
        yield "output", recipe.but(weights={**recipe.weights, "output.kernel": kernel})
    first = "logits" if place in ("query", "key", "key and value") else "context"
    yield first, with_heads(recipe, place, matrix)


def in_words(order: np.ndarray, heads: int, count: int) -> str:
    """An order of heads, and how it may have come about."""
    words, every = ", ".join(map(str, order)), np.arange(heads)
    known = {", in reverse": np.arange(count)[::-1].repeat(heads // count)}
    if heads % 2 == 0 and heads == count > 2:
        known[", the halves exchanged, as of two shards"] = np.roll(every, heads // 2)
    if count < heads:
        known[", h // K in place of h // (H / K), as of groups of another size"] = every // count
    for groups in range(2, heads):
        if heads % groups == 0 and count == heads:
            words_of = f", interleaved: laid out as ({heads // groups}, {groups}) by group"
            known[words_of] = every.reshape(groups, -1).T.reshape(-1)
            known[f", the first of {heads // groups} shards for all"] = every % groups
    return words + next((n for n, own in known.items() if np.array_equal(own, order)), "")


def _simple(matrix: np.ndarray) -> np.ndarray | None:
    """A measured map with simple numbers; None where it is none, or the identity."""
    heads = matrix.shape[1]
    simple = np.array([0.0, 1.0, -1.0, 1 / heads, 0.5, 2.0])
    nearest = simple[np.abs(matrix[..., None] - simple).argmin(-1)]
    alone = matrix * (np.abs(matrix) == np.abs(matrix).max(1, keepdims=True))
    matrix = np.where(np.abs(matrix - nearest) <= NEAR, nearest, matrix)
    rest = np.abs(matrix - alone).max() > NEAR
    return None if rest and not np.all(np.isin(matrix, simple)) else matrix


def _factors(matrix: np.ndarray) -> np.ndarray | None:
    """The factor of each head as it is measured, where heads have no parts of others."""
    heads, count = matrix.shape
    own = np.diag(np.diag(matrix))
    if heads != count or np.abs(matrix - own).max() > CLEAR * np.abs(own).max():
        return None
    short = np.round(own, 3)
    return np.where(np.abs(own - short) <= CLEAR / 10, short, own)


def _named(place: str, matrix: np.ndarray) -> tuple[str, str]:
    """The name and the detail of a map; empty names where it has none."""
    heads, count = matrix.shape
    order = matrix.argmax(1)
    one = np.array_equal(matrix, np.eye(count)[order])
    right = np.arange(heads) // (heads // count)
    if one and np.array_equal(order, right):
        return "", ""
    words = in_words(order, heads, count)
    if one and len(set(order)) == 1:
        return "one head for all", f"{place}: that of head {order[0]}"
    if one and len(set(order)) == heads:
        return "heads permuted", f"of {place}, in the order {words}"
    if one and count < heads and np.array_equal(order, np.arange(heads) % count):
        of = "" if place == "key and value" else f"of the {place}s alone"
        return "grouped heads tiled", of
    if one:
        return "heads of others", f"the heads read those of the {place} {words}"
    if np.all(matrix == matrix[0, 0]) and matrix[0, 0] in (1.0, 1 / count):
        return "heads averaged", f"{place}: {'sum' if matrix[0, 0] == 1 else 'mean'} of all heads"
    own = matrix[np.arange(heads), right] if count == heads else matrix.sum(1)
    if np.array_equal(matrix, np.eye(count)[right] * own[:, None]):
        if np.ptp(own) < CLEAR:
            return "", ""  # a factor of the output
        shared = own.reshape(count, -1)
        in_groups = place in ("key", "value", "key and value")
        none = not np.any(own[own != 1])
        # The same numbers as of the context, or of the values.
        if place == "probabilities" or (none and place == "key and value"):
            return "", ""
        if in_groups and np.any(shared != shared[:, :1]):
            return "", ""
        of = "context, or its part of the output's kernel" if place == "context" else place
        words = in_heads(shared[:, 0] if in_groups else own)
        twice = set(own.tolist()) == {0.0, 2.0}
        words += ", as of one part of the heads twice and another not at all" * twice
        return FACTORS[not none], f"{words}: the {of}"
    return "", ""


def in_heads(own: np.ndarray) -> str:
    """Which heads have a factor other than 1, and which."""
    words, own = [], np.round(own, 4)
    for factor in dict.fromkeys(own[own != 1].tolist()):
        heads = list(map(str, np.flatnonzero(own == factor)))
        some, verb = ("heads", "are") if heads[1:] else ("head", "is")
        times = "zero" if factor == 0 else f"{number(factor)} times as great"
        words.append(f"{some} {listed(heads)} of {len(own)} {verb} {times}")
    return ", ".join(words)
