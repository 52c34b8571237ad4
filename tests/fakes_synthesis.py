"""A corpus of sixty short documents, and the synthesis stage run on it with engines that answer at once."""

from pathlib import Path
from typing import Any

from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import SynthesisConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.schemas import content_id, table_from_rows
from embedloom.core.storage import Place
from embedloom.synthesis.stage import synthesize
from fakes_engines import WORDS, FakeEngine

POOL = PoolConfig(cpus=1)
# The fake writes English words whatever language it is asked for, and labels of the same words as its texts.
QUALITY = {"language": None, "label_leak": False, "contamination": None}


def write_corpus(folder: Path) -> Artefact:
    """60 documents of which five hold questions, and one held out."""
    place = Place(str(folder))
    writer = ArtefactWriter(place, "corpus", "c", {}, "local")
    rows = []
    for n in range(60):
        text = f"Document {n} tells about {' '.join(WORDS[(7 * n + m) % len(WORDS)] for m in range(12))}."
        if n % 12 == 0:
            text += f"\n\nQuestion: Which number does document {n} have? Answer: {n}"
        rows.append({"id": content_id(str(n)), "text": text, "source": "s"})
    place.write_table("documents/train/part-000000.parquet", table_from_rows("documents", rows[:33]))
    place.write_table("documents/train/part-000001.parquet", table_from_rows("documents", rows[33:]))
    held_out = [{"id": content_id("held out"), "text": "held out", "source": "s"}]
    place.write_table("documents/test/part-000000.parquet", table_from_rows("documents", held_out))
    return writer.commit({"rows": 61})


def run_stage(corpus: Artefact, folder: Path, settings: SynthesisConfig, **arguments: Any) -> Artefact:
    out = ArtefactWriter(
        Place(str(folder / "out")), "synthesis", "c", {"corpus": corpus.fingerprint}, "local"
    )
    for name in ("first", "second"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    models = {name: lambda name=name: folder / name for name in ("first", "second")}
    arguments = {"engine_factory": FakeEngine, "pool": POOL, "models": models} | arguments
    return synthesize(settings, 42, corpus, out=out, **arguments)


def pairs_of(artefact: Artefact) -> list[dict[str, Any]]:
    return artefact.place.read_tables("pairs", "pairs").to_pylist()
