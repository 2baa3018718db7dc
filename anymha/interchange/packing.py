"""`Piece`: an array of a foreign layer that packs canonical weights, and the way it packs them.

All transforms are slices, transpositions and permutations, so that every bit survives both ways.

Shapes: H query heads, K key and value heads, G = H / K, d the width of a head, D of an input,
O of the output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from anymha.layer.weights import NAMES as PLAIN_NAMES

Arrays = dict[str, np.ndarray]
QKV = ("query", "key", "value")
NAMES = (*PLAIN_NAMES, "gate.kernel", "gate.bias")
"""The canonical names of the weights that layouts have a place for, in order."""
LARGE, TILE = 2**18, 64
"""The elements of an array that is copied in tiles, and the rows and columns of a tile."""
CODEGEN_BLOCKS = 4
"""CodeGen's fused kernel has the shares of the four devices that trained it."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that split a layer's arrays into heads.

    Args:
        heads: Query heads H.
        shared: Key and value heads K.
        key_dim: Width d_k of query and key heads.
        value_dim: Width d_v of value heads.
    """

    heads: int
    shared: int
    key_dim: int
    value_dim: int

    def split(self, projection: str) -> tuple[int, int]:
        """Heads of a projection and the width of each."""
        heads = self.shared if projection in ("key", "value") else self.heads
        return heads, self.key_dim if projection in ("query", "key") else self.value_dim

    def rows(self, projections: tuple[str, ...]) -> int:
        """Heads times width of some projections together."""
        return sum(heads * width for heads, width in map(self.split, projections))


@dataclass(frozen=True)
class Piece:
    """An array that holds the kernels or the biases of one projection or several.

    Args:
        array: Its name, relative to the layer.
        holds: The projections, of "query", "key", "value", "output", "gate".
        part: "kernel" or "bias".
        form: The axes of a kernel: "linear" is (outputs, inputs), as torch's linear layers have it;
            "matrix" is (inputs, outputs); "heads" is the canonical shape; "einsum" is (heads,
            inputs, width), with an axis of the projections before it where it holds several.
        packing: The order of several projections along the outputs: "blocks" (all heads of one,
            then of the next), "groups" (for each key head its G query heads, then key, then value;
            with K = H this is "per head"), "codegen", or "alternate" (for each head its rows of the
            first projection, then those of the second).
        tiled: Query head h belongs to key head ``h % K``, not to ``h // G`` as in most libraries.
        optional: A layer may lack the projections.
    """

    array: str
    holds: tuple[str, ...]
    part: str
    form: str = "linear"
    packing: str = "blocks"
    tiled: bool = False
    optional: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical names of its weights."""
        return tuple(f"{projection}.{self.part}" for projection in self.holds)

    @property
    def module(self) -> str:
        """The name of the projection that the array belongs to."""
        return module_of(self.array)

    @property
    def rank(self) -> int | None:
        """The array's rank; None for any."""
        if self.form == "heads":
            several = self.holds in (("output",), ("gate",))  # a gate may have no widths
            return None if several else 3 - (self.part == "bias")
        if self.form == "einsum":
            return 3 + (len(self.holds) > 1)
        return 2 - (self.part == "bias")

    @property
    def outputs(self) -> int:
        """The axis of the heads: the kernel's outputs; the inputs of the output projection."""
        inside = self.holds == ("output",)
        return int((self.form == "matrix") != inside) if self.part == "kernel" else 0

    def heads_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The canonical shape of each kernel in an array whose heads have an axis of their own."""
        if self.form == "heads":
            return shape
        heads, inputs, width = shape[-3:]
        return (inputs, heads, width)

    def read(self, array: np.ndarray, sizes: Sizes) -> Arrays:
        """The canonical weights in an array, which are copies."""
        if self.form == "heads":
            return {self.names[0]: contiguous_copy(array)}
        if self.form == "einsum":
            kernels = array.reshape(-1, *array.shape[-3:]).transpose(0, 2, 1, 3)
            return {n: contiguous_copy(k) for n, k in zip(self.names, kernels, strict=True)}
        if self.holds == ("output",):
            if self.part == "bias":
                return {"output.bias": contiguous_copy(array)}
            rows = array.T if self.form == "linear" else array  # (H*d_v, O)
            parts = [rows.reshape(*sizes.split("output"), -1)]  # (H, d_v, O)
        else:
            rows = array.T if self.outputs else array  # (heads*d, D) or (heads*d,)
            parts = self._unpack(rows, sizes)  # each (heads, d, D) or (heads, d)
        weights = {}
        for name, heads in zip(self.names, parts, strict=True):
            if self.tiled and name.startswith(("query", "output")):
                heads = heads[_tiles(sizes)]
            if self.part == "kernel" and self.holds != ("output",):
                heads = heads.transpose(2, 0, 1)
            weights[name] = contiguous_copy(heads)
        return weights

    def write(
        self, weights: Mapping[str, np.ndarray], sizes: Sizes, copy: bool = True
    ) -> np.ndarray:
        """The array that holds these canonical weights, C-contiguous.

        Args:
            weights: The weights by name.
            sizes: Their sizes.
            copy: Whether it is always a copy, also where it is the same as a weight.
        """
        values = [weights[name] for name in self.names]
        if self.form == "heads" or self.names == ("output.bias",):
            if values[0].flags.c_contiguous and not copy:
                return values[0]
            return contiguous_copy(values[0])
        if self.form == "einsum":
            kernels = [weight.transpose(1, 0, 2) for weight in values]
            return contiguous_copy(kernels[0] if len(kernels) == 1 else np.stack(kernels))
        parts = []
        for name, weight in zip(self.names, values, strict=True):
            turned = self.part == "kernel" and self.holds != ("output",)
            heads = weight.transpose(1, 2, 0) if turned else weight
            if self.tiled and name.startswith(("query", "output")):
                heads = heads[np.argsort(_tiles(sizes))]
            parts.append(heads)
        if self.holds == ("output",):
            rows = parts[0].reshape(sizes.rows(self.holds), -1)  # (H*d_v, O)
            return contiguous_copy(rows.T if self.form == "linear" else rows)
        rows = self._pack(parts, sizes)
        return contiguous_copy(rows.T if self.outputs else rows)

    def _unpack(self, rows: np.ndarray, sizes: Sizes) -> list[np.ndarray]:
        rest = rows.shape[1:]
        if self.packing == "blocks":
            splits = [sizes.split(projection) for projection in self.holds]
            ends = np.cumsum([heads * width for heads, width in splits])[:-1]
            blocks = np.split(rows, ends)
            return [b.reshape(*split, *rest) for b, split in zip(blocks, splits, strict=True)]
        width = sizes.key_dim
        if self.packing == "alternate":
            return np.split(rows.reshape(sizes.heads, -1, *rest), [width], 1)
        if self.packing == "groups":
            each = sizes.heads // sizes.shared
            grouped = rows.reshape(sizes.shared, each + 2, width, *rest)
            query = grouped[:, :each].reshape(sizes.heads, width, *rest)
            return [query, grouped[:, each], grouped[:, each + 1]]
        blocks = rows.reshape(CODEGEN_BLOCKS, 3, -1, width, *rest)
        return [blocks[:, place].reshape(-1, width, *rest) for place in (0, 2, 1)]

    def _pack(self, parts: list[np.ndarray], sizes: Sizes) -> np.ndarray:
        rest = parts[0].shape[2:]
        if self.packing == "blocks":
            if len(parts) == 1:
                return parts[0].reshape(-1, *rest)
            return np.concatenate([contiguous_copy(part).reshape(-1, *rest) for part in parts])
        if self.packing == "alternate":
            return np.concatenate(parts, 1).reshape(-1, *rest)
        query, key, value = parts
        width = sizes.key_dim
        if self.packing == "groups":
            grouped = query.reshape(sizes.shared, -1, width, *rest)
            return np.concatenate([grouped, key[:, None], value[:, None]], 1).reshape(-1, *rest)
        shape = (CODEGEN_BLOCKS, -1, width, *rest)
        blocks = [part.reshape(shape) for part in (query, value, key)]
        return np.stack(blocks, 1).reshape(-1, *rest)


def contiguous_copy(view: np.ndarray) -> np.ndarray:
    """A C-contiguous copy.

    Of a large array whose axes are exchanged it is made in tiles: element by element each would be
    in another page of memory, which takes seven times as long.
    """
    strides = np.abs(view.strides)
    fast, last = int(np.argmin(strides)) if view.ndim else 0, view.ndim - 1
    plain = view.ndim < 2 or strides[fast] == strides[last] or view.size < LARGE
    if plain or min(view.shape[fast], view.shape[last]) < TILE // 4:
        return np.array(view, order="C")
    copy = np.empty(view.shape, view.dtype)
    sources, targets = (np.moveaxis(array, (fast, last), (-2, -1)) for array in (view, copy))
    rows, columns = view.shape[fast], view.shape[last]
    for place in np.ndindex(sources.shape[:-2]):
        source, target = sources[place], targets[place]
        for i in range(0, rows, TILE):
            for j in range(0, columns, TILE):
                target[i : i + TILE, j : j + TILE] = source[i : i + TILE, j : j + TILE]
    return copy


def module_of(array: str) -> str:
    """The name of the projection that an array belongs to, from the array's name."""
    return re.sub(r"([./]vars)?[./_](weight|kernel|bias|w|b|\d+)$", "", array)


def _tiles(sizes: Sizes) -> np.ndarray:
    """For each canonical query head, the tiled one that belongs to the same key head."""
    return np.arange(sizes.heads).reshape(-1, sizes.shared).T.ravel()


def linear(
    projection: str, name: str, *, form: str = "linear", bias: bool = True, tiled: bool = False,
    parts: tuple[str, str] = (".weight", ".bias"), optional: bool = False,
) -> tuple[Piece, ...]:  # fmt: skip
    """The pieces of one projection's layer."""
    holds = (projection,)
    kernel = Piece(name + parts[0], holds, "kernel", form, tiled=tiled, optional=optional)
    own = Piece(name + parts[1], holds, "bias", form, optional=optional)
    return (kernel, own) if bias else (kernel,)


def fused(
    name: str, packing: str = "blocks", *, form: str = "linear", bias: bool = True,
    holds: tuple[str, ...] = QKV,
) -> tuple[Piece, ...]:  # fmt: skip
    """The pieces of one linear layer for several projections."""
    kernel = Piece(f"{name}.weight", holds, "kernel", form, packing)
    return (kernel, Piece(f"{name}.bias", holds, "bias", form, packing)) if bias else (kernel,)
