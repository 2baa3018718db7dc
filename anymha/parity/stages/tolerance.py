"""The greatest error that rounding explains: the one table of tolerances.

Everything that compares numbers asks here, so that no comparison is loosened on its own.
"""

from __future__ import annotations

import math
from functools import cache

import ml_dtypes

from anymha.framework.dtypes import accumulation_dtype

SUMS = math.sqrt(8) / 2
"""Greatest error of the layer's chain of sums, in units of ``eps * sqrt(length) * magnitude``.

Each rounding is off by at most eps / 2, and those of one sum wander off like a random walk: by
about ``eps / 2 * sqrt(length)`` times the size of the sum, which is its absolute value, or the root
of the sum of its squared terms where these cancel. A gradient comes through eight sums (four
projections and two products forward, as much back), whose errors are independent: a factor of
sqrt(8).
"""


def tolerance(
    dtype_name: str,
    reduction_length: int,
    magnitude: float,
    *,
    accumulated: str | None = None,
    stored: str | None = None,
) -> float:
    """The greatest absolute error that rounding explains.

        magnitude * (eps(dtype) / 2
                     + SUMS * (eps(accumulated) + eps(float64)) * sqrt(reduction_length)
                     + SUMS * eps(stored))

    The first term is the one rounding of the exact result to its dtype. The second is what the
    sums on the way to it lose; they run in float64 for float64 and in float32 for everything else,
    so half precision pays little for them; the float64 of the oracle, with which the result is
    compared, is added. The third counts where the result of each sum is rounded before the next
    sum takes it.

    Args:
        dtype_name: Dtype of the result: "float16", "bfloat16", "float32" or "float64".
        reduction_length: The longest sum on the way: features, keys, or positions of a batch.
        magnitude: The greatest size of the result and of the sums that it is made of, as in
            `anymha.parity.oracle.oracle.Truth.magnitudes`: terms that cancel leave their errors.
        accumulated: The dtype in which the sums run, where it is another than anymha's.
        stored: The dtype in which the results of the sums are stored, where it is coarser than the
            dtype of the sums: layers of other libraries round each step to half precision.

    Returns:
        The tolerance, in the units of the result.

    Example:
        >>> tolerance("float32", 64, 1.0) < 2e-6 < tolerance("bfloat16", 64, 1.0)
        True

    References:
        N. Higham, T. Mary, "A New Approach to Probabilistic Rounding Error Analysis" (2019), for
        the square root.
    """
    rounded = eps(dtype_name) / 2
    accumulated = accumulated or accumulation_dtype(dtype_name)
    summed = SUMS * (eps(accumulated) + eps("float64")) * math.sqrt(reduction_length)
    if stored is not None and eps(stored) > eps(accumulated):
        summed += SUMS * eps(stored)
    return magnitude * (rounded + summed)


@cache
def eps(dtype: str) -> float:
    """The distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps)


@cache
def smallest(dtype: str) -> float:
    """The smallest positive number that every framework keeps.

    Smaller ones are flushed to zero by some, TensorFlow among them, and on some devices. Float16
    keeps its subnormal numbers, which are normal ones of the float32 in which they are computed.
    """
    info = ml_dtypes.finfo(dtype)
    return float(info.smallest_subnormal if dtype == "float16" else info.smallest_normal)
