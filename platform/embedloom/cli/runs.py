"""The verbs about several runs, or about runs that are there: ``ablate``, ``explain``, ``diff``, ``replay``, ``ledger``."""

from pathlib import Path
from typing import Annotated

import typer

from embedloom.cli.options import ClusterFile, Verbose

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.")]
ReplayDryRun = Annotated[bool, typer.Option("--dry-run", help="List what is stale and stop.")]


def explain(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="RUN|ARTEFACT|URL",
            help="A run folder, an artefact's or model's folder, or an endpoint such as http://127.0.0.1:8000/v1.",
        ),
    ],
    row_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Id of a vector, document, pair or example.")
    ] = None,
    runs: Annotated[
        Path, typer.Option("--runs", help="Folder of runs, where an endpoint's model is looked for.")
    ] = Path("runs"),
) -> None:
    """Lineage: from the model back to corpus, prompts, seeds and code."""
    from embedloom.core.storage import Place
    from embedloom.pipeline.lineage import explain_subject

    print(explain_subject(subject, row_id, Place(str(runs))))


def diff(run_a: RunFolder, run_b: RunFolder) -> None:
    """Two runs side by side: config, artefacts that differ and why, counts, scores."""
    from embedloom.core.storage import Place
    from embedloom.pipeline.lineage import diff as compare

    print(compare(Place(str(run_a)), Place(str(run_b))))


def replay(
    run_folder: RunFolder,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Default: the one it was executed on.")
    ] = None,
    cluster: ClusterFile = None,
    dry_run: ReplayDryRun = False,
    verbose: Verbose = False,
) -> None:
    """Execute a run again by its own run.json; only what is stale or missing is built."""
    from embedloom.core.command_output import command_output
    from embedloom.pipeline.commands import execute, reopen
    from embedloom.pipeline.graph import state_lines, states

    run = reopen(str(run_folder), cluster, profile)
    print("\n".join(state_lines(states(run))))
    if dry_run:
        print(run.place.uri)
        return
    with command_output(run.place, verbose):
        result = execute(run, None, dry_run=False)
    print(result)


def ledger(run_folder: RunFolder, cluster: ClusterFile = None) -> None:
    """What each stage took beside what was planned; writes ledger.json, which `plan --calibrate` reads."""
    from embedloom.config.rates import RATES_FILE
    from embedloom.config.shipped import cluster_file
    from embedloom.errors import ConfigError
    from embedloom.pipeline.commands import reopen
    from embedloom.pipeline.graph import graph
    from embedloom.pipeline.plan import keep_ledger
    from embedloom.planning.ledger import ledger_lines
    from embedloom.planning.work import LEDGER_FILE

    run = reopen(str(run_folder), cluster, None)
    found = keep_ledger(run, graph(run))
    if found is None:
        raise ConfigError(
            f"{cluster_file(cluster).with_name(RATES_FILE)}: no such file; it says in which units work is counted"
        )
    print("\n".join(ledger_lines(found)))
    print(f"{run.place.uri}/{LEDGER_FILE}")


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
AblateDryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be built and stop.")]


def ablate(
    ablation: Ablation,
    profile: ProfileName = None,
    cluster: ClusterFile = None,
    overrides: Overrides = None,
    dry_run: AblateDryRun = False,
    verbose: Verbose = False,
) -> None:
    """Variants of a run with several seeds, in one table; stages that are alike are built once."""
    from embedloom.pipeline.ablation import ablate as run_ablation

    print(run_ablation(ablation, profile, cluster, overrides or [], dry_run, verbose))
