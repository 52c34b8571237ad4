"""What the kill drill of the synthesis works on; importable by Ray workers."""

import time
from pathlib import Path

from embedloom.config.synthesis import SynthesisConfig
from embedloom.core.artefacts import MANIFEST_FILE, Artefact, ArtefactWriter
from embedloom.core.schemas import content_id, table_from_rows
from embedloom.core.storage import Place
from fakes_engines import WORDS, MumblingEngine

SECONDS_PER_ANSWER = 0.01


class SleepyEngine(MumblingEngine):
    """Takes its time, and mumbles three answers of ten."""

    def generate(self, requests):
        time.sleep(SECONDS_PER_ANSWER * len(requests))
        return super().generate(requests)


def section(rows: int, shard_rows: int, quick: bool) -> SynthesisConfig:
    """Two generators, a family that reads documents and one that is written from tasks; quick: the first of each."""
    generators = [{"model": "first", "weight": 2}, {"model": "second", "weight": 1}]
    families = [
        {"family": "seed_queries", "rows": rows - rows // 4},
        {"family": "short_short", "rows": rows // 4},
    ]
    return SynthesisConfig.model_validate(
        {
            "generators": generators[:1] if quick else generators,
            "families": families[:1] if quick else families,
            "tasks": {"count": 40},
            "quality": {"language": None, "contamination": None},
            "max_attempts_per_row": 8,
            "shard_rows": shard_rows,
        }
    )


def write_corpus(folder: Path) -> Artefact:
    """Two hundred documents of drawn words."""
    place = Place(str(folder))
    if place.exists(MANIFEST_FILE):
        return Artefact.open(place, "corpus")
    writer = ArtefactWriter(place, "corpus", "c", {}, "local")
    rows = [
        {
            "id": content_id(str(n)),
            "text": f"Document {n}: {' '.join(WORDS[(7 * n + m) % len(WORDS)] for m in range(12))}.",
            "source": "s",
        }
        for n in range(200)
    ]
    place.write_table("documents/train/part-000000.parquet", table_from_rows("documents", rows))
    return writer.commit({"rows": len(rows)})
