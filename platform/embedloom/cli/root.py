"""``embedloom``: parse, validate, call one function, print where the result is.

The last line on stdout is the artefact's path; progress goes to stderr. Exit codes: 0 done, 1 failed while
running, 2 bad config or data.
"""

import io
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from embedloom import __version__
from embedloom.cli.cluster import app as cluster_app
from embedloom.cli.config import app as config_app
from embedloom.cli.deploy import deploy
from embedloom.cli.embed import embed
from embedloom.cli.init import init
from embedloom.cli.merge import merge_models
from embedloom.cli.options import ClusterFile, DryRun, Overrides, ProfileName, Verbose
from embedloom.cli.rank import gate, leaderboard
from embedloom.cli.runs import ablate, diff, explain, ledger, replay
from embedloom.cli.serve import serve
from embedloom.errors import EmbedloomError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(cluster_app, name="cluster")
app.add_typer(config_app, name="config")

Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="A run config: a YAML file, or a shipped one by its name, such as quickstart."
    ),
]


class OnInterrupt(StrEnum):
    """What Ctrl-C does to a submitted job."""

    stop = "stop"
    detach = "detach"


LOCAL = "local"


def _stage(
    verb: str | None,
    config: Path,
    profile: str,
    cluster: Path | None,
    overrides: list[str] | None,
    dry_run: bool,
    verbose: bool,
) -> None:
    """Shared body of the pipeline verbs."""
    from embedloom.core.command_output import command_output
    from embedloom.pipeline.commands import execute, load

    run = load(config, profile, cluster, overrides or [])
    with command_output(run.place, verbose or dry_run):
        result = execute(run, verb, dry_run)
    print(result)


_STAGE_VERBS = {
    "run": "The whole pipeline; finished stages are skipped by fingerprint.",
    "synthesize": "LLMs write queries for seed documents (builds the corpus first if it is missing).",
    "mine": "A teacher finds scored candidates and hard negatives for every pair.",
    "train": "All candidates, all stages, on Ray Train and DeepSpeed.",
    "merge": "Candidates become one model.",
    "reranker": "A cross-encoder: trained, scored against no reranking, judged (config section reranker).",
    "evaluate": "Base, candidates, merged model and baselines on the held-out tasks.",
}


def _add_stage_verb(verb: str, help_text: str) -> None:
    """The pipeline verbs differ in name only."""

    def command(
        config: Config,
        profile: ProfileName = LOCAL,
        cluster: ClusterFile = None,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        verbose: Verbose = False,
    ) -> None:
        _stage(None if verb == "run" else verb, config, profile, cluster, overrides, dry_run, verbose)

    app.command(verb, help=help_text)(command)


for _verb, _help in _STAGE_VERBS.items():
    _add_stage_verb(_verb, _help)
app.command("init")(init)
app.command("ablate")(ablate)
app.command("embed")(embed)
app.command("merge-models")(merge_models)
app.command("gate")(gate)
app.command("leaderboard")(leaderboard)
app.command("serve")(serve)
app.command("explain")(explain)
app.command("diff")(diff)
app.command("replay")(replay)
app.command("ledger")(ledger)
app.command("deploy")(deploy)


@app.command()
def plan(
    config: Config,
    profile: ProfileName = LOCAL,
    cluster: ClusterFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", metavar="RUN", help="Predict by the ledger of this finished run."),
    ] = None,
) -> None:
    """What would run where, how long it takes and what it costs; starts nothing."""
    from embedloom.core.storage import Place
    from embedloom.pipeline.commands import load
    from embedloom.pipeline.plan import plan_table
    from embedloom.planning.work import read_ledger

    run = load(config, profile, cluster, overrides or [])
    print(plan_table(run, None if calibrate is None else read_ledger(Place(str(calibrate)))))
    print(run.place.uri)


@app.command()
def submit(
    config: Config,
    profile: ProfileName = LOCAL,
    cluster: ClusterFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    stage: Annotated[str | None, typer.Option("--stage", help="One stage instead of the whole run.")] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Dashboard of a running cluster, http://host:8265.")
    ] = None,
    on_interrupt: Annotated[
        OnInterrupt, typer.Option("--on-interrupt", help="What Ctrl-C does to the job.")
    ] = OnInterrupt.stop,
    render: Annotated[
        Path | None,
        typer.Option(
            "--render-job", metavar="FILE", help="Write a RayJob for KubeRay instead of submitting."
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """The same through Ray Jobs: log streamed, exit code kept; the same command joins a job that still runs."""
    from embedloom.pipeline.commands import load
    from embedloom.pipeline.submit import SubmitOptions, render_job, submit_run

    run = load(config, profile, cluster, overrides or [])
    options = SubmitOptions(
        config, cluster, tuple(overrides or ()), stage, address, on_interrupt.value, verbose
    )
    if render is not None:
        if not dry_run:
            render_job(run, options, render)
        print(render)
        return
    code = submit_run(run, options, dry_run)
    print(run.place.uri)
    raise typer.Exit(code)


@app.command()
def doctor() -> None:
    """What is installed, which engines work here, what to install for more."""
    from embedloom.cluster.doctor import Finding, diagnose, format_findings
    from embedloom.encoder.packaged import REGISTRY

    models = [Finding(name, *model.state(name)) for name, model in REGISTRY.items()]
    print(format_findings(diagnose(models)))


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Entry point: our own errors are a line and where the logs are, anything else keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a result in a script that the terminal's encoding lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except EmbedloomError as error:
        sys.stdout.flush()
        sys.stderr.write("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]) + "\n")
        sys.exit(error.exit_code)
    except Exception as error:
        sys.stdout.flush()
        traceback.print_exception(error)
        sys.exit(1)
    finally:
        # Not imported before it is needed: it brings what reads and writes artefacts, which --help does without.
        if output := sys.modules.get("embedloom.core.command_output"):
            output.end_quietly()


if __name__ == "__main__":
    main()
