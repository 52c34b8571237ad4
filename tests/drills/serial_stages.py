"""Small stages that a drill builds without Ray: what they read, and how they are built as the spine builds them."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from drills.synthesis_corpus import section, write_corpus
from embedloom.config.cluster import PoolConfig
from embedloom.config.corpus import CorpusConfig
from embedloom.config.embedding import EmbeddingConfig
from embedloom.config.merging import MergingConfig
from embedloom.config.mining import MiningConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter, fingerprint
from embedloom.core.storage import Place
from fakes import make_tiny_encoder, make_tiny_llama
from fakes_engines import MumblingEngine
from fakes_merging import shard, variant
from fakes_mining import WORDS, make_corpus, pair_row, random_documents

POOL = PoolConfig(cpus=1)


def prepare(folder: Path) -> None:
    """Everything the stages read; in a process of its own, as torch must not have run where others fork from."""
    model = tiny_model(folder)
    for seed in range(3):
        shard(variant(model, folder / f"candidate-{seed}", seed), 3)
    documents = random_documents(60)
    pairs = [
        pair_row(f"n{n:02d}", " ".join(documents[n]["text"].split()[:3]), documents[n]["id"])
        for n in range(40)
    ]
    make_corpus(folder / "documents", documents, pairs, cuts=3)
    write_corpus(folder / "seeds")
    draw = random.Random(0)
    rows = [
        {"id": f"r{n}", "text": " ".join(draw.choices(WORDS, k=draw.randint(3, 40))) + f" {n}."}
        for n in range(300)
    ]
    (folder / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_model(folder: Path) -> Path:
    """An untrained encoder of two layers, and the Llama it is made of beside it."""
    return make_tiny_encoder(make_tiny_llama(folder / "llama"), folder / "model")


def _once(
    place: Place, kind: str, inputs: dict[str, str], make: Callable[[ArtefactWriter], Artefact]
) -> Artefact:
    """Skip what is finished, go on with what was interrupted, as ``pipeline.build_missing`` does."""
    wanted = fingerprint(kind, "drill", inputs)
    finished = Artefact.find(place, wanted)
    if finished is None:
        return make(ArtefactWriter(place, kind, "drill", inputs, "local"))
    finished.tidy()
    return finished


def corpus(inputs: Path, out: Path) -> None:
    """Read, deduplicate, chunk and split 300 texts."""
    from embedloom.corpus.stage import build_corpus

    config = CorpusConfig.model_validate(
        {
            "sources": [{"format": "jsonl", "path": str(inputs / "raw.jsonl"), "id_column": "id"}],
            "min_characters": 20, "chunk_tokens": 64,
        }
    )  # fmt: skip
    _once(
        Place(str(out / "corpus")),
        "corpus",
        {},
        lambda writer: build_corpus(config, 7, inputs / "llama", writer),
    )


def synthesis(inputs: Path, out: Path) -> None:
    """Two generators, seed queries and short pairs from brainstormed tasks; three answers of ten are refused."""
    from embedloom.synthesis.stage import synthesize

    seeds = Artefact.open(Place(str(inputs / "seeds")), "corpus")
    models = {name: lambda: inputs for name in ("first", "second")}

    def make(writer: ArtefactWriter) -> Artefact:
        return synthesize(
            section(48, 8, quick=False), 7, seeds, POOL, writer, models, engine_factory=MumblingEngine
        )

    _once(Place(str(out / "synthesis")), "synthesis", {"corpus": seeds.fingerprint}, make)


def mining(inputs: Path, out: Path) -> None:
    """Candidates by a tiny teacher, then examples."""
    from embedloom.mining.stage import build_examples, mine, teacher_sources

    config = MiningConfig.model_validate(
        {
            "teachers": [str(inputs / "model")], "top_k": 12, "selection": {"negatives": 3, "margin_ratio": 0.99},
            "max_query_tokens": 96, "max_document_tokens": 80, "shard_rows": 16,
        }
    )  # fmt: skip
    documents = Artefact.open(Place(str(inputs / "documents")), "corpus")
    mined = _once(
        Place(str(out / "mining")), "mining", {"corpus": documents.fingerprint},
        lambda writer: mine(config, documents, [], teacher_sources(config), POOL, writer),
    )  # fmt: skip
    _once(
        Place(str(out / "examples")), "examples", {"mining": mined.fingerprint},
        lambda writer: build_examples(config, mined, documents, None, POOL, writer),
    )  # fmt: skip


def merging(inputs: Path, out: Path) -> None:
    """Three models in three weight files each."""
    from embedloom.merging.stage import merge

    models = {f"c{seed}": Place(str(inputs / f"candidate-{seed}")) for seed in range(3)}
    _once(
        Place(str(out / "merged")), "model", {}, lambda writer: merge(MergingConfig(), models, None, writer)
    )


def embedding(inputs: Path, out: Path) -> None:
    """Vectors of the documents in small shards."""
    from embedloom.encoder.registry import open_model
    from embedloom.retrieval.corpora import embed_artefact

    config = EmbeddingConfig(shard_rows=8)
    source = str(inputs / "documents")
    _once(
        Place(str(out / "vectors")), "vectors", {},
        lambda writer: embed_artefact(config, source, open_model(inputs / "model"), POOL, writer),
    )  # fmt: skip


STAGES: dict[str, Callable[[Path, Path], None]] = {
    "corpus": corpus, "synthesis": synthesis, "mining": mining, "merging": merging, "embedding": embedding,
}  # fmt: skip
