"""The pictures of the options' pages: the script draws them, and each stands on its page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.peer_layers import need

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs/examples/options"


def test_the_script_draws_the_pictures_of_the_pages(tmp_path: Path) -> None:
    need("matplotlib")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) >= 5
    for name in drawn:
        assert "<svg" in (tmp_path / name).read_text(encoding="utf-8")
        assert (ROOT / "docs/images" / name).is_file()
        page = ROOT / "docs" / name.replace(".svg", ".md")
        assert f"](images/{name})" in page.read_text(encoding="utf-8")
