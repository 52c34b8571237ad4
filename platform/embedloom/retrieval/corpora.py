"""``embedloom embed``: any corpus to Parquet vectors."""

from pathlib import Path

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.config.resources import PoolConfig
from embedloom.config.use import EmbeddingConfig
from embedloom.instructions import PromptContract
from embedloom.retrieval.embed import embed_corpus
from embedloom.retrieval.embedder import EncoderSource

VECTORS_FOLDER = "vectors"
DOCUMENTS_FOLDER = "documents"
SPLITS = ("train", "dev", "test")


def embed_artefact(
    config: EmbeddingConfig,
    corpus: Artefact,
    model: Path,
    model_id: str,
    pool: PoolConfig,
    out: ArtefactWriter,
) -> Artefact:
    """Embed every document of a corpus artefact, all splits, and commit the vectors.

    Args:
        config: the embedding section.
        corpus: artefact with ``documents/{train,dev,test}``.
        model: model folder.
        model_id: fingerprint of the weights, stamped on the files.
        pool: actors and what each reserves.
        out: writer of the vectors artefact; gets ``vectors/part-*.parquet``.
    """
    folders = [f"{DOCUMENTS_FOLDER}/{split}" for split in SPLITS]
    counts = embed_corpus(
        stage="embed",
        source=corpus.place,
        source_folder=tuple(folder for folder in folders if corpus.place.names(folder, ".parquet")),
        output=out.place,
        done_folder=VECTORS_FOLDER,
        model=EncoderSource(model_id, model, dtype=config.compute_dtype),
        side="document",
        pool=pool,
        shard_rows=config.shard_rows,
        vector_dtype=config.dtype,
    )
    return out.commit(counts, {"model_id": model_id, "contract_hash": PromptContract.load(model).hash})
