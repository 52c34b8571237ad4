"""The ``deploy`` verb: a new version of the model into a running endpoint."""

from typing import Annotated

import typer

from embedloom.cli.options import ClusterFile, ProfileName, Verbose, option

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, .gguf file, Hugging Face id or shipped model.")
]
Canary = Annotated[
    float, option("canary", "Share of requests the new version answers while watched.", min=0, max=1)
]
Shadow = Annotated[
    bool,
    option("shadow", "The new version gets copies of requests; its answers are compared, never returned."),
]
Watch = Annotated[float, option("watch", "Seconds to watch before promotion.", min=0)]
Stay = Annotated[bool, option("stay", "Watch and report; never promote.")]
NewVectors = Annotated[
    bool,
    option("new-vectors", "Clients embed their corpora again: allows another contract; implies --shadow."),
]
Corpus = Annotated[str | None, option("corpus", "The searched corpus, embedded by the new model.")]
Documents = Annotated[str | None, option("documents", "With --corpus: what it was embedded from.")]
Verdict = Annotated[
    str | None,
    option(
        "verdict", "The gate's, of a model that embedloom did not make; default: gate.json with the model."
    ),
]
Trust = Annotated[bool, option("trust-remote-code", "Run code that lies beside the new model's weights.")]
Port = Annotated[int | None, option("port", "Of the endpoint on this machine; default: the only one.")]
Rules = Annotated[
    list[str] | None,
    option(
        "set",
        "Rules of the trial: max_error_share, max_latency_ratio, latency_slack_seconds, min_overlap, min_requests, "
        "min_compared; or require_gate; repeatable.",
        metavar="KEY=VALUE",
    ),
]
DryRun = Annotated[bool, option("dry-run", "Print what would be deployed where and stop.")]


def deploy(
    model: Model,
    canary: Canary = 0.1,
    shadow: Shadow = False,
    watch: Watch = 60.0,
    stay: Stay = False,
    new_vectors: NewVectors = False,
    corpus: Corpus = None,
    documents: Documents = None,
    verdict: Verdict = None,
    trust_remote_code: Trust = False,
    port: Port = None,
    profile: ProfileName = "local",
    cluster: ClusterFile = None,
    overrides: Rules = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Put a new version of the model into a running endpoint, carefully.

    The gate's verdict and golden vectors come first; then the new version answers a share of the requests and is taken
    away by itself on errors, latency or drift. Exit codes: 0 promoted, 1 rolled back, 2 bad input.
    """
    from embedloom.core.command_output import command_output
    from embedloom.core.storage import Place
    from embedloom.pipeline.model_commands import DeployCommand, deploy_model, load_machine, trial_rules

    rules, require_gate = trial_rules(watch, overrides or [])
    command = DeployCommand(
        model,
        canary,
        shadow,
        stay,
        new_vectors,
        corpus,
        documents,
        port,
        rules,
        require_gate,
        verdict,
        trust_remote_code,
    )
    with command_output(Place("runs/deploy"), verbose or dry_run, resumes=False):
        text, code = deploy_model(command, load_machine(cluster), profile, dry_run)
    print(text)
    raise typer.Exit(code)
