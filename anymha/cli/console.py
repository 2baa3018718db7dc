"""The terminal of the commands that print tables. Needs the extra "cli"."""

from __future__ import annotations

from anymha.errors import UsageError

try:
    from rich.console import Console
except ImportError as error:
    raise UsageError(
        f"This command prints tables with {(error.name or 'rich').partition('.')[0]}, which is not "
        "installed. Install it with: pip install 'anymha[cli]'."
    ) from error


class Terminal(Console):
    """A console that leaves a closed pipe to the command; rich itself ends with status 1."""

    def on_broken_pipe(self) -> None:
        """Raise the error again.

        Raises:
            BrokenPipeError: always; it is the error that is being handled.
        """
        raise


def make_console() -> Console:
    """The console of stdout: without colours where that is no terminal, or NO_COLOR is set."""
    return Terminal()
