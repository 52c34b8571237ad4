"""The sdist and the wheel, built offline from a copy of the project: an old ``build`` folder cannot leak into them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BUILD = "import sys\nfrom setuptools import build_meta\nprint(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(folder: Path) -> tuple[Path, Path]:
    """Build in an empty folder; the unpacked sdist, and the wheel made from it."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "platform", "cluster", "jobs"):
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            shutil.copytree(path, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(path, source)
    shutil.unpack_archive(_run("build_sdist", source, folder), folder, filter="data")
    (unpacked,) = (path for path in folder.glob("embedloom-*") if path.is_dir())
    return unpacked, _run("build_wheel", unpacked, folder)


def _run(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-c", _BUILD, kind, str(out)]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.splitlines()[-1]
