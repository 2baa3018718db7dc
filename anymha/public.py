"""The names of `anymha`, loaded together where the first of them is used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from anymha.attention.features.query_key_norm import QueryKeyNorm
from anymha.attention.features.rotary import Rotary
from anymha.errors import AnymhaError
from anymha.execution.path import explain
from anymha.functional import (
    dot_product_attention,
    merge_attention,
    multi_head_attention,
    rotate,
)
from anymha.interchange.anymha_files import load, save
from anymha.interchange.conversion_plan import Conversion
from anymha.interchange.convert_model import convert_file as _convert_file
from anymha.interchange.detect import find_layers
from anymha.interchange.files.paths import as_path
from anymha.interchange.homes import MultiHeadAttention
from anymha.interchange.layers import convert, get_weights, set_weights
from anymha.interchange.layouts import from_canonical, layouts, to_canonical
from anymha.layer.cache import Cache, Memory, join_caches
from anymha.options.config import AttentionConfig

__all__ = [
    "AnymhaError",
    "AttentionConfig",
    "Cache",
    "Memory",
    "MultiHeadAttention",
    "QueryKeyNorm",
    "Rotary",
    "convert",
    "convert_file",
    "dot_product_attention",
    "explain",
    "find_layers",
    "from_canonical",
    "get_weights",
    "join_caches",
    "layouts",
    "load",
    "merge_attention",
    "multi_head_attention",
    "rotate",
    "save",
    "set_weights",
    "to_canonical",
]


def convert_file(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: str | None = None,
    to: str = "anymha",
    verify: bool = True,
    prefix: str | Sequence[str] = "",
    to_prefix: str | None = None,
    others: bool = False,
    max_bytes: int | None = None,
    max_shard_bytes: int | None = None,
    dry_run: bool = False,
    num_heads: int | None = None,
    **options: Any,
) -> Conversion:
    """Convert the attention layers of a model's file, and write them to another file.

    As the command `anymha convert`: names and shapes are checked first; then one layer at a time is
    read, converted, verified and written. The new file is written as a whole or not at all.

    Args:
        source: A file or folder of weights, of any known format.
        destination: The new file; the end of its name says the format.
        layout: The layout of the source's layers; see `anymha.layouts`. Default: the only one that
            fits them, or the one that the `config.json` beside the file names.
        to: Their new layout; "anymha" for files that `anymha.load` reads.
        verify: Convert each layer back, and run it in every installed framework. This proves the
            conversion, not the choice of `layout`.
        prefix: Only layers whose names begin so; ``{i}`` stands for a number, ``*`` for any text.
            A sequence of such prefixes takes the layers of each.
        to_prefix: What their names begin with in the new file, with ``{i}``, ``{j}`` ... for the
            numbers of the source; default as in the source.
        others: Whether the other tensors of the source are copied as they are.
        max_bytes: The most bytes that the source's arrays may take together, whatever it claims;
            default 100 times the bytes of the file, and 64 MiB always.
        max_shard_bytes: The most bytes of tensors in a new file; where there are more, shards and
            their index are written.
        dry_run: Whether all is read, converted and verified, and nothing written.
        num_heads: Query heads, where the shapes do not show them.
        **options: Further sizes and options that the shapes do not show, as `anymha.to_canonical`
            takes them.

    Returns:
        `layers`, the prefix of each layer in the new file by that in the source; `layout`;
        `tensors`, shape and dtype by name; `files`, the new file, or the index and its shards;
        `copied` and `left`, the names of the other tensors;
        `notes` and `verification`, in words.

    Raises:
        ArgumentError: an argument is of another type.
        UsageError: there is no such layer, several layouts may be meant, or it cannot be converted;
            or a new file is one of those that the source consists of, by whatever name.
        FileError: a file cannot be read or written.
        UnknownLayoutError: no layout has this name.
        AnymhaError: `verify` found a difference.

    Example:
        >>> import tempfile, numpy as np
        >>> from pathlib import Path
        >>> names = ("self.query", "self.key", "self.value", "output.dense")
        >>> file = Path(tempfile.mkdtemp()) / "bert.npz"
        >>> np.savez(file, **{f"0.{name}.weight": np.ones((8, 8), "float32") for name in names})
        >>> done = convert_file(file, file.with_name("a.safetensors"), num_heads=2, verify=False)
        >>> done.layers, done.layout
        ({'0.': '0.'}, 'transformers.bert')
    """
    from anymha.cli.verify import Verifier  # noqa: PLC0415  what it runs is loaded when it is used

    if num_heads is not None:
        options["num_heads"] = num_heads
    verifier = Verifier()
    done = _convert_file(
        as_path("source", source), as_path("destination", destination), layout, to,
        prefix=prefix, to_prefix=to_prefix, others=others, max_bytes=max_bytes,
        max_shard_bytes=max_shard_bytes, dry_run=dry_run,
        **({"check": verifier.check} if verify else {}), **options,
    )  # fmt: skip
    if verify:
        done.verification += verifier.lines()
    return done
