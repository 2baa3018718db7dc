"""The command as a process: pipes, Ctrl-C, colours, what is missing, completion by shells."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from anymha.cli.info import EXTRAS
from anymha.cli.main import main
from anymha.framework.registry import BUILT_IN, LAYERS
from anymha.version import __version__

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "tests" / "data" / "minilm_attention.safetensors"
ONE_CASE = "import anymha.cli.parity as parity; parity.MATRIX = parity.MATRIX[:1]"
NO_RICH = "import sys; sys.modules['rich'] = sys.modules['shtab'] = None"
EXTRA_CLI = "Install it with: pip install 'anymha[cli]'.\n"

posix = pytest.mark.skipif(os.name != "posix", reason="signals and devices of POSIX")


def start(
    *arguments: str, before: str = "", environment: dict[str, str] | None = None, **streams: Any
) -> subprocess.Popen[str]:
    """The command in a process of its own, after the statement `before`."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    code = f"{before}\nfrom anymha.cli.main import main\nraise SystemExit(main({arguments!r}))"
    own = {"PYTHONPATH": paths, "COLUMNS": "120", "PYTHONUNBUFFERED": "", **(environment or {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **own}, text=True, cwd=ROOT, **streams
    )


def run(*arguments: str, **options: Any) -> tuple[int, str, str]:
    """The process's exit status, and what it wrote to stdout and stderr."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out or "", err


@pytest.mark.parametrize(
    "arguments",
    [
        ("layouts",),
        ("--help",),
        ("--version",),
        ("info",),
        ("inspect", str(WEIGHTS)),
        ("parity", "--backends", "numpy"),
        ("compare", "numpy", "numpy"),
        ("--print-completion", "bash"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_pipe_that_nobody_reads_ends_the_command_without_a_word(arguments) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert run(*arguments, before=ONE_CASE, stdout=write) == (141, "", "")
    finally:
        os.close(write)


@posix
def test_ctrl_c_ends_the_command_with_one_line_and_130() -> None:
    # A shell that starts a job in the background has it ignore Ctrl-C.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    sleeping = f"{heard}; {ONE_CASE}; import time; parity.run_matrix = lambda *_: time.sleep(60)"
    process = start("parity", "--backends", "numpy", before=sleeping,
                    environment={"PYTHONUNBUFFERED": "1"})  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"anymha {__version__}: ")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "anymha: interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_an_error_and_not_a_verdict(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        status, _, err = run("layouts", stdout=full, environment={"PYTHONUNBUFFERED": unbuffered})
    assert status == 2
    assert err == "anymha: The results cannot be written to stdout: No space left on device.\n"


@posix
def test_errors_go_to_stderr_and_results_to_stdout() -> None:
    assert run("inspect", "nothing.npz")[:2] == (2, "")
    status, out, err = run("layouts")
    assert (status, err) == (0, "")
    assert "torch.MultiheadAttention\n" in out


@posix
@pytest.mark.parametrize("colored", [True, False])
def test_colours_only_on_a_terminal_and_without_no_color(
    colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.openpty()
    monkeypatch.delenv("NO_COLOR", raising=False)
    environment = {"TERM": "xterm-256color"} | ({} if colored else {"NO_COLOR": "1"})
    process = start("parity", "--backends", "numpy", before=ONE_CASE, environment=environment,
                    stdout=theirs)  # fmt: skip
    os.close(theirs)
    text = b""
    while True:
        try:
            text += (piece := os.read(ours, 4096))
        except OSError:  # Linux's end of a terminal
            break
        if not piece:
            break
    os.close(ours)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (b"\x1b[32m" in text or b"\x1b[1;32m" in text) is colored, text


@pytest.mark.parametrize("arguments", [("info",), ("layouts",), ("inspect", str(WEIGHTS))])
def test_commands_without_tables_need_no_rich(arguments) -> None:
    status, out, err = run(*arguments, before=NO_RICH)
    assert (status, err) == (0, "")
    assert out


def test_conversion_needs_no_rich(tmp_path: Path) -> None:
    arguments = ("convert", str(WEIGHTS), str(tmp_path / "new.npz"), "--num-heads", "12",
                 "--from", "transformers.bert", "--to", "anymha")  # fmt: skip
    status, out, err = run(*arguments, before=NO_RICH)
    assert (status, err) == (0, "")
    assert "new.npz: 2 layers of transformers.bert as anymha" in out


@pytest.mark.parametrize("arguments", [("parity",), ("compare", "numpy", "numpy")])
def test_tables_without_rich_name_the_extra(arguments) -> None:
    status, out, err = run(*arguments, before=NO_RICH)
    assert (status, out) == (2, "")
    assert (
        err == f"anymha: This command prints tables with rich, which is not installed. {EXTRA_CLI}"
    )


def test_the_pytest_plugin_needs_no_rich(tmp_path: Path) -> None:
    (tmp_path / "test_port.py").write_text(
        "import anymha, numpy as np\n"
        "def test_port(parity):\n"
        "    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend='numpy', seed=0)\n"
        "    parity.check(layer, layer, np.ones((1, 3, 8), 'float32'))\n"
    )
    options = ["-q", "-p", "anymha.testing.pytest_plugin", "--parity-report=page.html"]
    code = (
        "import sys; sys.modules.update({'rich': None, 'shtab': None, 'safetensors': None})\n"
        f"import pytest; sys.exit(pytest.main({options!r}))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 compared: 1 agree, 0 differ" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_names_commands_and_options(shell: str, capsys) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert not stop.value.code
    script = capsys.readouterr().out
    for word in ("parity", "compare", "convert", "checkpoint", "layouts"):
        assert word in script, word
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (("anymha", "pa"), {"parity"}),
        (("anymha", "parity", "--ch"), {"--checkpoint"}),
        (("anymha", "compare", "--j"), {"--json", "--junit"}),
        (("anymha", "--print-completion", "f"), {"fish"}),
    ],
)
def test_bash_completes(words: tuple[str, ...], completed: set[str], capsys) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    if (bash := shutil.which("bash")) is None:
        pytest.skip("bash is not installed")
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out + (
        f"\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()\n"
        'function=$(complete -p anymha | sed "s/.*-F \\([^ ]*\\) .*/\\1/")\n'
        f'$function anymha {words[-1]} {words[-2]}\nprintf "%s\\n" "${{COMPREPLY[@]}}"\n'
    )
    done = subprocess.run([bash], input=script, capture_output=True, text=True, timeout=60)
    assert {word.strip() for word in done.stdout.split()} == completed, done.stderr


def test_completion_without_shtab_names_the_extra(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err.endswith(EXTRA_CLI)


def test_info_tells_of_every_home_and_every_extra(capsys) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    homes, extras = out.partition("\nFrameworks\n")[2].split("\n\nExtras\n")
    assert [line.split()[0] for line in homes.splitlines()][: len(BUILT_IN)] == [
        home.name for home in BUILT_IN
    ]
    for home in (*BUILT_IN, *LAYERS):
        missing = f"not installed: pip install 'anymha[{home.name}]'"
        expected = f"{home.package}.MultiHeadAttention" if home.installed else missing
        assert f"\n{home.name} " in f"\n{homes}"
        assert expected in homes
    assert [line.split()[0] for line in extras.splitlines()] == list(EXTRAS)
    for _, purpose in EXTRAS.values():
        assert purpose in extras


def test_info_says_how_to_install_what_is_missing(monkeypatch, capsys) -> None:
    find = sys.modules["importlib.util"].find_spec
    absent = ("flax", "tensorstore")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name in absent else find(name, *a)
    )
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "flax         not installed: pip install 'anymha[flax]'" in out
    assert "orbax        not installed: pip install 'anymha[orbax]'" in out


def test_the_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    homes = {home.name for home in (*BUILT_IN, *LAYERS)}
    named = {
        name: tuple(requirement.partition(">=")[0] for requirement in requirements)
        for name, requirements in extras.items()
        if name not in homes and name != "all"
    }
    assert named == {name: packages for name, (packages, _) in EXTRAS.items()}


def test_bench_outside_of_a_checkout_says_where_it_is(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr("anymha.cli.bench.CHECKOUT", tmp_path)
    assert main(["bench", "--repeats", "1"]) == 2
    err = capsys.readouterr().err
    assert "runs the benchmarks of a checkout" in err
    assert "`nox -s bench`" in err
