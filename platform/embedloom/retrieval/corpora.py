"""``embedloom embed``: any corpus to Parquet vectors and, if wanted, a FAISS index; equal and earlier texts are embedded once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.compute.shards import PART_PATTERN, Handling, parquet_rows, run_here, run_tasks, stream
from embedloom.config.cluster import PoolConfig
from embedloom.config.embedding import EmbeddingConfig, IndexConfig, LexicalConfig
from embedloom.core.artefacts import MANIFEST_FILE, Artefact, ArtefactWriter
from embedloom.core.model_folder import ModelFolder
from embedloom.core.progress import Progress, note
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place, absolute
from embedloom.encoder.tokenizer import InstructionTooLong, check_room, load_tokenizer
from embedloom.errors import ConfigError, DataError
from embedloom.retrieval.embedder import (
    Embedder,
    EmbedderSource,
    EncoderSource,
    share_weights,
    taken_cuts,
    weights_of,
)
from embedloom.retrieval.identity import aside_of
from embedloom.retrieval.index import build_index, require_faiss
from embedloom.retrieval.inputs import (
    GROUP_ROWS,
    REGROUPED_FOLDER,
    Cutter,
    TextSource,
    check_instruction,
    copy_name,
    largest_group,
    open_input,
    regroup,
)
from embedloom.retrieval.ledger import (
    OWN_FOLDER,
    ROWS_FOLDER,
    VECTORS_FOLDER,
    Ledger,
    Numbers,
    open_ledger,
    origin_column,
    text_digest,
)
from embedloom.retrieval.lexical import AUTO, Analyzer, build_lexical, texts_at
from embedloom.retrieval.search import check_vectors
from embedloom.retrieval.stored import (
    SCALE_COLUMN,
    Matrix,
    dequantize,
    final_table,
    quantize,
    shorten,
    vector_columns,
)
from embedloom.retrieval.tuning import LEAST_QUERIES, judged_queries, tune
from embedloom.retrieval.vector_files import (
    CONTRACT_KEY,
    CUT_KEYS,
    MODEL_KEY,
    TOKENS_KEY,
    cost_counts,
    cost_metadata,
    cut_line,
)

# Shards that take vectors from elsewhere: from an equal text in another shard, or from an earlier artefact.


_CACHED_PARTS = 64  # vector files kept in memory


class _Finished:
    """Vector columns of finished rows by number: of this build, or below zero of the earlier artefact."""

    def __init__(
        self, ledger: Ledger, out: Place, previous: Place | None, files: Sequence[tuple[str, int]]
    ) -> None:
        self._ledger, self._out, self._previous = ledger, out, previous
        self._before = [name for name, _ in files]
        self._ends = np.cumsum([rows for _, rows in files], dtype=np.int64)
        self._table = lru_cache(maxsize=_CACHED_PARTS)(self._read)

    def take(self, origins: Numbers) -> pa.Table:
        """Columns vector and scale of these rows, in this order; schema metadata of one of the files."""
        files = np.where(
            origins >= 0,
            origins // self._ledger.shard_rows,
            -1 - np.searchsorted(self._ends, -1 - origins, side="right"),
        )
        tables, places = [], []
        for file in np.unique(files):
            here = np.flatnonzero(files == file)
            tables.append(self._rows(int(file), origins[here]))
            places.append(here)
        order = np.argsort(np.concatenate(places))
        return pa.concat_tables(tables).take(pa.array(order))

    def _rows(self, file: int, origins: Numbers) -> pa.Table:
        table, offsets = self._table(file)
        if file >= 0:
            wanted = origins - file * self._ledger.shard_rows
            rows = wanted if offsets is None else np.searchsorted(offsets, wanted)
        else:
            first = self._ends[-2 - file] if file < -1 else 0
            rows = -1 - origins - first
        return table.take(pa.array(rows))

    def _read(self, file: int) -> tuple[pa.Table, Numbers | None]:
        """Vectors of a file and, if it holds only a shard's own rows, their offsets in the shard."""
        offsets = None
        if file < 0:
            assert self._previous is not None  # noqa: S101 - the ledger was opened with the same artefact
            table = self._previous.read_table(self._before[-1 - file])
        elif self._out.exists(f"{OWN_FOLDER}/{PART_PATTERN.format(file)}"):
            table = self._out.read_table(f"{OWN_FOLDER}/{PART_PATTERN.format(file)}")
            offsets = np.asarray(table.column("offset"))
        else:
            table = self._out.read_table(f"{VECTORS_FOLDER}/{PART_PATTERN.format(file)}")
        return table.select([n for n in ("vector", SCALE_COLUMN) if n in table.column_names]), offsets


_FILLED_TOGETHER = 16  # shards of a task, which read the files of earlier ones they take vectors from once


def fill_in(stage: str, ledger: Ledger, out: Place, previous: Place | None) -> None:
    """Put together the shards that take vectors from elsewhere; all own vectors must be there."""
    done = set(out.names(VECTORS_FOLDER, ".parquet"))
    missing = [n for n, part in enumerate(ledger.parts) if f"{VECTORS_FOLDER}/{part}" not in done]
    if not missing:
        return
    note(stage, f"filling in shared vectors of {len(missing)} of {len(ledger.rows)} shards")
    files = parquet_rows(previous, VECTORS_FOLDER) if previous else []
    chunks = [missing[start : start + _FILLED_TOGETHER] for start in range(0, len(missing), _FILLED_TOGETHER)]
    tasks = run_tasks if len(chunks) > 1 else run_here
    for _ in tasks(stage, _fill_shards, chunks, ledger, out, previous, files, cpus=1.0):
        pass


def _fill_shards(
    shards: Sequence[int],
    ledger: Ledger,
    out: Place,
    previous: Place | None,
    files: Sequence[tuple[str, int]],
) -> None:
    finished = _Finished(ledger, out, previous, files)
    for shard in shards:
        part = PART_PATTERN.format(shard)
        rows = out.read_table(f"{ROWS_FOLDER}/{part}")
        table = finished.take(origin_column(rows))
        cost = (TOKENS_KEY, *CUT_KEYS)
        metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key not in cost}
        own = (
            out.parquet_footer(f"{OWN_FOLDER}/{part}")[0].metadata
            if ledger.own[shard]
            else {TOKENS_KEY: b"0"}
        )
        metadata |= {key: own[key] for key in cost if key in own}
        table = table.add_column(0, "id", rows.column("id"))
        out.write_table(f"{VECTORS_FOLDER}/{part}", final_table(table, metadata))


# Vectors of a ledger's rows: new texts go through the model shard by shard, then shared vectors are filled in.
#
# A shard whose texts are all its own goes straight into ``vectors``. Of the others the own vectors go into ``own``,
# and when all are there, every such shard is put together from ``own``, ``vectors`` and the earlier artefact. A
# killed build keeps every finished file of both folders.


_DTYPE_KEY, _SIDE_KEY, _DIMENSION_KEY = b"dtype", b"side", b"dimension"


def checked_vectors(
    embedder: Embedder,
    name: str,
    config: EmbeddingConfig,
    normalize: bool,
    texts: Sequence[str],
    ids: Any = None,
) -> tuple[Matrix, list[int]]:
    """Vectors float32 [len(texts), d] as a section wants them, before they get their stored type, and each text's tokens.

    Args:
        embedder: the loaded model.
        name: of the model, for errors.
        config: side, task, instruction, dimensions and stored type.
        normalize: whether the model's vectors have unit length.
        texts: none empty.
        ids: of the texts, for errors; None names the row.

    Raises:
        DataError: a vector that is zero or not finite, also once it is rounded to the stored type.
        ConfigError: dimensions that the model does not have.
    """
    vectors, tokens = embedder.embed(
        texts, config.side, [config.task_type] * len(texts), [config.instruction] * len(texts)
    )
    vectors = shorten(vectors, config.dimensions, normalize)
    check_vectors(vectors, f"model {name}", ids)
    if config.dtype == "float16":  # a value beyond 65504 becomes infinite, a tiny vector zero
        check_vectors(dequantize(*quantize(vectors, config.dtype)), f"model {name}, as float16", ids)
    return vectors, tokens


class RowsWorker:
    """Actor that embeds the new texts of one shard."""

    def __init__(self, source: EmbedderSource, config: EmbeddingConfig, normalize: bool) -> None:
        self.embedder = source.open()
        self.model_id = source.name
        self.config = config
        self.normalize = normalize

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Vectors of the rows' texts in their stored type, checked after rounding.

        Raises:
            DataError: a vector that is zero or not finite, named by id.
            ConfigError: dimensions that the model does not have.
        """
        config = self.config
        texts = rows.column("text").to_pylist()
        vectors, tokens = checked_vectors(
            self.embedder, self.model_id, config, self.normalize, texts, rows.column("id")
        )
        columns = {"id": rows.column("id"), "offset": rows.column("offset")}
        table = pa.table({**columns, **vector_columns(vectors, config.dtype)})
        metadata = {
            CONTRACT_KEY: self.embedder.contract_hash.encode(),
            MODEL_KEY: self.model_id.encode(),
            **cost_metadata(sum(tokens), taken_cuts(self.embedder)),
            _DTYPE_KEY: config.dtype.encode(),
            _SIDE_KEY: config.side.encode(),
            _DIMENSION_KEY: str(vectors.shape[1]).encode(),
        }
        return {OWN_FOLDER: final_table(table, metadata)}


@dataclass(frozen=True, slots=True)
class OwnShard:
    """A shard with new texts.

    Attributes:
        number: of the shard.
        part: name of its files.
        is_whole: whether all its texts are new, so that what is embedded is the whole part.
    """

    number: int
    part: str
    is_whole: bool


@dataclass(frozen=True, slots=True)
class OwnTexts:
    """Reads the texts that a shard embeds; runs in a Ray task."""

    source: TextSource
    out: Place
    shard_rows: int

    def __call__(self, shard: OwnShard) -> pa.Table:
        """id, offset in the shard, and text of the new texts of a shard.

        Raises:
            DataError: the input was changed since the ledger was written.
        """
        rows = self.out.read_table(f"{ROWS_FOLDER}/{shard.part}")
        offsets = np.flatnonzero(
            origin_column(rows) == shard.number * self.shard_rows + np.arange(rows.num_rows)
        )
        rows = rows.take(pa.array(offsets))
        texts = texts_at(self.source, np.asarray(rows.column("file")), np.asarray(rows.column("row")))
        for text, digest, name in zip(
            texts, rows.column("digest").to_pylist(), rows.column("id").to_pylist(), strict=True
        ):
            if text_digest(text) != digest:
                raise DataError(
                    f"{self.source.place.uri}: the text of id {name!r} was changed while it was being embedded; "
                    f"delete {self.out.uri} and run again"
                )
        columns = {"id": rows.column("id"), "offset": pa.array(offsets, pa.int64())}
        return pa.table({**columns, "text": pa.array(texts, pa.string())})


def embed_rows(
    *,
    stage: str,
    source: TextSource,
    ledger: Ledger,
    out: Place,
    model: EmbedderSource,
    normalize: bool,
    config: EmbeddingConfig,
    pool: PoolConfig,
    previous: Place | None,
) -> dict[str, int]:
    """Write ``vectors/part-*.parquet`` of every shard that is missing; returns the ``cost_counts`` of all new texts.

    Args:
        stage: name on the progress lines.
        source: the texts.
        ledger: which row takes which vector.
        out: the artefact being built.
        model: opened once in every actor; its name is stamped on the files.
        normalize: whether the model's vectors have unit length.
        config: side, stored type and dimensions.
        pool: actors and what each reserves.
        previous: the earlier artefact that the ledger takes vectors from.
    """
    done = {
        name.rsplit("/", 1)[1]
        for folder in (VECTORS_FOLDER, OWN_FOLDER)
        for name in out.names(folder, ".parquet")
    }
    parts = ledger.parts
    missing = [n for n, part in enumerate(parts) if ledger.own[n] and part not in done]
    todo = sum(ledger.own[n] for n in missing)
    total = sum(ledger.own)
    progress = Progress(stage, total, "texts", done=total - todo)
    if missing:
        items = stream(
            stage=stage,
            items=[OwnShard(n, parts[n], ledger.own[n] == ledger.rows[n]) for n in missing],
            read=OwnTexts(source, out, ledger.shard_rows),
            write=partial(_write_own, out),
            written=partial(_is_written, out),
            worker=RowsWorker,
            worker_arguments=dict(source=share_weights(model, pool), config=config, normalize=normalize),
            done_folder=OWN_FOLDER,
            pool=pool,
            handling=Handling(weights=weights_of(model)),
        )
        for item in items:
            progress.advance(ledger.own[missing[item]])
    fill_in(stage, ledger, out, previous)
    return _cost(out)


def _write_own(out: Place, shard: OwnShard, folder: str, table: pa.Table) -> None:
    if shard.is_whole:
        folder, table = VECTORS_FOLDER, table.drop_columns(["offset"])
    out.write_table(f"{folder}/{shard.part}", table)


def _is_written(out: Place, shard: OwnShard) -> bool:
    return any(out.exists(f"{folder}/{shard.part}") for folder in (VECTORS_FOLDER, OWN_FOLDER))


def _cost(out: Place) -> dict[str, int]:
    return cost_counts(out.parquet_footer(name)[0] for name in out.names(VECTORS_FOLDER, ".parquet"))


def embed_artefact(
    config: EmbeddingConfig, corpus: str, model: ModelFolder, pool: PoolConfig, out: ArtefactWriter
) -> Artefact:
    """Embed every text of a corpus and commit the vectors.

    Args:
        config: the embedding section.
        corpus: a corpus artefact, a file, folder or glob of Parquet or JSON lines, or a folder of documents.
        model: its id is stamped on the files.
        pool: actors and what each reserves.
        out: writer of the vectors artefact; gets ``vectors``, ``rows``, ``rejects`` and the indexes.

    Raises:
        DataError: an input that cannot be embedded, or an earlier artefact of another recipe.
        ConfigError: keys that do not fit the model.
        MissingDependency: an index is wanted and FAISS is not installed.
    """
    out.place.sweep()
    contract = model.contract
    config = checked_section(config.computed(pool.gpus), model)
    recipe = {**config.recipe, "model_id": model.id, "contract_hash": contract.hash}
    earlier = _earlier(config, recipe, out.place)
    cutter = Cutter.of(load_tokenizer(model.transformer), contract, config)
    source = open_input(corpus, config, out.place, cutter)
    before = (earlier.fingerprint, earlier.place) if earlier else None
    source = _regrouped(source, out.place)
    ledger = open_ledger(source, out.place, config.shard_rows, before)
    cost = embed_rows(
        stage="embed",
        source=source,
        ledger=ledger,
        out=out.place,
        model=EncoderSource(model.id, model.travels, dtype=config.compute_dtype),
        normalize=contract.normalize,
        config=config,
        pool=pool,
        previous=earlier.place if earlier else None,
    )
    details: dict[str, Any] = {
        "model_id": model.id,
        "contract_hash": contract.hash,
        "recipe": recipe,
        "previous": ledger.previous or None,
        "input": {"path": absolute(corpus), **config.columns},
    }
    if model.is_trusted:
        details["trust_remote_code"] = True
    if config.index is not None:
        details["index"] = _indexed(config.index, out.place, contract.hash, pool)
    if config.lexical is not None:
        details["lexical"] = _worded(config.lexical, config, corpus, source, ledger, model, pool, out.place)
    for folder in (OWN_FOLDER, REGROUPED_FOLDER):
        out.place.child(folder).remove()
    done = out.commit({**ledger.counts, **cost}, details)
    note("embed", cut_line(sum(ledger.own), cost))
    if out.place.is_local:
        aside_of(out.place).remove()
    return done


def _regrouped(source: TextSource, out: Place) -> TextSource:
    """The source with copies of those files whose row groups are too large for a shard to read one; made once, in tasks."""
    large = [n for n, (name, _) in enumerate(source.files) if largest_group(source.place, name) > GROUP_ROWS]
    missing = [n for n in large if not out.exists(copy_name(n))]
    if missing:
        note("embed", f"{len(missing):,} files have row groups of more than {GROUP_ROWS:,} rows; copied once")
        for _ in run_tasks("embed", regroup, missing, source, out, cpus=1.0):
            pass
    return replace(source, copies=frozenset(large), copied_to=out)


def _worded(
    lexical: LexicalConfig,
    config: EmbeddingConfig,
    corpus: str,
    source: TextSource,
    ledger: Ledger,
    model: ModelFolder,
    pool: PoolConfig,
    out: Place,
) -> dict[str, Any]:
    """Build the index of words; its facts have a weight of hybrid searches where the corpus has judged queries for it."""
    facts = build_lexical("embed", lexical, source, ledger.parts, ledger.rows, out, pool)
    place = Place(corpus)
    if not place.exists(MANIFEST_FILE) or not out.is_local:
        return facts
    judged = judged_queries(place)
    if len(judged.queries) >= LEAST_QUERIES:
        encoder = EncoderSource(model.id, model.travels, dtype=config.compute_dtype)
        [facts] = run_tasks(
            "embed", tune, [judged], out, encoder, config, model.contract.normalize, pool=pool
        )
    if "weight" not in facts:
        note(
            "embed",
            f"hybrid searches get their usual weight: {len(judged.queries)} dev queries are too few to tune it",
        )
        return facts
    told, weight = facts["tuned_on"], facts["weight"]
    note(
        "embed",
        f"hybrid searches weigh vectors {weight:g}, words {1 - weight:g}: nDCG@10 {told['ndcg_at_10']:.3f} on {told['queries']} dev "
        f"queries, of vectors alone {told['dense']:.3f}, of words alone {told['lexical']:.3f}",
    )
    return facts


def _indexed(config: IndexConfig, out: Place, contract_hash: str, pool: PoolConfig) -> dict[str, Any]:
    """Build the index on one of the pool's machines, on its GPU if it reserves one: the driver holds no vectors."""
    [facts] = run_tasks("embed", build_index, [config], out, contract_hash, pool=pool)
    return facts


def checked_section(config: EmbeddingConfig, model: ModelFolder) -> EmbeddingConfig:
    """The section with its task, checked against the model as far as that can be done before anything is loaded.

    Raises:
        ConfigError: a task, an instruction or dimensions that do not fit the model.
        InstructionTooLong: an instruction that leaves next to nothing of the length limit.
        MissingDependency: an index is wanted and FAISS is not installed.
    """
    contract = model.contract
    config = _with_task(config, contract)
    _check(config, contract)
    tokenizer = load_tokenizer(model.transformer)
    try:
        check_room(tokenizer, contract, config.side, config.task_type, config.instruction)
    except InstructionTooLong as error:
        raise InstructionTooLong(f"embedding.instruction: {error}") from error
    return config


def _with_task(config: EmbeddingConfig, contract: PromptContract) -> EmbeddingConfig:
    """The section with the task that its texts are taken for as ``task_type``: the model's default where it names none.

    Raises:
        ConfigError: a task that the model does not know.
    """
    if config.task is not None and not contract.knows(config.task):
        raise ConfigError(
            f"embedding.task: {config.task!r} is unknown; allowed: {', '.join(contract.known_tasks)}"
        )
    stated = config.task_type if "task_type" in config.model_fields_set else contract.task_type_of()
    return config.model_copy(update={"task_type": config.task or stated})


def _check(config: EmbeddingConfig, contract: PromptContract) -> None:
    """What can be known before any actor starts."""
    kind = contract.task_type_of(config.task_type)
    check_instruction(config.model_copy(update={"task_type": kind}), contract.symmetric_task_types)
    if config.index is not None:
        require_faiss()
    if config.lexical is not None and config.lexical.language != AUTO:
        Analyzer.of(config.lexical.language)
    trained = contract.matryoshka_dimensions
    if config.dimensions is None or config.allow_truncation or config.dimensions in (trained or ()):
        return
    allowed = (
        f"allowed: {', '.join(map(str, trained))}"
        if trained
        else "the model does not say it was trained for any"
    )
    raise ConfigError(
        f"embedding.dimensions: {config.dimensions}; {allowed} (matryoshka_dimensions of its contract.json); "
        "embedding.allow_truncation: true cuts regardless"
    )


def _earlier(config: EmbeddingConfig, recipe: dict[str, Any], out: Place) -> Artefact | None:
    """The artefact whose vectors may be taken: the one the config names, or the one this build replaces.

    Raises:
        DataError: the named one is not there, or its vectors are of another recipe.
    """
    if config.previous is not None:
        named = Artefact.open(Place(config.previous), "vectors")
        different = _difference(named, recipe)
        if different:
            raise DataError(
                f"embedding.previous: {config.previous}: {different}; its vectors cannot be mixed in"
            )
        return named
    if not out.is_local or not aside_of(out).exists(MANIFEST_FILE):
        return None
    replaced = Artefact.open(aside_of(out), "vectors")
    different = _difference(replaced, recipe)
    if different:
        note("embed", f"no vector of {replaced.place.uri} is taken over: {different}")
        return None
    return replaced


def _difference(artefact: Artefact, recipe: dict[str, Any]) -> str:
    """The first key in which an artefact's recipe differs, in words; empty if it is the same."""
    found = artefact.manifest["details"].get("recipe", {})
    for key, value in recipe.items():
        if found.get(key) != value:
            return f"{key} is {found.get(key)!r} there, {value!r} here"
    return ""
