"""The command: what it finds when a backend is broken, what it refuses, what it writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import anymha.cli.parity
from anymha.cli.main import main
from anymha.framework.registry import BUILT_IN, backends, get_backend
from anymha.interchange.layouts import layouts
from anymha.parity.oracle.cases import MATRIX
from anymha.version import __version__
from tests.conftest import usable

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
REAL = [
    "--checkpoint", str(DATA / "minilm_attention.safetensors"), "--layout", "transformers.bert",
    "--num-heads", "12", "--inputs", str(DATA / "minilm_text.npz"),
]  # fmt: skip
FEW = ("cross", "N-D, two axes", "large logits", "dropout", "everything", "reproducible")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix with a few cases, which together use every op."""
    monkeypatch.setattr(anymha.cli.parity, "MATRIX", tuple(c for c in MATRIX if c.name in FEW))


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix with one case."""
    monkeypatch.setattr(anymha.cli.parity, "MATRIX", MATRIX[:1])


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; gives its exit status, what it printed and what it printed as errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(arguments)
        except SystemExit as stop:  # of argparse
            status = int(str(stop.code))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def half(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """The function on arguments that were rounded to half precision."""

    def rounded(*arrays: Any, **options: Any) -> Any:
        narrow = [a.astype(kind).astype(a.dtype) for a in arrays]
        return function(*narrow, **options)

    return rounded


def scaled(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    return lambda *arrays, **options: function(*arrays, **options) * factor


def other_axis(x: Any, *, axis: int, keepdims: bool) -> Any:
    return np.max(x, axis=-2, keepdims=keepdims)


def no_max(x: Any, *, axis: int, keepdims: bool) -> Any:
    return np.zeros_like(np.max(x, axis=axis, keepdims=keepdims))


def linear(x: Any, matrix: Any, bias: Any) -> Any:
    return np.tensordot(x, matrix, 1) + bias


def base_2(x: Any, peak: Any) -> tuple[Any, Any]:
    weights = np.exp2(x - peak)
    return weights, np.sum(weights, axis=-1, keepdims=True)


def break_function(monkeypatch: pytest.MonkeyPatch, ops: Any, name: str, broken: Any) -> None:
    """Put a broken function in the place of one of a backend's, or of its capabilities."""
    if getattr(ops.capabilities, name, None) is None:
        monkeypatch.setattr(ops, name, broken)
        return
    capabilities = dataclasses.replace(ops.capabilities, **{name: broken})
    monkeypatch.setattr(ops, "capabilities", capabilities)


def failing(*arrays: Any, **options: Any) -> Any:
    raise RuntimeError("no [such] kernel")


FAULTS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "another base": ("exp_and_sum", base_2, FEW),
    "max of another axis": ("max", other_axis, ("everything",)),
    "max that is ignored": ("max", no_max, ("large logits",)),
    "where the other way round": ("where", lambda c, a, b: np.where(c, b, a), ("everything",)),
    "products too large": ("matmul", scaled(np.matmul, 1.001), FEW),
    "projections too large": ("linear", scaled(linear, 1.0001), FEW),
    "projections in float16": ("linear", half(linear, "float16"), FEW),
    "products in float16": ("matmul", half(np.matmul, "float16"), FEW),
    "sums in float16": ("sum", half(np.sum, "float16"), FEW),
    "masks of which one is enough": ("logical_and", np.logical_or, ("everything",)),
    "other random bits": ("bitwise_xor", np.bitwise_or, ("dropout",)),
    "float32 for float64": ("dtype", lambda name: np.dtype("float32"), ("reproducible",)),
    "an error": ("matmul", failing, FEW),
}


@pytest.mark.usefixtures("few")
def test_sound_backend_passes(command: Run) -> None:
    status, out, err = command("parity", "--backends", "numpy")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"PARITY HOLDS: {len(FEW)} cases on numpy"


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what is broken overflows
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_function_fails_and_is_told(
    command: Run, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    name, broken, cases = FAULTS[fault]
    break_function(monkeypatch, get_backend("numpy").ops, name, broken)
    status, out, _ = command("parity", "--backends", "numpy")
    assert status == 1
    assert out.splitlines()[-1].startswith("PARITY DOES NOT HOLD: ")
    for case in cases:
        assert f"✗ {case}, numpy: " in out, case
        assert any(line.startswith(f"✗  {case}  ") for line in out.splitlines())
    if fault == "an error":
        assert "✗ cross, numpy: raised RuntimeError: no [such] kernel" in out


@pytest.mark.usefixtures("few")
def test_other_dropout_of_the_core_fails(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = anymha.attention.dropout.keep_mask

    def shifted(*args: Any, **options: Any) -> Any:
        return np.roll(sound(*args, **options), 1, axis=-1)

    monkeypatch.setattr("anymha.attention.dropout.keep_mask", shifted)
    status, out, _ = command("parity", "--backends", "numpy")
    assert status == 1
    assert out.splitlines()[-1].endswith("fail: dropout")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("name", "broken", "case"),
    [
        ("exp", lambda torch, x: torch.exp2(x), "reproducible"),
        ("softmax", lambda torch, x: torch.softmax(x * 1.01, -1), "cross"),
        ("max", lambda torch, x, **o: torch.amax(x, dim=-2, keepdim=True), "everything"),
        ("where", lambda torch, c, a, b: torch.where(c, b, a), "everything"),
        ("matmul", lambda torch, a, b: torch.matmul(a, b) * 1.001, "cross"),
        ("sum", lambda torch, x, *, axis, keepdims:
            torch.sum(x.to(torch.bfloat16), axis, keepdims).to(x.dtype), "reproducible"),
        ("projection", lambda torch, x, weight, bias:
            torch.tensordot(x.half(), weight.T.half(), 1).to(x.dtype) + bias, "N-D, two axes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_broken_torch_fails_and_numpy_beside_it_does_not(
    command: Run, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, case: str
) -> None:
    ops = usable("torch").ops
    torch = sys.modules["torch"]

    def function(*args: Any, **options: Any) -> Any:
        return broken(torch, *args, **options)

    if name == "projection":
        monkeypatch.setattr("anymha_torch.projection.linear", function)
    else:
        break_function(monkeypatch, ops, name, function)
    status, out, _ = command("parity", "--backends", "numpy,torch")
    assert status == 1
    assert f"✗ {case}, torch: " in out
    assert ", numpy: " not in out


@pytest.mark.usefixtures("one")
def test_wrong_gradient_fails_where_the_forward_pass_is_right(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = usable("torch").ops
    sound = ops.capabilities.vjp

    def stale(*args: Any) -> Any:
        outputs, gradients = sound(*args)
        return outputs, {**gradients, "key.kernel": 0 * gradients["key.kernel"]}

    stale_capabilities = dataclasses.replace(ops.capabilities, vjp=stale)
    monkeypatch.setattr(ops, "capabilities", stale_capabilities)
    status, out, _ = command("parity", "--backends", "torch")
    assert status == 1
    faults = [line for line in out.splitlines() if line.startswith("✗ self")]
    assert len(faults) == 1
    assert faults[0].startswith("✗ self, torch: key.kernel is off by ")
    assert ";" not in faults[0], "nothing else is wrong"


@pytest.mark.usefixtures("few")
def test_one_bit_between_two_backends_fails_the_reproducible_mode(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = usable("torch").ops
    sound = ops.to_numpy

    def nudged(x: Any) -> Any:
        array = sound(x).copy()
        if array.shape == (2, 7, 3, 2) and array.dtype == np.float32:
            place = np.abs(array).argmin()
            array.flat[place] = np.nextafter(array.flat[place], np.float32(9))
        return array

    monkeypatch.setattr(ops, "to_numpy", nudged)
    status, out, _ = command("parity", "--backends", "numpy,torch")
    assert status == 1
    assert "✗ reproducible: 1 of 1988 elements differ between backends, of 0 allowed" in out
    assert out.splitlines()[-1].endswith("fail: reproducible")


def test_whole_matrix_passes_on_numpy(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    status, out, _ = command("parity", "--backends", "numpy", "--json", str(path))
    assert status == 0, out
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["passed"]
    assert [case["name"] for case in report["cases"]] == [case.name for case in MATRIX]
    assert all(case["cells"]["numpy"]["gradients"] for case in report["cases"])
    assert out.splitlines()[-2:] == [f"json: {path}", report["verdict"]]


def test_real_weights_pass_and_are_drawn(command: Run, tmp_path: Path, one: None) -> None:
    pytest.importorskip("matplotlib", reason="the HTML report needs matplotlib")
    page = tmp_path / "deep" / "index.html"
    status, out, err = command(
        "parity", "--backends", "numpy", *REAL, "--prefix", "encoder.layer.0.", "--html", str(page)
    )
    assert (status, err) == (0, "")
    for mode in ("float32", "float64", "reproducible"):
        assert f"✓  layer 0, {mode}  " in out
    text = page.read_text(encoding="utf-8")
    assert "PARITY HOLDS: 4 cases on numpy" in text
    assert "encoder.layer.0.attention" in text
    assert ">attention</text>" in text, "the words of the sentence stand at the map"


def broken_process(*arguments: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with a few cases and a fault planted before."""
    code = (
        "import anymha_numpy.ops as o, anymha.cli.parity as c, numpy as np\n"
        "from anymha.cli.main import main\n"
        f"{fault}\nc.MATRIX = c.MATRIX[:3]\n"
        f"raise SystemExit(main({['parity', *arguments]!r}))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8",
        timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip


def test_process_ends_with_1_where_a_backend_is_broken_and_0_where_not() -> None:
    done = broken_process("--backends", "numpy")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout, "no colours, no progress where there is no terminal"
    done = broken_process(
        "--backends", "numpy", fault="o.max = lambda x, **o: 1 + x.max(-2, keepdims=True)"
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "✗ self, numpy: " in done.stdout


def test_process_writes_what_its_encoding_has() -> None:
    code = (
        "import anymha.cli.parity as c\n"
        "from anymha.cli.main import main\n"
        "c.MATRIX = c.MATRIX[:1]; main(['parity', '--backends=numpy'])"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == b"PARITY HOLDS: 1 case on numpy"


@pytest.mark.usefixtures("one")
def test_numpy_alone_runs_and_tells_what_adds_the_others(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = importlib.util.find_spec
    absent = [backend.framework for backend in BUILT_IN if backend.name != "numpy"]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else sound(name, *a)
    )
    only = {name: b for name, b in backends().items() if b in BUILT_IN}
    monkeypatch.setattr(anymha.cli.parity, "backends", lambda: only)
    status, out, _ = command("parity")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == (
        f"anymha {__version__}: 1 case on numpy (not installed: torch, tensorflow, jax)"
    )
    for name in ("torch", "tensorflow", "jax"):
        assert f"{name} is not installed: pip install 'anymha[{name}]' adds it." in lines
    assert lines[-1] == "PARITY HOLDS: 1 case on numpy"


@pytest.fixture
def absent_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else sound(name, *a)
    )


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running the matrix is an error: what is wrong must be told before."""

    def never(*args: Any) -> Any:
        raise AssertionError("the matrix ran")

    monkeypatch.setattr(anymha.cli.parity, "run_matrix", never)


@pytest.mark.usefixtures("no_run", "absent_torch")
def test_backend_that_is_not_installed_is_told(command: Run) -> None:
    assert command("parity", "--backends", "numpy,torch") == (
        2, "", "anymha: The backend 'torch' needs torch, which is not installed. Install it with: "
        "pip install 'anymha[torch]'.\n",
    )  # fmt: skip


KNOWN = ", ".join(repr(name) for name in backends())
LAYOUTS = ", ".join(repr(name) for name in layouts())
WRONG: dict[str, tuple[list[str], str]] = {
    "unknown backend": (
        ["--backends", "numpy,torhc"],
        f"A backend is one of {KNOWN}. Received: 'torhc'.",
    ),
    "no backend": (["--backends", ""], f"A backend is one of {KNOWN}. Received: ''."),
    "no layout": (
        [*REAL[:2], "--num-heads", "12"],
        "`--checkpoint` needs `--layout` and `--num-heads` too: neither is in the file. "
        f"Known layouts: {', '.join(layouts())}.",
    ),
    "no number of heads": (
        REAL[:4],
        "`--checkpoint` needs `--layout` and `--num-heads` too: neither is in the file. "
        f"Known layouts: {', '.join(layouts())}.",
    ),
    "layout without checkpoint": (
        REAL[2:4],
        "`--layout` says how to read a checkpoint: give `--checkpoint`.",
    ),
    "heads without checkpoint": (
        REAL[4:6],
        "`--num-heads` says how to read a checkpoint: give `--checkpoint`.",
    ),
    "inputs without checkpoint": (
        REAL[6:],
        "`--inputs` says how to read a checkpoint: give `--checkpoint`.",
    ),
    "unknown layout": (
        [*REAL[:2], "--layout", "bert", "--num-heads", "12"],
        f"`layout`: none is called 'bert'. Did you mean 'transformers.bert'? There are {LAYOUTS}.",
    ),
    "heads that do not divide": (
        [*REAL[:4], "--num-heads", "7"],
        f"{REAL[1]}, layer 'encoder.layer.0.attention.': `self.query.weight` must be a matrix "
        "whose rows are 7 heads of equal size. Received: shape (384, 384).",
    ),
    "no heads": (
        [*REAL[:4], "--num-heads", "0"],
        f"{REAL[1]}, layer 'encoder.layer.0.attention.': `self.query.weight` must be a matrix "
        "whose rows are 0 heads of equal size. Received: shape (384, 384).",
    ),
    "prefix that matches nothing": (
        [*REAL, "--prefix", "decoder."],
        f"{REAL[1]} holds no layer whose names begin with 'decoder.'. Its layers begin with "
        "'encoder.layer.0.attention.', 'encoder.layer.5.attention.'.",
    ),
    "text for weights": (
        ["--checkpoint", str(ROOT / "LICENSE"), *REAL[2:]],
        f"{ROOT / 'LICENSE'} is of no known format, neither by its name nor by its first bytes. "
        "Known are: ",
    ),
    "text for inputs": (
        [*REAL[:7], str(ROOT / "LICENSE")],
        f"{ROOT / 'LICENSE'} is not an .npz file.",
    ),
    "missing weights": (
        ["--checkpoint", "no.safetensors", *REAL[2:]],
        "no.safetensors cannot be read: ",
    ),
    "missing inputs": (
        [*REAL[:7], "no.npz"],
        "no.npz cannot be read: No such file or directory.",
    ),
    "folder for JSON": (["--json", str(DATA)], f"{DATA} cannot be written: it is a folder."),
    "file for folder": (
        ["--html", str(ROOT / "LICENSE" / "page.html")],
        f"{ROOT / 'LICENSE' / 'page.html'} cannot be written: {ROOT / 'LICENSE'} is not a folder.",
    ),
    "one file for both": (
        ["--json", "out", "--html", "out"],
        "`--json` and `--html` must be two files. Received: out.",
    ),
}


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_call_is_told_before_anything_runs(
    command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    arguments, told = WRONG[wrong]
    monkeypatch.chdir(tmp_path)
    outputs = [] if {"--json", "--html"} & set(arguments) else ["--json", "out.json"]
    status, out, err = command("parity", *arguments, *outputs)
    assert (status, out) == (2, "")
    assert err.startswith(f"anymha: {told}")
    assert err == f"anymha: {told}\n" or told.endswith(": "), "beyond it only the system's words"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_run")
def test_inputs_that_lack_a_layer_are_told(command: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "text.npz", hidden_states_0=np.ones((1, 2, 384), np.float32))
    status, out, err = command("parity", *REAL[:7], str(tmp_path / "text.npz"))
    assert (status, out) == (2, "")
    assert err == (
        "anymha: The inputs hold no hidden_states_5 for the layer 'encoder.layer.5.attention.'. "
        "They hold: hidden_states_0.\n"
    )


@pytest.mark.usefixtures("no_run")
def test_html_without_its_package_is_told_before_anything_runs(
    command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = "matplotlib"
    monkeypatch.delitem(sys.modules, "anymha.parity.matrix.pictures", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    assert command("parity", "--html", str(page), "--json", str(numbers)) == (
        2, "", f"anymha: The HTML report needs {package}, which is not installed. "
        "Install it with: pip install 'anymha[report]'.\n",
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["party"], "invalid choice: 'party'"),
        (["parity", "--nothing"], "unrecognized arguments: --nothing"),
        (["parity", "--num-heads", "many"], "argument --num-heads: invalid int value: 'many'"),
        (["parity", "--json"], "argument --json: expected one argument"),
    ],
)
def test_arguments_that_argparse_refuses_end_with_2(
    command: Run, arguments: list[str], told: str
) -> None:
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert told in err


@pytest.mark.usefixtures("one")
def test_file_that_cannot_be_written_after_all_ends_with_2(
    command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "numbers.json"
    monkeypatch.setattr("os.fsync", full)
    status, out, err = command("parity", "--backends", "numpy", "--json", str(path))
    assert status == 2
    assert "✓  self" in out
    assert err == f"anymha: {path} cannot be written: No space left on device.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one")
def test_backend_named_twice_runs_once(command: Run) -> None:
    status, out, _ = command("parity", "--backends", "numpy, numpy")
    assert status == 0
    assert out.splitlines()[-1] == "PARITY HOLDS: 1 case on numpy"


def test_checkpoint_without_inputs_or_a_mask_runs(command: Run, tmp_path: Path, one: None) -> None:
    rng = np.random.default_rng(0)
    parts = ("self.query", "self.key", "self.value", "output.dense")
    save_file(
        {f"a.1.{part}.weight": rng.standard_normal((6, 6)).astype(np.float32) for part in parts},
        tmp_path / "model.safetensors",
    )
    status, out, _ = command(
        "parity", "--backends", "numpy", "--checkpoint", str(tmp_path / "model.safetensors"),
        "--layout", "transformers.bert", "--num-heads", "3",
    )  # fmt: skip
    assert status == 0
    assert "✓  layer 1, reproducible  " in out


def test_layouts_are_listed(command: Run) -> None:
    status, out, _ = command("layouts")
    assert (status, out.split()) == (0, layouts())


@pytest.mark.usefixtures("absent_torch")
def test_info_tells_versions_and_what_is_not_installed(command: Run) -> None:
    status, out, _ = command("info")
    assert status == 0
    assert out.split()[:2] == ["anymha", __version__]
    assert f"numpy        {np.__version__}" in out
    assert "torch        not installed: pip install 'anymha[torch]'" in out


def test_version_is_told(command: Run) -> None:
    assert command("--version")[:2] == (0, f"anymha {__version__}\n")


def test_python_runs_the_package_as_the_command() -> None:
    for arguments, status, words in (
        (["--version"], 0, f"anymha {__version__}\n"),
        (["parity", "--layout", "anymha"], 2, "give `--checkpoint`."),
    ):
        run = [sys.executable, "-m", "anymha", *arguments]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert words in (done.stderr if status else done.stdout)
