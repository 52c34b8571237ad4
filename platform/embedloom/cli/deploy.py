"""The ``deploy`` verb: a new version of the model into a running endpoint."""

from typing import Annotated, Any

import typer

from embedloom.cli.options import ClusterFile


def _option(name: str, help_text: str, **settings: Any) -> Any:
    return typer.Option(f"--{name}", help=help_text, **settings)


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, .gguf file, Hugging Face id or shipped model.")
]
Canary = Annotated[
    float, _option("canary", "Share of requests the new version answers while watched.", min=0, max=1)
]
Shadow = Annotated[
    bool,
    _option("shadow", "The new version gets copies of requests; its answers are compared, never returned."),
]
Watch = Annotated[float, _option("watch", "Seconds to watch before promotion.", min=0)]
Stay = Annotated[bool, _option("stay", "Watch and report; never promote.")]
NewVectors = Annotated[
    bool,
    _option("new-vectors", "Clients embed their corpora again: allows another contract; implies --shadow."),
]
Corpus = Annotated[str | None, _option("corpus", "The searched corpus, embedded by the new model.")]
Documents = Annotated[str | None, _option("documents", "With --corpus: what it was embedded from.")]
Verdict = Annotated[
    str | None,
    _option(
        "verdict", "The gate's, of a model that embedloom did not make; default: gate.json with the model."
    ),
]
Trust = Annotated[bool, _option("trust-remote-code", "Run code that lies beside the new model's weights.")]
Port = Annotated[int | None, _option("port", "Of the endpoint on this machine; default: the only one.")]
ProfileName = Annotated[str, _option("profile", "A profile of the cluster config.")]
Rules = Annotated[
    list[str] | None,
    _option(
        "set",
        "Rules of the trial: max_error_share, max_latency_ratio, latency_slack_seconds, min_overlap, min_requests, "
        "min_compared; or require_gate; repeatable.",
        metavar="KEY=VALUE",
    ),
]
DryRun = Annotated[bool, _option("dry-run", "Print what would be deployed where and stop.")]
Verbose = Annotated[bool, _option("verbose", "Show all that Ray and other libraries print.")]


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
