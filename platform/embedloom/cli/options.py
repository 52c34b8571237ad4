"""Options that several verbs take."""

from pathlib import Path
from typing import Annotated, Any

import typer

from embedloom.config.shipped import CLUSTER_ORDER


def option(name: str, help_text: str, **settings: Any) -> Any:
    """An option ``--name``."""
    return typer.Option(f"--{name}", help=help_text, **settings)


ClusterFile = Annotated[
    Path | None, option("cluster", f"The cluster config; {CLUSTER_ORDER}.", metavar="FILE")
]
ProfileName = Annotated[str, option("profile", "A profile of the cluster config.")]
Overrides = Annotated[
    list[str] | None, option("set", "Override a config value; repeatable.", metavar="SECTION.KEY=VALUE")
]
DryRun = Annotated[bool, option("dry-run", "Print the plan and stop.")]
Verbose = Annotated[bool, option("verbose", "Show all that Ray and other libraries print.")]
