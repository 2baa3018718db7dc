"""The parser of the command line: one command after another, and completion by shells."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anymha.cli import bench, compare, convert, info, inspect, parity
from anymha.errors import UsageError
from anymha.version import __version__

COMMANDS = (parity, compare, convert, inspect, info, bench)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it gives has the function `run` of the options."""
    parser = argparse.ArgumentParser(prog="anymha", description="One attention layer, everywhere.")
    parser.add_argument("--version", action="version", version=f"anymha {__version__}")
    parser.add_argument("--print-completion", action=PrintCompletion,
                        choices=("bash", "zsh", "fish"), help="print a completion script; for "
                        'bash: eval "$(anymha --print-completion bash)"')  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for module in COMMANDS:
        module.add_command(commands)
    return parser


class PrintCompletion(argparse.Action):
    """Print the script for a shell, which names every command and option, and end."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:  # fmt: skip
        """Print the script; shtab makes it."""
        try:
            import shtab  # noqa: PLC0415  needs the extra "cli"
        except ImportError as error:
            raise UsageError(
                "Completion needs shtab, which is not installed. "
                "Install it with: pip install 'anymha[cli]'."
            ) from error
        for action in _actions(parser):
            if action.type is Path:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
        print(shtab.complete(parser, values))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
