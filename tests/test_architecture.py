"""Who imports whom, and what the wheel holds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import anymha
from tests import wheel_lines
from tests.conftest import LONG

ROOT = Path(__file__).parent.parent
LARGEST = 43_600
"""The most lines of code in the wheel, without comments, docstrings and empty lines."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted([*ROOT.glob("anymha/**/*.py"), *ROOT.glob("backends/**/*.py")])

# For each contract, a file and a line that must break it.
PLANTED = {
    "Imports run downward only": ("anymha/attention/masks.py", "import anymha.layer.forward"),
    "The core imports no framework and no backend": ("anymha/layer/forward.py", "import torch"),
    "Backends are independent of one another": (
        "backends/anymha_torch/ops.py",
        "import anymha_numpy.ops",
    ),
    "Backends import nothing above the layer": (
        "backends/anymha_numpy/layer.py",
        "import anymha.interchange",
    ),
    "NumPy's backend imports no framework": ("backends/anymha_numpy/ops.py", "import jax"),
    "PyTorch's backend imports no other framework": ("backends/anymha_torch/ops.py", "import jax"),
    "TensorFlow's backend imports no other framework, and not Keras": (
        "backends/anymha_tensorflow/ops.py",
        "import keras",
    ),
    "JAX's backend, Flax's and Equinox's layers import no other framework": (
        "backends/anymha_jax/ops.py",
        "import torch",
    ),
    "Keras's layer imports none of the frameworks that Keras runs on": (
        "backends/anymha_keras/call.py",
        "import torch",
    ),
    "The oracle shares nothing with what it judges": (
        "anymha/parity/oracle/oracle.py",
        "import anymha.attention.masks",
    ),
    "No circles": ("anymha/parity/oracle/oracle.py", "import anymha.parity.oracle.truth"),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the checkout at `root`, whatever else is installed."""
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    paths = os.pathsep.join([str(root), str(root / "backends")])
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources and of pyproject.toml."""
    for folder in ("anymha", "backends"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=lambda *_: {"__pycache__"})
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_contract_holds() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(f"{name} KEPT" in result.stdout for name in PLANTED), result.stdout


def test_every_contract_has_a_planted_import() -> None:
    contracts = {contract["name"] for contract in PROJECT["tool"]["importlinter"]["contracts"]}
    assert contracts == set(PLANTED)


@pytest.mark.parametrize("contract", PLANTED)
def test_a_planted_import_breaks_its_contract(contract: str, checkout: Path) -> None:
    path, line = PLANTED[contract]
    with (checkout / path).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(checkout)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{contract} BROKEN" in result.stdout


def test_a_module_without_a_place_in_the_layers_breaks_the_contract(checkout: Path) -> None:
    (checkout / "anymha" / "stray.py").write_text('"""A module that no layer names."""\n')
    result = lint_imports(checkout)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "- anymha.stray" in result.stdout


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_module_imports_from_the_package_above_it(path: Path) -> None:
    imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    assert [node.lineno for node in imports if node.module == "anymha"] == []


def test_the_layers_are_at_most_nine() -> None:
    contracts = {
        contract["id"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]
    }
    assert len(contracts["layers"]["layers"]) <= 9


def test_import_anymha_imports_no_framework_and_no_tool() -> None:
    names = ("torch", "tensorflow", "jax", "keras", "flax", "equinox", "matplotlib", "jinja2",
             "rich", "shtab", "safetensors")  # fmt: skip
    command = f"import anymha, sys; print([m for m in {names} if m in sys.modules])"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    output = subprocess.check_output(
        [sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": paths}, text=True
    )
    assert output.strip() == "[]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the working tree."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [p for p in archive.namelist() if p.endswith(f".dist-info/{name}")]
        return archive.read(path).decode()


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {relative(path).removeprefix("backends/") for path in SOURCES}
    assert {name for name in held if name.endswith(".py")} == sources
    packages = {name.split("/")[0] for name in sources}
    assert {name for name in held if name.endswith("py.typed")} == {
        f"{package}/py.typed" for package in packages
    }


def test_source_distribution_holds_no_files_of_services(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "tests/conftest.py", "anymha/__init__.py"} <= held
    assert [name for name in held if name.startswith((".ci", ".github", ".pre-commit"))] == []


def test_wheel_takes_its_version_from_the_one_place_where_it_stands(wheel: Path) -> None:
    assert "version" not in PROJECT["project"]
    (version,) = re.findall(r"^Version: (.+)$", metadata(wheel, "METADATA"), re.MULTILINE)
    assert version == anymha.__version__


def test_wheel_carries_its_license_and_its_command(wheel: Path) -> None:
    assert "License-Expression: Apache-2.0" in metadata(wheel, "METADATA")
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")
    assert "anymha = anymha.cli.main:main" in metadata(wheel, "entry_points.txt")


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    command = "import anymha, anymha_numpy; print(anymha.__file__); print(anymha_numpy.__file__)"
    output = subprocess.check_output(
        [sys.executable, "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        text=True,
    )
    assert all(Path(line).is_relative_to(tmp_path) for line in output.splitlines()), output


def test_sessions_name_files_that_exist() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    found = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and getattr(node.targets[0], "id", "") in ("ALONE", "SAME_EVERYWHERE")
    ]
    assert len(found) == 2
    names = [n.value for one in found for n in ast.walk(one) if isinstance(n, ast.Constant)]
    assert len(names) > 10
    assert [n for n in names if not (ROOT / "tests" / f"test_{n}.py").exists()] == []
    assert [n for n in LONG if not (ROOT / "tests" / n).exists()] == []


NEEDED = ("numpy", "ml_dtypes")
TWO_PACKAGES = """
import numpy as np
import anymha_numpy
layer = anymha_numpy.MultiHeadAttention(2, 4, query_features=8, seed=0)
x = np.ones((1, 3, 8), "float32")
assert layer(x).shape == (1, 3, 8)
import anymha
anymha.save("layer.safetensors", layer)
assert (anymha.load("layer.safetensors", backend="numpy")(x) == layer(x)).all()
from anymha.parity import compare
report = compare(layer, layer, x)
assert report.passed
for form in ("html", "json", "junit", "markdown"):
    getattr(report, f"to_{form}")(f"report.{form}")
from anymha.cli.main import main
assert main(["info"]) == 0
"""


def test_wheel_needs_two_packages(wheel: Path) -> None:
    required = re.findall(r"^Requires-Dist: (.+)$", metadata(wheel, "METADATA"), re.MULTILINE)
    always = [line for line in required if "extra ==" not in line]
    assert {re.split(r"[<>=!~ ;]", line)[0].replace("-", "_") for line in always} == set(NEEDED)


def test_wheel_works_beside_two_packages(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for name in NEEDED:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        for folder in (package, package.with_name(f"{name}.libs")):  # NumPy's own BLAS
            if folder.exists():
                (tmp_path / folder.name).symlink_to(folder, target_is_directory=True)
    # Without site: nothing but the standard library and that folder can be imported.
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}){TWO_PACKAGES}"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pip install 'anymha[cli]'" in done.stdout


def test_wheel_stays_slim() -> None:
    code = sum(wheel_lines.count(path.read_text()).code for path in wheel_lines.wheel_files())
    assert code <= LARGEST, "python -m tests.wheel_lines shows where the lines are"


def test_lines_are_counted() -> None:
    text = '"""Module."""\n\n# comment\nx = 1  # code\n\n\ndef f():\n    """Doc\n    string."""\n'
    text += "    return (\n        x\n    )\n"
    assert wheel_lines.count(text) == wheel_lines.Lines(total=12, code=5, docstrings=3)


def test_tensorflow_can_read_what_a_call_runs_through() -> None:
    """AutoGraph cannot read functions with an assignment within an expression, and warns."""
    folders = ("anymha/attention", "anymha/execution", "anymha/layer", "backends/anymha_tensorflow")
    read = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    read += [ROOT / "anymha/functional.py"]
    assert len(read) > 30
    assert not [p for p in read if ":=" in p.read_text(encoding="utf-8")]
