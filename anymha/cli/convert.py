"""`anymha convert`: the attention layers of a model's file into another layout, and proof."""

from __future__ import annotations

import argparse
import json
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from anymha.cli.inspect import add_max_bytes
from anymha.cli.process import say_error
from anymha.cli.progress import bar
from anymha.cli.verify import Mismatch, Verifier
from anymha.interchange.compared_options import result_options
from anymha.interchange.convert_model import convert_file
from anymha.interchange.files.atomic_write import check_writable
from anymha.text import escaped, shown

SHOWN_LEFT = 3
UNITS = {"": 1, "b": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("kmgt", 1)
    for end, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def add_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser(
        "convert",
        help="convert the attention layers of a file to another layout",
        description=convert.__doc__,
    )
    command.add_argument("source", type=Path, metavar="SRC", help="a file of any known format")
    command.add_argument("target", type=Path, metavar="DST",
                         help="the new file: .safetensors, .npz, .pt or .weights.h5")  # fmt: skip
    command.add_argument("--from", dest="layout", metavar="LAYOUT",
                         help="the layout of its layers; see `anymha inspect SRC`; default the "
                              "only one that fits")  # fmt: skip
    command.add_argument("--to", required=True, metavar="LAYOUT",
                         help="the new layout; `anymha` for `anymha.load`")  # fmt: skip
    command.add_argument("--prefix", action="append", metavar="P",
                         help="only layers whose names begin so; {i}: a number, *: any text; "
                              "may be given several times")  # fmt: skip
    command.add_argument("--to-prefix", metavar="Q",
                         help="what their names begin with in DST; default as in SRC")  # fmt: skip
    command.add_argument("--num-heads", type=int, metavar="H", help="query heads")
    command.add_argument("--num-key-value-heads", type=int, metavar="K", help="default H")
    command.add_argument("--head-dim", type=int, metavar="D", help="instead of --num-heads")
    command.add_argument("--scale", type=float, metavar="S", help="of the logits")
    command.add_argument("--sliding-window", type=int, metavar="W", help="default none")
    for name in _further_options():
        command.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE",
                             type=_option_value, default=argparse.SUPPRESS,
                             help=f"`{name}` of the layers, as JSON; null for none")  # fmt: skip
    command.add_argument("--others", action="store_true", help="copy the other tensors too")
    add_max_bytes(command)
    command.add_argument("--max-shard-size", type=_size, metavar="N",
                         help="at most so many bytes in a file, as 5GB or 500MiB: then files and "
                              "an index of them are written")  # fmt: skip
    command.add_argument("--dry-run", action="store_true",
                         help="read, convert and check everything, and write nothing")  # fmt: skip
    command.add_argument("--verify", action="store_true",
                         help="convert back, run the layers, and report the errors")  # fmt: skip
    command.set_defaults(run=convert)


def _further_options() -> tuple[str, ...]:
    """The options that change a call's results and have no argument of their own above."""
    own = ("scale", "sliding_window", "attention_axes")
    return tuple(name for name in result_options() if name not in own)


def _option_value(text: str) -> Any:
    """An option's value: JSON, or a plain word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _size(text: str) -> int:
    """A number of bytes, also with a unit: 5GB is 5 * 10**9, 5GiB is 5 * 2**30."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"expected bytes, as 5GB or 500MiB, not {text!r}")
    return int(Decimal(found[1]) * UNITS[found[2]])


def convert(options: argparse.Namespace) -> int:
    """Convert all attention layers of a file to another layout, one layer at a time.

    The new file is written as a whole or not at all. With --verify each layer is converted back,
    and run in every installed framework and, where it is installed, in the layouts' own libraries.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    check_writable(options.target)
    names = ("num_heads", "num_key_value_heads", "head_dim", "scale", "sliding_window")
    stated = vars(options)
    sizes = {name: stated[name] for name in names if stated[name] is not None}
    sizes |= {name: stated[name] for name in _further_options() if name in stated}
    verifier = Verifier() if options.verify else None
    with bar() as progress:
        try:
            conversion = convert_file(
                options.source, options.target, options.layout, options.to,
                prefix=options.prefix or "", to_prefix=options.to_prefix, others=options.others,
                max_bytes=options.max_bytes, max_shard_bytes=options.max_shard_size,
                dry_run=options.dry_run, on_layer=progress,
                check=verifier.check if verifier else lambda layer: None, **sizes,
            )  # fmt: skip
        except Mismatch as error:
            say_error(f"{error} Nothing was written.")
            return 1
    lines = [f"{shown(start) or '(no prefix)'} -> {shown(end) or '(no prefix)'}"
             for start, end in conversion.layers.items() if start != end]  # fmt: skip
    lines += conversion.notes
    if conversion.left:
        names = ", ".join(map(shown, conversion.left[:SHOWN_LEFT])) + (
            ", ..." * (len(conversion.left) > SHOWN_LEFT)
        )
        lines.append(
            f"{len(conversion.left)} other tensors were left out ({names}); `--others` copies them."
        )
    if verifier:
        lines += verifier.lines()
    count = len(conversion.layers)
    size = sum(tensor.bytes for tensor in conversion.tensors.values())
    files = conversion.files or [options.target]
    shards = f" in {len(files) - 1} file{'s' * (len(files) > 2)}" if files[1:] else ""
    trial = "Not written, as a trial: " if options.dry_run else ""
    lines.append(
        f"{trial}{shown(files[0])}: {count} layer{'s' * (count != 1)} of {conversion.layout} as "
        f"{options.to}, {len(conversion.tensors)} tensors{shards}, {size:,} bytes"
    )
    for line in map(escaped, lines):  # also what layouts say about names
        print(line)
    return 0
