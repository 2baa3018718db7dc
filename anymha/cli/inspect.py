"""`anymha inspect`: the attention layers of a file, the layouts that fit, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anymha.cli.progress import busy
from anymha.interchange.anymha_files import ENTRY, holds_cache, read_configs
from anymha.interchange.detect import (
    UNNAMED,
    LayerGroup,
    find_layer_groups,
    mean_the_same,
    numbers_of,
    pattern_of,
)
from anymha.interchange.files.formats import format_of, open_file
from anymha.interchange.files.reader import Reader, Tensor
from anymha.interchange.leftovers import refusal, remarks_on
from anymha.interchange.model_config import NAME, read_config
from anymha.options.config import AttentionConfig
from anymha.text import escaped, listed, shell_word, shown

SHOWN_NAMES = 12
SHOWN_MISFITS = 4


def add_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser(
        "inspect",
        help="list the attention layers of a file, and the layouts that fit",
        description=inspect.__doc__,
    )
    command.add_argument("file", type=Path, metavar="FILE", help="of any format; see docs/files.md")
    command.add_argument("--all", action="store_true", help="list every tensor of the file too")
    command.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_max_bytes(command)
    command.set_defaults(run=inspect)


def add_max_bytes(command: argparse.ArgumentParser) -> None:
    """Add the option of how much a file's arrays may take."""
    command.add_argument("--max-bytes", type=int, metavar="N",
                         help="the most bytes that the file's arrays may take together; default "
                              "100 times the file's own, and 64 MiB always")  # fmt: skip


def inspect(options: argparse.Namespace) -> int:
    """List the attention layers of a file, the layouts that fit, and the sizes that shapes show."""
    reading = busy(f"reading {shown(options.file)}")
    with reading, open_file(options.file, options.max_bytes) as reader:
        if options.json:
            lines = [json.dumps(as_data(reader, options.all), indent=2)]
        else:
            lines = list(report(reader, options.all))
    for line in lines:
        print(line)
    return 0


def as_data(reader: Reader, every: bool = False) -> dict[str, Any]:
    """What `report` says of a file, as data for JSON.

    Args:
        reader: The file.
        every: Whether every tensor is listed.
    """
    file_format = format_of(reader.path)
    groups = find_layer_groups(
        reader.tensors, file_format, reader.config or read_config(reader.path)
    )
    data: dict[str, Any] = {
        "file": str(reader.path),
        "format": file_format.name,
        "tensor_count": len(reader.tensors),
        "bytes": sum(tensor.bytes for tensor in reader.tensors.values()),
        "layers": [_group_data(group) for group in groups],
    }
    return data | ({"tensors": _tensor_data(reader.tensors)} if every else {})


def _group_data(group: LayerGroup) -> dict[str, Any]:
    config = group.config
    return {
        "pattern": group.pattern,
        "prefixes": group.prefixes,
        "layouts": [fit.name for fit in group.fits],
        "layout": group.layout,
        "kind": group.kind,
        "unknown": group.unknown,
        "misfits": group.misfits,
        "config": None if config is None else config.to_dict(),
        "tensors": _tensor_data(group.tensors),
    }


def _tensor_data(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {n: {"dtype": str(t.dtype), "shape": list(t.shape)} for n, t in tensors.items()}


def report(reader: Reader, every: bool = False) -> Iterable[str]:
    """The lines about a file.

    Args:
        reader: The file.
        every: Whether every tensor is listed.
    """
    return map(escaped, _report(reader, every))  # also what layouts say about names


def _report(reader: Reader, every: bool) -> Iterable[str]:
    file_format = format_of(reader.path)
    tensors = reader.tensors
    size = sum(tensor.bytes for tensor in tensors.values())
    dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
    content = f"{len(tensors)} tensors of {dtypes or 'nothing'}, {size:,} bytes"
    yield f"{shown(reader.path)}: {file_format.name}, {content}"
    if holds_cache(reader):
        yield "Written by anymha: a cache or a memory, which `anymha.load` reads."
        return
    if ENTRY in reader.metadata:
        count = len(read_configs(reader))
        yield f"Written by anymha, with the configuration of {count} layer{'s' * (count != 1)}."
    groups = find_layer_groups(tensors, file_format, reader.config or read_config(reader.path))
    for group in groups:
        yield ""
        yield from _group(reader.path, group)
    if not groups:
        yield ""
        yield f"No attention layer of a known layout.{'' if every else ' Its names:'}"
        if not every:
            yield from _names(tensors)
    remarks = remarks_on(tensors)
    if remarks and not any(group.kind for group in groups):
        yield ""
        yield from remarks
    if every:
        yield ""
        yield "All tensors:"
        for name, tensor in tensors.items():
            yield f"  {shown(name)}  {tensor.dtype} {_shape(tensor)}"


def _group(path: Path, group: LayerGroup) -> Iterable[str]:
    count = len(group.prefixes)
    numbers = _numbers(group.prefixes) if count > 1 else ""
    title = group.pattern if count > 1 else group.prefixes[0]
    yield f"{shown(title) or '(no prefix)'}{numbers}"
    for name, tensor in group.tensors.items():
        yield f"  {shown(name):28} {tensor.dtype} {_shape(tensor)}"
    names = [fit.name for fit in group.fits]
    if group.kind:
        yield f"  No layout fits, for {refusal(group.kind)}"
        return
    if not names:
        yield "  No layout fits:"
    elif names[0] == group.stated:
        others = f"; its names and shapes also fit {', '.join(names[1:])}" if names[1:] else ""
        yield f"  Layout: {names[0]} (the {NAME} beside the file says so{others})."
    elif len(names) == 1:
        yield (
            f"  Layout: {names[0]} (all its names and shapes fit, and no other of the layouts "
            "known here does)."
        )
    elif mean_the_same(group.fits):
        yield (
            f"  Layout: {names[0]} (all its names and shapes fit, and mean the same in "
            f"{', '.join(names[1:])})."
        )
    else:
        yield f"  Layouts that fit: {', '.join(names)} (of the layouts known here)."
        yield (
            "  They have these names and shapes in common and may mean different things by them, "
            "as the order of rows in a fused kernel: name the one that the model has."
        )
    named = [(name, why) for name, why in group.misfits.items() if name not in UNNAMED]
    if names and group.stated and not group.layout and group.stated not in names:
        yield (
            f"  The {NAME} beside the file says {group.stated}, which is none of them: name the "
            "layout only if the model's attention is the same."
        )
    for name, reason in named[:SHOWN_MISFITS]:
        yield f"  Not {name}: {reason}"
    if group.unknown:
        yield (
            f"  Not known to {'this layout' if group.layout else 'these layouts'}, and left out by "
            f"`anymha convert`: {listed(group.unknown)}."
        )
    if names:
        yield from _sizes(group)
        yield from _next(path, group)


def _sizes(group: LayerGroup) -> Iterable[str]:
    """The sizes that the shapes show."""
    config = group.config
    if config is None:
        yield (
            "  Heads: their number is not in the shapes. It is in the model's configuration, "
            "often as num_attention_heads."
        )
        return
    sizes = [f"num_heads={config.num_heads}", f"key_dim={config.key_dim}"]
    if config.value_dim != config.key_dim:
        sizes.append(f"value_dim={config.value_dim}")
    if config.num_key_value_heads != config.num_heads:
        sizes.append(f"num_key_value_heads={config.num_key_value_heads}")
    yield f"  Sizes: {', '.join(sizes)}; {_widths(config)}."


def _widths(config: AttentionConfig) -> str:
    widths = [config.query_features, config.value_features, config.key_features]
    if len(set(widths)) == 1:
        return f"inputs of width {widths[0]}"
    return "query, value and key of widths " + ", ".join(map(str, widths))


def _next(path: Path, group: LayerGroup) -> Iterable[str]:
    """The command that converts the layers."""
    layout = group.layout or "LAYOUT"
    heads = " --num-heads H" if group.config is None else ""
    joined = "=" if group.pattern.startswith("-") else " "
    prefix = f" --prefix{joined}{shell_word(group.pattern)}" if group.pattern else ""
    source = shell_word(f"./{path}" if str(path).startswith("-") else path)
    yield f"  To convert: anymha convert {source} DST --from {layout} --to LAYOUT{heads}{prefix}"


def _numbers(prefixes: Sequence[str]) -> str:
    """The numbers of the layers, by letter: ``  i = 0-5``."""
    values: dict[str, set[int]] = {}
    for prefix in prefixes:
        for letter, number in numbers_of(prefix).items():
            values.setdefault(letter, set()).add(int(number))
    ranges = ", ".join(f"{letter} = {_ranges(sorted(ns))}" for letter, ns in values.items())
    return f"  x {len(prefixes)}  ({ranges})"


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _names(tensors: dict[str, Tensor] | Any) -> Iterable[str]:
    patterns: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        patterns.setdefault(pattern_of(name), tensor)
    for name, tensor in list(patterns.items())[:SHOWN_NAMES]:
        yield f"  {shown(name)}  {tensor.dtype} {_shape(tensor)}"
    if len(patterns) > SHOWN_NAMES:
        yield f"  and {len(patterns) - SHOWN_NAMES} more"


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
