"""The ``embed`` verb: a run config, or any input with a model and a folder."""

from pathlib import Path
from typing import Annotated

import typer

from embedloom.errors import ConfigError

_CONFIG_ENDINGS = (".yaml", ".yml")
_CLUSTER = Path("cluster/cluster.yaml")


def embed(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|INPUT",
            help="A run config (.yaml), or texts: a corpus artefact, a file, folder or 'glob' of .parquet or .jsonl[.gz], "
            "or a folder of .txt and .md files.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="With INPUT: a model folder, .gguf file, Hugging Face id or shipped model."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="With INPUT: folder of the vectors.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16, int8 or binary; default float32.")
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option("--dimensions", help="Cut vectors to their first dimensions (Matryoshka).")
    ] = None,
    side: Annotated[str | None, typer.Option("--side", help="query or document; default document.")] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", help="Of queries; default: the model's own.")
    ] = None,
    index: Annotated[
        str | None, typer.Option("--index", help="Also a FAISS index: flat, ivf or hnsw, with its recall.")
    ] = None,
    previous: Annotated[
        str | None,
        typer.Option(
            "--previous", help="Earlier vectors; unchanged texts keep theirs. Of --out itself: automatic."
        ),
    ] = None,
    profile: Annotated[str, typer.Option("--profile", help="A profile of the cluster config.")] = "local",
    cluster: Annotated[Path, typer.Option("--cluster", help="The cluster config.")] = _CLUSTER,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Override a config value; with INPUT, keys of the section embedding; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """A corpus becomes Parquet vectors and, if wanted, a FAISS index.

    embedloom embed CONFIG embeds what the config's section embedding says.

    embedloom embed INPUT --model MODEL --out FOLDER needs no config. A stopped job continues, a changed input
    embeds only what is new.
    """
    given = {
        "model": model, "dtype": dtype, "dimensions": dimensions, "side": side, "instruction": instruction,
        "index": index, "previous": previous,
    }  # fmt: skip
    if source.endswith(_CONFIG_ENDINGS):
        for key, value in {**given, "out": out}.items():
            if value is not None:
                advice = (
                    "run.output_dir"
                    if key == "out"
                    else "embedding.index.kind"
                    if key == "index"
                    else f"embedding.{key}"
                )
                raise ConfigError(f"--{key} goes with an INPUT; with a CONFIG use --set {advice}={value}")
        from embedloom.launch import execute, load

        print(execute(load(Path(source), profile, cluster, overrides or []), "embed", dry_run))
        return
    for key, needed in (("model", model), ("out", out)):
        if needed is None:
            raise ConfigError(f"--{key}: needed to embed {source!r}; or give a run config (.yaml)")
    from embedloom.launch_embed import embed_texts, embedding_config, load_machine

    config = embedding_config({**given, "corpus": source}, overrides or [])
    print(embed_texts(config, str(out), load_machine(cluster, _CLUSTER), profile, dry_run))
