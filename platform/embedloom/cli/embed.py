"""The ``embed`` verb: a run config, or any input with a model and a folder."""

from typing import Annotated, Any

import typer

from embedloom.cli.options import ClusterFile, DryRun, ProfileName, Verbose, option
from embedloom.config.shipped import names_config
from embedloom.errors import ConfigError

_SET_KEYS = {"out": "run.output_dir", "index": "embedding.index.kind"}  # others: embedding.<option>


Source = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG|INPUT",
        help="A run config (.yaml), or texts: a corpus artefact, a file, folder or 'glob' of .parquet or .jsonl[.gz], "
        "or a folder of documents (PDF, Office, HTML, Markdown and others).",
    ),
]
Model = Annotated[
    str | None, option("model", "With INPUT: a model folder, .gguf file, Hugging Face id or shipped model.")
]
Trust = Annotated[
    bool, option("trust-remote-code", "With INPUT: run code that lies beside the model's weights.")
]
Out = Annotated[str | None, option("out", "With INPUT: folder of the vectors.")]
StoredType = Annotated[str | None, option("dtype", "float32, float16, int8 or binary; default float32.")]
Dimensions = Annotated[
    int | None, option("dimensions", "Cut vectors to their first dimensions (Matryoshka).")
]
Side = Annotated[str | None, option("side", "query or document; default document.")]
Instruction = Annotated[str | None, option("instruction", "Of queries; default: the model's own.")]
Index = Annotated[str | None, option("index", "Also a FAISS index: flat, ivf or hnsw, with its recall.")]
Lexical = Annotated[
    bool, option("lexical", "Also a BM25 index of the words, for lexical and hybrid searches.")
]
Previous = Annotated[
    str | None,
    option("previous", "Earlier vectors; unchanged texts keep theirs. Those of --out itself: automatic."),
]
Overrides = Annotated[
    list[str] | None,
    option(
        "set",
        "Override a config value; with INPUT, keys of the section embedding; repeatable.",
        metavar="SECTION.KEY=VALUE",
    ),
]


def embed(
    source: Source,
    model: Model = None,
    trust_remote_code: Trust = False,
    out: Out = None,
    dtype: StoredType = None,
    dimensions: Dimensions = None,
    side: Side = None,
    instruction: Instruction = None,
    index: Index = None,
    lexical: Lexical = False,
    previous: Previous = None,
    profile: ProfileName = "local",
    cluster: ClusterFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """A corpus becomes Parquet vectors and, if wanted, a FAISS index.

    embedloom embed CONFIG embeds what the config's section embedding says.

    embedloom embed INPUT --model MODEL --out FOLDER needs no config. A stopped job continues, a changed input
    embeds only what is new.
    """
    given: dict[str, Any] = {
        "model": model, "out": out, "dtype": dtype, "dimensions": dimensions, "side": side,
        "instruction": instruction, "index": index, "previous": previous,
        "lexical": {} if lexical else None,
        "trust_remote_code": trust_remote_code or None,
    }  # fmt: skip
    from embedloom.core.command_output import command_output

    if names_config(source):
        _refuse_options(given)
        from embedloom.pipeline.commands import execute, load

        run = load(source, profile, cluster, overrides or [])
        with command_output(run.place, verbose or dry_run):
            result = execute(run, "embed", dry_run)
        print(result)
        return
    for key in ("model", "out"):
        if given[key] is None:
            raise ConfigError(f"--{key}: needed to embed {source!r}; or give a run config (.yaml)")
    from embedloom.core.storage import Place
    from embedloom.pipeline.model_commands import embed_texts, embedding_config, load_machine

    section = {key: value for key, value in given.items() if key != "out"}
    config = embedding_config({**section, "corpus": source}, overrides or [])
    with command_output(Place("runs/embed"), verbose or dry_run):
        result = embed_texts(config, str(out), load_machine(cluster), profile, dry_run)
    print(result)


def _refuse_options(given: dict[str, Any]) -> None:
    """A run is its file: options that only an INPUT takes would hide from it what was run."""
    for name, value in given.items():
        if value is not None:
            key = _SET_KEYS.get(name, f"embedding.{name}")
            name = name.replace("_", "-")
            raise ConfigError(f"--{name} goes with an INPUT; with a CONFIG use --set {key}={value}")
