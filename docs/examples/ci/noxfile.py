"""Parity of a project's attention with others', with several versions of each framework.

`nox --list` names the sessions; `nox -s "parity(torch-2.5)"` runs one. Reports are written to
parity-report/.
"""

import nox

nox.options.reuse_venv = "yes"

# What each session installs beside the project; the name begins with the package that it is about.
SESSIONS = {
    "torch-2.5": ["torch==2.5.*"],
    "torch-latest": ["torch"],
    "tensorflow-2.19": ["tensorflow==2.19.*"],
    "tensorflow-latest": ["tensorflow"],
    "jax-0.8": ["jax==0.8.*"],
    "jax-latest": ["jax"],
}


@nox.session
@nox.parametrize("name", list(SESSIONS), ids=list(SESSIONS))
def parity(session: nox.Session, name: str) -> None:
    """Run the tests that compare; one that is skipped for want of the session's package fails."""
    session.install("-e", ".", "anymha", "pytest", *SESSIONS[name])
    reports = [f"--parity-report=parity-report/{name}.{form}" for form in ("html", "md", "json")]
    session.run(
        "pytest",
        f"--parity-expect={name.partition('-')[0]}",
        f"--parity-save=parity-report/{name}",
        *reports,
        *session.posargs,
    )
