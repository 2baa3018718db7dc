"""The commands `anymha info` and `anymha layouts`: what is installed, what is known."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
from typing import Any

from anymha.framework.registry import LAYERS, Backend, backends
from anymha.interchange.layouts import layouts
from anymha.parity.reports.environment import installed_versions, own_versions

EXTRAS = {
    "cli": (("rich", "shtab"), "tables of `anymha parity` and `compare`, completion by shells"),
    "report": (("matplotlib",), "pictures in the HTML report of `anymha parity`"),
    "hdf5": (("h5py",), "Keras's files: .weights.h5 and .keras"),
    "orbax": (("tensorstore",), "Orbax's checkpoints, of Flax"),
    "gguf": (("gguf",), "quantised tensors of GGUF files"),
}
"""For each extra that brings no home: the packages, and what they serve."""


def add_command(commands: Any) -> None:
    """Add both commands to the parser's commands."""
    command = commands.add_parser("layouts", help="list the layouts of weights")
    command.set_defaults(run=show_layouts)
    command = commands.add_parser(
        "info", help="show versions, frameworks and extras", description=info.__doc__
    )
    command.set_defaults(run=info)


def show_layouts(options: argparse.Namespace) -> int:
    """The names of all layouts."""
    for name in layouts():
        print(name)
    return 0


def info(options: argparse.Namespace) -> int:
    """Show the versions, the frameworks, and the extras; how to install what is missing."""
    for name, version in own_versions().items():
        print(f"{name:12} {version}")
    print("\nFrameworks")
    for home in (*backends().values(), *LAYERS):
        print(f"{home.name:12} {_home(home)}")
    states = {name: _extra(name, packages) for name, (packages, _) in EXTRAS.items()}
    width = max(map(len, states.values()))
    print("\nExtras")
    for name, (_, purpose) in EXTRAS.items():
        print(f"{name:12} {states[name]:{width}}  {purpose}")
    return 0


def _home(home: Backend) -> str:
    if not home.installed:
        return f"not installed: pip install 'anymha[{home.name}]'"
    version = installed_versions([home.framework]).get(home.framework, "installed")
    return f"{version:14} {home.package}.MultiHeadAttention"


def _extra(name: str, packages: tuple[str, ...]) -> str:
    found = installed_versions(packages)
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed: pip install 'anymha[{name}]'"
    return ", ".join(f"{package} {found.get(package, '')}".rstrip() for package in packages)
