"""Options that several verbs take."""

from pathlib import Path
from typing import Annotated

import typer

from embedloom.config.shipped import CLUSTER_ORDER

ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", metavar="FILE", help=f"The cluster config; {CLUSTER_ORDER}.")
]
