"""The decoding example in its small form: every framework writes the same text."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.frameworks import skip_or_fail

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs/examples/decoding"
NEEDS = {
    "numpy": [], "torch": [], "tensorflow": ["tensorflow"], "jax": ["jax"], "keras": ["keras"],
    "flax": ["flax", "jax"], "equinox": ["equinox", "jax"],
}  # fmt: skip


def missing(*names: str) -> str | None:
    """The first of these modules that is not installed."""
    return next((name for name in names if find_spec(name) is None), None)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Where the example draws, if it can."""
    return None if missing("matplotlib") else tmp_path_factory.mktemp("decoding") / "decoding.svg"


@pytest.fixture(scope="module")
def printed(picture: Path | None) -> str:
    """What the example prints of all frameworks that are there."""
    if missing("torch"):
        skip_or_fail("torch", "torch, in which the model is trained, is not installed")
    present = [name for name, needed in NEEDS.items() if not missing(*needed)]
    image = ["--image", str(picture)] if picture else []
    # In a process of its own, since importing Keras fixes its backend.
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--small", "--frameworks", ",".join(present), *image],
        env={
            **os.environ,
            "PYTHONIOENCODING": "utf-8",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
        },
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("framework", list(NEEDS))
def test_a_framework_writes_the_text_of_numpy_with_caches_and_without(
    framework: str, printed: str
) -> None:
    lacking = missing(*NEEDS[framework])
    if lacking:
        skip_or_fail(framework, f"{lacking} is not installed")
    row = next(line for line in printed.splitlines() if line.startswith(f"| {framework} |"))
    *_, apart, same = (cell.strip() for cell in row.strip("|").split("|"))
    assert float(apart) <= 1e-4
    assert same == "yes"


def test_the_text_follows_the_prompt(printed: str) -> None:
    text = printed.partition("One text: yes.\n\n")[2].removesuffix("\n")
    assert text.startswith("The import statement")
    assert len(text) == len("The import statement") + 40


def test_the_picture_is_that_of_the_page(picture: Path | None, printed: str) -> None:
    if picture is None:
        pytest.skip("matplotlib is not installed")
    drawn = picture.read_text("utf-8")
    for name in ("numpy", "torch"):
        assert f"{name}, cache" in drawn
        assert f"{name}, no cache" in drawn
    assert (ROOT / "docs/images/decoding.svg").is_file()
    assert "](images/decoding.svg)" in (ROOT / "docs/decoding.md").read_text("utf-8")
