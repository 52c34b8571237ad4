"""The wheel on other Pythons: ``python tests/smoke.py 3.12 3.13``.

For each version that this machine has: a new environment with the wheel and what the light commands need, pinned by that
Python's lock; the commands from an empty folder; and the unit tests that need neither torch nor Ray, on the installed
package. A version that is not here is named and left out; exit code 1 if anything failed.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wheel_build import ROOT, build

# What --help, doctor, init and plan import, and the packages whose documentation the quickstart reads.
LIGHT = (
    "filelock", "fsspec", "jsonschema", "networkx", "numpy", "psutil", "py3langid", "pyarrow", "pydantic", "pyyaml", "rich",
    "scikit-learn", "typer",
)  # fmt: skip
TOOLS = ("hypothesis", "pytest", "pytest-timeout")
TESTS = (
    "config/test_descriptions.py", "config/test_families.py", "config/test_keys.py", "config/test_run.py",
    "config/test_teacher.py", "config/test_training_options.py", "config/test_training_runs.py", "planning",
    "cluster/test_checks.py", "core/test_artefacts.py", "core/test_progress.py", "core/test_prompting.py",
    "core/test_schemas.py", "corpus/test_clean.py", "evaluation/test_statistics.py",
    "serving/test_schemas.py", "serving/test_scheduling.py", "synthesis/test_families.py",
    "synthesis/test_prompt.py", "synthesis/test_quotas.py",
)  # fmt: skip
COMMANDS = (
    ("--help",),
    ("version",),
    ("doctor",),
    ("plan", "quickstart"),
    ("cluster", "placement", "--profile", "a100x64"),
)
OWN_DOCUMENTS = (("init", "docs", "--yes"), ("plan", "run.yaml"))  # in a folder with documents, in this order


def write_documents(folder: Path) -> None:
    """Texts enough for a run config of one's own."""
    folder.mkdir(parents=True)
    for page in range(40):
        text = f"# Page {page}\n\nHow leave is applied for in department {page}, under item {3 * page} of the menu.\n"
        (folder / f"page{page}.md").write_text(text)


def interpreter(version: str) -> str | None:
    """An interpreter of this version that starts: on the PATH, or one that pyenv keeps."""
    candidates = [shutil.which(f"python{version}")]
    if shutil.which("pyenv"):
        root = _output("pyenv", "root")
        names = [
            name for name in _output("pyenv", "versions", "--bare").split() if name.startswith(f"{version}.")
        ]
        candidates += [f"{root}/versions/{name}/bin/python" for name in names]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def smoke(python: str, version: str, wheel: Path, folder: Path) -> list[str]:
    """Install, run, test; names of the steps that failed."""
    environment, empty = folder / f"venv-{version}", folder / f"empty-{version}"
    empty.mkdir()
    binaries = environment / "bin"
    pip = [str(binaries / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    locks = [str(ROOT / f"cluster/requirements-{name}.lock") for name in (f"cpu-{version}", "dev")]
    constraints = [word for lock in locks for word in ("--constraint", lock)]
    install = [
        [python, "-m", "venv", str(environment)],
        [*pip, *constraints, *LIGHT, *TOOLS],
        [*pip, "--no-deps", str(wheel)],
    ]
    for command in install:
        if not _passes(command, folder):
            return [f"{version}: {' '.join(command[:4])}"]
    failed = [
        f"{version}: embedloom {' '.join(words)}"
        for words in COMMANDS
        if not _passes([str(binaries / "embedloom"), *words], empty)
    ]
    own = folder / f"own-{version}"
    write_documents(own / "docs")
    failed += [
        f"{version}: embedloom {' '.join(words)}"
        for words in OWN_DOCUMENTS
        if not _passes([str(binaries / "embedloom"), *words], own)
    ]
    if any(empty.iterdir()):
        failed.append(
            f"{version}: files in the working folder: {sorted(path.name for path in empty.iterdir())}"
        )
    tests = [
        str(binaries / "python"), "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider",
        "--override-ini", "pythonpath=tests", *(f"tests/{name}" for name in TESTS),
    ]  # fmt: skip
    return failed if _passes(tests, ROOT) else [*failed, f"{version}: unit tests"]


def _passes(command: Sequence[str], folder: Path) -> bool:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(
            f"exit code {done.returncode}: {' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    elif command[1:3] == ["-m", "pytest"]:
        print(done.stdout.splitlines()[-1])
    return done.returncode == 0


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main(versions: Sequence[str]) -> int:
    """Run every version that is here."""
    failed = []
    with tempfile.TemporaryDirectory(prefix="embedloom-smoke-") as scratch:
        found = {version: interpreter(version) for version in versions}
        wheel = build(Path(scratch))[1] if any(found.values()) else None
        for version, python in found.items():
            if python is None or wheel is None:
                print(f"Python {version} is not installed here: left out")
                continue
            print(f"Python {version}: {python}, {wheel.name}")
            failed += smoke(python, version, wheel, Path(scratch))
    print("\n".join(["failed:", *failed]) if failed else "smoke: passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
