"""Where a command's configs are looked up: files of the user's first, then those that ship in the package.

``embedloom/shipped/`` has the cluster profiles, the rates and the run configs. In the repository they are links to
``cluster/`` and ``jobs/configs/``; a built wheel holds the files themselves.
"""

import difflib
from pathlib import Path

from embedloom.errors import ConfigError

CONFIG_ENDINGS = (".yaml", ".yml")
CLUSTER_FILE = "cluster.yaml"
WORKING_FOLDER_CLUSTER = Path("cluster") / CLUSTER_FILE
CLUSTER_ORDER = (
    f"default: {CLUSTER_FILE} beside the run config, else {WORKING_FOLDER_CLUSTER} in the working folder, else the "
    "shipped profiles"
)
_SHIPPED = Path(__file__).parents[1] / "shipped"
SHIPPED_CLUSTER = _SHIPPED / CLUSTER_FILE


def shipped_configs() -> dict[str, Path]:
    """File by short name, such as ``quickstart``."""
    return {path.stem: path for path in sorted((_SHIPPED / "configs").glob("*.yaml"))}


def config_file(argument: str | Path) -> Path:
    """The file that a CONFIG argument means: a file that is there, else the shipped config of that name.

    Raises:
        ConfigError: neither; with the nearest shipped name.
    """
    path, shipped = Path(argument), shipped_configs()
    if path.is_file():
        return path
    if str(argument) in shipped:
        return shipped[str(argument)]
    name = path.stem if path.suffix in CONFIG_ENDINGS else str(argument)
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"; the nearest shipped config is {near[0]!r}" if near else ""
    raise ConfigError(
        f"{argument}: no such config file{hint}; allowed: a file, or the name of a shipped config: {', '.join(shipped)}"
    )


def names_config(argument: str) -> bool:
    """Whether an argument that may be a config or something else (a model, texts) is a config.

    By its ending; a shipped name counts only where no file or folder has that name.
    """
    return argument.endswith(CONFIG_ENDINGS) or (
        argument in shipped_configs() and not Path(argument).exists()
    )


def cluster_file(given: Path | None, config: Path | None = None) -> Path:
    """The cluster config of a command, in the order of ``CLUSTER_ORDER``.

    Args:
        given: the option ``--cluster``; it is not looked for anywhere else.
        config: the run config, as ``config_file`` found it; None for commands without one.
    """
    if given is not None:
        return given
    beside = [] if config is None else [config.parent / CLUSTER_FILE]
    found = (path for path in (*beside, WORKING_FOLDER_CLUSTER) if path.is_file())
    return next(found, SHIPPED_CLUSTER)
