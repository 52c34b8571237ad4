"""The ``gate`` and ``leaderboard`` verbs."""

from pathlib import Path
from typing import Annotated

import typer

from embedloom.cli.options import ClusterFile, DryRun, Overrides, ProfileName, Verbose, option
from embedloom.config.shipped import names_config
from embedloom.errors import ConfigError

Contestant = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG|CANDIDATE", help="A run config, whose own models are judged, or a model folder."
    ),
]
Against = Annotated[str | None, option("against", "With CANDIDATE: the model it would replace.")]
RunConfigFile = Annotated[
    Path | None, option("config", "With CANDIDATE: rules, tasks and corpus of this run.")
]
Tasks = Annotated[
    list[str] | None,
    option("task", "With CANDIDATE: local tasks, a BEIR folder, an mteb task or benchmark; repeatable."),
]
Split = Annotated[str, option("split", "Of local tasks: dev or test.")]
Limit = Annotated[int | None, option("limit", "At most so many queries or rows a language.")]
Prompts = Annotated[
    str | None,
    option(
        "prompts",
        "Of mteb tasks: default (what the endpoint sends) or published (the benchmark's own, as its leaderboard has them).",
    ),
]
Pool = Annotated[
    str | None, option("pool", "Scores of models to rank among: Parquet file or mteb results folder.")
]
Trust = Annotated[
    bool,
    option("trust-remote-code", "With CANDIDATE: run code that lies beside the weights of either model."),
]
Out = Annotated[str, option("out", "With CANDIDATE: where results are kept.")]


def gate(
    candidate: Contestant,
    against: Against = None,
    config: RunConfigFile = None,
    task: Tasks = None,
    split: Split = "test",
    limit: Limit = None,
    prompts: Prompts = None,
    pool: Pool = None,
    trust_remote_code: Trust = False,
    out: Out = "runs/gate",
    profile: ProfileName = "local",
    cluster: ClusterFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """May this model be served? Paired tests, Borda, no-regression list, limits.

    Exit codes: 0 passed, 1 refused, 2 bad input. The verdict is kept as gate.json beside weights that
    embedloom made; of any other model in the results' folder, which is printed.
    """
    from embedloom.core.command_output import command_output
    from embedloom.core.storage import Place
    from embedloom.pipeline.commands import load
    from embedloom.pipeline.model_commands import GateRequest, gate_models, gate_run, load_machine

    given = list(overrides or [])
    if names_config(candidate):
        named = (against, config, pool, prompts)
        if any(value is not None for value in named) or task or trust_remote_code:
            raise ConfigError(
                "--against, --config, --task, --prompts, --trust-remote-code and --pool go with a CANDIDATE; a CONFIG says them in gate and evaluation"
            )
        run = load(candidate, profile, cluster, given)
        with command_output(run.place, verbose or dry_run):
            text, code = gate_run(run, dry_run)
    else:
        if against is None:
            raise ConfigError(f"--against: needed to judge {candidate!r}; or give a run config (.yaml)")
        rules = None if config is None else load(config, profile, cluster, [])
        machine = load_machine(cluster) if rules is None else rules.cluster
        request = GateRequest(
            candidate, against, task or [], split, limit, pool, out, given, prompts, trust_remote_code
        )
        with command_output(Place(out), verbose or dry_run):
            text, code = gate_models(request, rules, machine, profile, dry_run)
    print(text)
    raise typer.Exit(code)


def leaderboard(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A run or evaluation folder, an mteb results folder, or a Parquet file of scores.",
        ),
    ],
    pool: Pool = None,
    top: Annotated[int, option("top", "Rows from the first on.", min=1)] = 20,
    partial: Annotated[bool, option("partial", "Count partly scored tasks in the means.")] = False,
    html: Annotated[Path | None, option("html", "Also draw it into this file.")] = None,
) -> None:
    """Borda votes, ranks and means, as mteb's leaderboard computes them."""
    from embedloom.pipeline.model_commands import leaderboard as rank

    print(rank(source, pool, top, partial, html))
