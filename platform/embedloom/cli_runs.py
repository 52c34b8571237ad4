"""The verbs about runs that are there: ``explain``, ``diff``, ``replay``, ``ledger``."""

from pathlib import Path
from typing import Annotated

import typer

from embedloom.cli_options import ClusterFile

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List what is stale and stop.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show all that Ray and other libraries print.")]


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
    from embedloom.lineage import explain_subject
    from embedloom.storage import Place

    print(explain_subject(subject, row_id, Place(str(runs))))


def diff(run_a: RunFolder, run_b: RunFolder) -> None:
    """Two runs side by side: config, artefacts that differ and why, counts, scores."""
    from embedloom.lineage.comparison import diff as compare
    from embedloom.storage import Place

    print(compare(Place(str(run_a)), Place(str(run_b))))


def replay(
    run_folder: RunFolder,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Default: the one it was executed on.")
    ] = None,
    cluster: ClusterFile = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Execute a run again by its own run.json; only what is stale or missing is built."""
    from embedloom.command_output import command_output
    from embedloom.launch import execute, reopen
    from embedloom.lineage.state import state_lines, states

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
    from embedloom.launch import reopen
    from embedloom.pipeline import graph
    from embedloom.plan import keep_ledger
    from embedloom.planning.ledger_file import LEDGER_FILE
    from embedloom.planning.lines import ledger_lines

    run = reopen(str(run_folder), cluster, None)
    found = keep_ledger(run, graph(run))
    if found is None:
        raise ConfigError(
            f"{cluster_file(cluster).with_name(RATES_FILE)}: no such file; it says in which units work is counted"
        )
    print("\n".join(ledger_lines(found)))
    print(f"{run.place.uri}/{LEDGER_FILE}")
