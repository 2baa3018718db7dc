"""The option `--print-completion`: the words that a shell needs to complete the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anymha.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add the option to the whole command line's parser."""
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help='print a completion script; for bash: eval "$(anymha --print-completion bash)"',
    )


class PrintCompletion(argparse.Action):
    """Print the script for a shell, and end."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Print the script, which names every command and option."""
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
