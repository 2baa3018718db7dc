"""The site: what checks its links finds faults, and the package index gets links that work."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SOURCE = PROJECT["project"]["urls"]["Source"]


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "docs/check_links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, **pages: str) -> Path:
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)
    return folder


def test_a_site_whose_links_lead_somewhere_has_no_fault(
    checker: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = '<a href="two.html#there">two</a> <a href="https://example.org/x">elsewhere</a>'
    write(tmp_path, index=one, two='<p id="there"><a href="#there">here</a></p>')
    assert checker.main([str(tmp_path)]) == 0
    assert "every link leads somewhere" in capsys.readouterr().out


def test_planted_faults_are_found(checker: ModuleType, tmp_path: Path) -> None:
    links = '<a href="gone.html">a</a> <img src="gone.svg"> <a href="two.html#gone">b</a>'
    write(tmp_path, index=links, two="<p>", alone='<a href="index.html">home</a>')
    assert checker.main([str(tmp_path)]) == 1
    assert checker.faults(tmp_path) == [
        "alone.html: no page links to it",
        "index.html: gone.html leads nowhere",
        "index.html: gone.svg leads nowhere",
        "index.html: two.html#gone has an anchor that is not there",
    ]


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs/index.md").read_text("utf-8")
    listed = re.findall(r"^(?:.* <)?([\w/-]+)>?$", contents, re.MULTILINE)
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= set(listed)


def test_links_of_the_readme_are_whole_on_the_package_index() -> None:
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text("utf-8")
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 20
    for target in targets:
        path = re.fullmatch(rf"{re.escape(SOURCE)}/(?:blob|raw)/main/([^#]+)(?:#.*)?", target)
        assert path, target
        assert (ROOT / path[1]).exists(), target
        assert ("/raw/" in target) == target.endswith((".svg", ".png")), target


def test_one_repository_is_named_everywhere() -> None:
    pages = [
        ROOT / "SECURITY.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob(".github/ISSUE_TEMPLATE/config.yml"),
    ]
    found = [*PROJECT["project"]["urls"].values()]
    for page in pages:
        found += re.findall(r"https://github\.com/anymha[^\s)>]*", page.read_text("utf-8"))
    assert all(re.match(rf"{re.escape(SOURCE)}(?:/|$)", url) for url in found), found


def test_workflows_and_forms_are_yaml() -> None:
    yaml = pytest.importorskip("yaml", reason="yaml is not installed")
    if not (ROOT / ".github").is_dir():
        pytest.skip("the source distribution has no .github")
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text("utf-8"))
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert release["permissions"] == {"contents": "read"}
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text("utf-8"))
        if path.name != "config.yml":
            assert {"name", "description", "body"} <= set(form)
            ids = [field["id"] for field in form["body"]]
            assert len(ids) == len(set(ids))
