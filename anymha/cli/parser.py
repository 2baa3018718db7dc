"""The parser of the command line: one command after another."""

from __future__ import annotations

import argparse

from anymha.cli import bench, compare, completion, convert, info, inspect, parity
from anymha.version import __version__

COMMANDS = (parity, compare, convert, inspect, info, bench)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it gives has the function `run` of the options."""
    parser = argparse.ArgumentParser(prog="anymha", description="One attention layer, everywhere.")
    parser.add_argument("--version", action="version", version=f"anymha {__version__}")
    completion.add_option(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for module in COMMANDS:
        module.add_command(commands)
    return parser
