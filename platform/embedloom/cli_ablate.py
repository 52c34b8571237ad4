"""The ``ablate`` verb: a grid of runs, one table."""

from pathlib import Path
from typing import Annotated

import typer

from embedloom.cli_options import ClusterFile

Ablation = Annotated[
    Path,
    typer.Argument(
        metavar="ABLATION", help="A grid: a YAML file, or a shipped one by its name, such as ablation_losses."
    ),
]
ProfileName = Annotated[
    str | None, typer.Option("--profile", help="A profile of the cluster config; default: the file's own.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of the file, or of every run; repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be built and stop.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show all that Ray and other libraries print.")]


def ablate(
    ablation: Ablation,
    profile: ProfileName = None,
    cluster: ClusterFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Variants of a run with several seeds, in one table; stages that are alike are built once."""
    from embedloom.launch_ablate import ablate as run_ablation

    print(run_ablation(ablation, profile, cluster, overrides or [], dry_run, verbose))
