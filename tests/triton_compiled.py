"""Compile Triton's kernels for GPUs, which needs none: ``python -m tests.triton_compiled``.

The interpreter takes code that the compiler refuses. Prints a line for each kernel.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from anymha_torch import triton_kernels

KERNELS = {
    "forward": triton_kernels._forward,
    "queries": triton_kernels._backward_queries,
    "keys": triton_kernels._backward_keys,
}
POINTERS = {
    "lse": "*fp32", "balance": "*fp32", "seed": "*i64", "mask": "*u8", "bias": "*fp32",
    "offsets": "*i32", "scale": "fp32", "factor": "fp32",
}  # fmt: skip
ARRAYS = ("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value")
DROPOUT = ("seed", "threshold")
OPTIONS = ("mask", "bias", "offsets", "left", "right", *DROPOUT)
CALLS = [DROPOUT, OPTIONS, ("left", "right")]
MOST_SHARED = 99 << 10
"""Bytes of shared memory that every GPU of capability 8.0 or later has for a program."""


def compiled(
    kernel: str, dtype: str, width: int, capability: int, precision: str, options: tuple[str, ...]
) -> Any:
    """A kernel, compiled for heads of some features and a call with some options."""
    function = KERNELS[kernel]
    tiles = triton_kernels.TILES["half" if dtype != "fp32" else precision]
    height, columns, warps = tiles[min(n for n in tiles if n >= width)][kernel]
    whole = triton.next_power_of_2(width)
    constants: dict[str, Any] = {
        "key_dim": width, "value_dim": width, "k_width": whole, "v_width": whole,
        "height": height, "width": columns, "precision": precision,
    }  # fmt: skip
    constants |= {name: None for name in OPTIONS if name not in options}
    # A number that is 1 in a call is a constant there.
    ones = ("m_column", "b_column", "offsets_batch") if "mask" in options else ("heads", "group")
    constants |= dict.fromkeys(ones, 1)
    types = POINTERS | dict.fromkeys(ARRAYS, f"*{dtype}")
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in function.arg_names
    }
    places = {function.arg_names.index(name): value for name, value in constants.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if name in ARRAYS or name.endswith(("_batch", "_head", "_row"))
    }
    source = ASTSource(function, signature, {(i,): v for i, v in places.items()}, aligned)
    launch = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


def main() -> None:
    """Compile what the arguments say: dtypes, widths and capabilities, each with commas."""
    dtypes, widths, capabilities = (text.split(",") for text in sys.argv[1:])
    several = product(KERNELS, dtypes, map(int, widths), map(int, capabilities), CALLS)
    for kernel, dtype, width, capability, options in several:
        for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
            found = compiled(kernel, dtype, width, capability, precision, options)
            shared = found.metadata.shared
            print(kernel, dtype, width, capability, precision, options, f"{shared} bytes")
            if shared > MOST_SHARED:
                sys.exit(f"More than {MOST_SHARED} bytes of shared memory.")


if __name__ == "__main__":
    main()
