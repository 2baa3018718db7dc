"""A bias over the places of queries and keys in a window of rows and columns, looked up wrongly.

As in Swin and BEiT, positions are the places of an R x C window, read row by row; a table has one
bias for each distance in rows and in columns, ``(2 R - 1) (2 C - 1)`` in all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anymha.parity.diagnose.distance_bias import MOST, NEAR


def of_other_places(bias: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A bias (B, H, T, T) that is one over places in a window, at other places of its table.

    Positions before the window, such as a class token, keep theirs.
    """
    *_, queries, keys = bias.shape
    most = float(np.max(np.abs(bias), initial=0.0))
    if queries != keys or queries * keys > MOST or not np.isfinite(most) or not most:
        return
    for before in (0, 1):
        own = bias[..., before:, before:]
        count = queries - before
        for rows in (n for n in range(2, count // 2 + 1) if count % n == 0):
            columns = count // rows
            down, right = _distances(rows, columns)
            table = _table(own, down, right, rows, columns)
            if np.max(np.abs(table[..., down + rows - 1, right + columns - 1] - own)) > NEAR * most:
                continue
            for words, index in _lookups(down, right, rows, columns):
                wrong = bias.copy()
                flat = table.reshape(*table.shape[:2], -1)
                wrong[..., before:, before:] = flat[..., index % flat.shape[-1]]
                yield f"in a window of {rows} x {columns}, {words}", wrong


def _distances(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """How many rows and columns (R C, R C) a query lies after a key."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return row[:, None] - row, column[:, None] - column


def _table(
    bias: np.ndarray, down: np.ndarray, right: np.ndarray, rows: int, columns: int
) -> np.ndarray:
    """The table (B, H, 2 R - 1, 2 C - 1) of a bias; of each distance one number that it has."""
    table = np.zeros((*bias.shape[:2], 2 * rows - 1, 2 * columns - 1))
    table[..., down + rows - 1, right + columns - 1] = bias
    return table


def _lookups(
    down: np.ndarray, right: np.ndarray, rows: int, columns: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Words for a wrong lookup, and its indices in the flat table."""
    width = 2 * columns - 1

    def at(down: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (down + rows - 1) * width + right + columns - 1

    strides = {rows, 2 * rows - 1, 2 * rows, columns - 1, columns, 2 * columns, 1} - {width}
    for stride in sorted(strides):
        yield (f"whose table has rows of {width}, taken for rows of {stride}",
               (down + rows - 1) * stride + right + columns - 1)  # fmt: skip
    yield "rows of the table counted from its middle", down * width + right + columns - 1
    yield "columns of the table counted from its middle", (down + rows - 1) * width + right
    yield "rows and columns of the table counted from its middle", down * width + right
    yield "distances up and down exchanged", at(-down, right)
    yield "distances to the left and the right exchanged", at(down, -right)
    yield "distances in rows without their sign", at(np.abs(down), right)
    yield "distances in columns without their sign", at(down, np.abs(right))
    yield "distances without their signs", at(np.abs(down), np.abs(right))
    yield "distances in columns alone", at(0 * down, right)
    yield "distances in rows alone", at(down, 0 * right)
    if rows == columns:
        yield "rows and columns exchanged", at(right, down)
        yield "rows and columns exchanged, and their signs", at(-right, -down)
    # The table as it lies when its columns come first
    tall = 2 * rows - 1
    yield "whose table is read column by column", (right + columns - 1) * tall + down + rows - 1
    # The window read column by column
    row, column = np.divmod(np.arange(rows * columns), rows)[::-1]
    turned = row[:, None] - row, column[:, None] - column
    yield "whose places are read column by column", at(*turned)
