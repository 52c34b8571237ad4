"""What a job takes with it: the project folder without results, environments and caches.

``cluster/runtime_env.yaml`` is this dictionary for people who type ``ray job submit`` themselves.
"""

from pathlib import Path
from typing import Any

# Uploads are limited to 512 MiB, and a corpus or checkpoint in the package would be copied to every node.
EXCLUDES = (
    ".git/", ".venv/", ".bench/", ".hypothesis/", ".mypy_cache/", ".pytest_cache/", ".ruff_cache/",
    "runs/", "build/", "dist/", "cluster/rendered/", "**/__pycache__/", "*.egg-info/",
)  # fmt: skip


def job_runtime_env(working_dir: Path | None = None) -> dict[str, Any]:
    """The runtime_env of a job.

    ``PYTHONPATH`` and not ``py_modules``: a relative entry is found by driver and workers alike, because both
    start in the unpacked working directory.

    Args:
        working_dir: the project root; None leaves it to ``ray job submit --working-dir``.
    """
    content: dict[str, Any] = {"env_vars": {"PYTHONPATH": "platform"}, "excludes": list(EXCLUDES)}
    return content if working_dir is None else {"working_dir": str(working_dir), **content}
