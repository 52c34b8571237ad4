"""The ``serve`` verb: a run config, or any model, with a corpus to search if wanted."""

from pathlib import Path
from typing import Annotated

import typer

from embedloom.cli.options import ClusterFile, ProfileName, Verbose, option
from embedloom.config.serving import SEARCH_MODES, SearchMode
from embedloom.config.shipped import names_config
from embedloom.errors import ConfigError

_SET_KEYS = {"name": "served_name"}  # others: serving.<option>


Source = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG|MODEL",
        help="A run config (.yaml), or a model folder, .gguf file, Hugging Face id or shipped model.",
    ),
]
Corpus = Annotated[
    str | None, option("corpus", "With MODEL: vectors of `embedloom embed`, searched at /v1/search.")
]
Documents = Annotated[
    str | None, option("documents", "With MODEL: what the corpus was embedded from, to show its texts.")
]
Name = Annotated[
    str | None, option("name", "With MODEL: what clients put into `model`; default: its own name.")
]
Trust = Annotated[bool, option("trust-remote-code", "With MODEL: run code that lies beside its weights.")]
Port = Annotated[int | None, option("port", "With MODEL: default 8000.")]
Ask = Annotated[
    list[str] | None,
    option("ask", "With CONFIG: ask the endpoint, print the nearest documents, stop; repeatable."),
]
Task = Annotated[
    str | None,
    option("task", "With --ask: task type, or a task of the model by name; default: the model's own."),
]
Mode = Annotated[
    str | None,
    option("mode", "With --ask: search by dense, lexical or hybrid; default: the nearest vectors."),
]
Overrides = Annotated[
    list[str] | None,
    option(
        "set",
        "Override a config value; with MODEL, keys of the section serving; repeatable.",
        metavar="SECTION.KEY=VALUE",
    ),
]
DryRun = Annotated[bool, option("dry-run", "Print what would be served and stop.")]
Stop = Annotated[
    str | None,
    option(
        "stop",
        "Stop the endpoint of that name (or port) on this machine, and end what is left where its command was killed.",
        metavar="NAME",
    ),
]


def serve(
    source: Source = None,
    corpus: Corpus = None,
    documents: Documents = None,
    name: Name = None,
    trust_remote_code: Trust = False,
    port: Port = None,
    ask: Ask = None,
    task: Task = None,
    mode: Mode = None,
    profile: ProfileName = "local",
    cluster: ClusterFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    stop: Stop = None,
) -> None:
    """The OpenAI-compatible endpoint and its search page, until Ctrl-C.

    embedloom serve CONFIG serves what the config's section serving says.

    embedloom serve MODEL [--corpus VECTORS] needs no config.
    """
    from embedloom.core.command_output import command_output

    if stop is not None:
        _stop(stop, source, cluster, profile, dry_run)
        return
    if source is None:
        raise ConfigError("CONFIG|MODEL: none is given; allowed: a run config, any model, or --stop NAME")
    given = {
        "corpus": corpus, "documents": documents, "served_name": name, "port": port,
        "trust_remote_code": trust_remote_code or None,
    }  # fmt: skip
    if names_config(source):
        for key, value in given.items():
            if value is not None:
                stated = next((o for o, k in _SET_KEYS.items() if k == key), key)
                raise ConfigError(
                    f"--{stated.replace('_', '-')} goes with a MODEL; with a CONFIG use --set serving.{key}={value}"
                )
        if task is not None and not ask:
            raise ConfigError("--task goes with --ask; what every request gets is serving.default_task")
        searched = _searched_by(mode, ask)
        from embedloom.pipeline.commands import load, serve_run

        run = load(source, profile, cluster, overrides or [])
        with command_output(run.place, verbose or dry_run, resumes=False):
            result = serve_run(run, ask or [], dry_run, task, searched)
        print(result)
        return
    if ask or task is not None or mode is not None:
        raise ConfigError("--ask goes with a CONFIG, whose run has documents to rank")
    from embedloom.core.storage import Place
    from embedloom.pipeline.model_commands import load_machine, serve_model, serving_config

    config = serving_config({**given, "model": source}, overrides or [])
    with command_output(Place("runs/serve"), verbose or dry_run, resumes=False):
        result = serve_model(config, load_machine(cluster), profile, dry_run)
    print(result)


def _searched_by(mode: str | None, ask: list[str] | None) -> SearchMode | None:
    """The stated mode, checked."""
    if mode is None:
        return None
    if not ask:
        raise ConfigError("--mode goes with --ask; what requests get that state none is serving.search.mode")
    for known in SEARCH_MODES:
        if mode == known:
            return known
    raise ConfigError(f"--mode: {mode!r}; allowed: {', '.join(SEARCH_MODES)}")


def _stop(name: str, source: str | None, cluster: Path | None, profile: str, dry_run: bool) -> None:
    from embedloom.pipeline.model_commands import load_machine, stop_endpoint

    if source is not None:
        raise ConfigError(f"--stop: goes without CONFIG or MODEL, and {source!r} is given")
    print(stop_endpoint(name, load_machine(cluster), profile, dry_run))
