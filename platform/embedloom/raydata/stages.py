"""``embedloom.mine`` and ``embedloom.synthesize``: the stages of a run on any Ray Datasets, with a Dataset as result.

Both look at all rows at once and go on where a killed call ended, so their rows are written below a folder ``out``, in tasks and
never through the driver; what the stage makes of them is the command's artefact, and the Dataset that comes back reads it.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa

from embedloom.compute.generation import EngineFactory
from embedloom.compute.vllm_engine import VLLMEngine
from embedloom.config.base import validate
from embedloom.config.cluster import PoolConfig
from embedloom.config.mining import MiningConfig
from embedloom.config.synthesis import SynthesisConfig
from embedloom.core.artefacts import MANIFEST_FILE, Artefact, ArtefactWriter, fingerprint
from embedloom.core.prompting import DEFAULT_INSTRUCTIONS
from embedloom.core.schemas import content_id, table_from_rows
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.mining.candidates import DOCUMENTS_FOLDER
from embedloom.mining.examples import EXAMPLES_FOLDER
from embedloom.mining.stage import build_examples, judge_source, teacher_sources
from embedloom.mining.stage import mine as mine_stage
from embedloom.raydata.batches import columns_of, strings_of
from embedloom.synthesis.stage import PAIRS_FOLDER, model_sources
from embedloom.synthesis.stage import synthesize as synthesis_stage

if TYPE_CHECKING:
    from ray.data import Dataset

_ROWS_FOLDER = "rows"  # below ``out``: one folder for each content of the datasets
_PAIRS = "pairs/train"
_PART_ROWS = 10_000
_PROFILE = "Ray Data"
_POOL = PoolConfig()


def mine(
    documents: "Dataset",
    pairs: "Dataset",
    *,
    teachers: str | Sequence[str | Mapping[str, Any]],
    out: str,
    id_column: str = "id",
    text_column: str = "text",
    title_column: str | None = None,
    query_column: str = "query",
    document_id_column: str = "document_id",
    pool: PoolConfig = _POOL,
    **section: Any,
) -> "Dataset":
    """Hard negatives of (query, document) pairs, as ``embedloom mine`` finds them: a Dataset of training examples.

    Runs when it is called, on the connected Ray. Rows of the same datasets are written once; another call with them and ``out``
    finds what is finished, and goes on with what is not.

    Args:
        documents: what is searched for negatives; ids are text and unique.
        pairs: a query and the id of its document a row. Further columns that a pair of the run has are read where they are there:
            ``id``, ``positive``, ``negatives``, ``task_type``, ``instruction``, ``lang``, ``dataset``.
        teachers: models that search, by name, or entries of ``mining.teachers``.
        out: folder of all that is made, local or at an address such as ``s3://``; on a cluster all nodes must see it.
        id_column: of the documents' ids.
        text_column: of their texts.
        title_column: of titles, joined before the texts; None: none.
        query_column: of the pairs' queries.
        document_id_column: of the ids of their documents.
        pool: actors, and what each reserves.
        section: further keys of the section ``mining``, such as ``top_k`` or ``selection={"negatives": 4}``.

    Returns:
        Rows of the table ``examples``: id, query, positive, negatives, their scores; see the reference of formats.

    Raises:
        ConfigError: a key or value that is not allowed.
        DataError: a column that is missing, no pair, ids that stand twice, or a teacher that cannot be loaded.
        StageError: a worker failed, or no query became an example.
    """
    config = _mining_section(teachers, section)
    place = Place(out).absolute()
    as_document = _Documents(id_column, text_column, title_column)
    as_pair = _Pairs(query_column, document_id_column)
    corpus = _written({DOCUMENTS_FOLDER: (documents, as_document), _PAIRS: (pairs, as_pair)}, place)
    plain = config.model_dump(mode="json", exclude={"selection", "audit", "rescoring", "memory_gib"})
    mined = _built(
        place, "mining", plain, {"corpus": corpus},
        lambda writer: mine_stage(config, corpus, [], teacher_sources(config), pool, writer),
    )  # fmt: skip
    rules = config.model_dump(mode="json", include={"selection", "audit"})
    built = _built(
        place, "examples", rules, {"mining": mined, "corpus": corpus},
        lambda writer: build_examples(config, mined, corpus, judge_source(config), pool, writer),
    )  # fmt: skip
    return _read(built.place, EXAMPLES_FOLDER)


def _mining_section(
    teachers: str | Sequence[str | Mapping[str, Any]], more: Mapping[str, Any]
) -> MiningConfig:
    named = [teachers] if isinstance(teachers, str) else list(teachers)
    config = validate(MiningConfig, {**more, "teachers": named}, "mine")
    if config.rescoring is not None:
        raise ConfigError(
            "mine: rescoring is a stage of its own; allowed: a run config with mining.rescoring"
        )
    return config


def synthesize(
    documents: "Dataset",
    *,
    generators: str | Sequence[str | Mapping[str, Any]],
    families: Sequence[Mapping[str, Any]],
    out: str,
    seed: int = 0,
    id_column: str = "id",
    text_column: str = "text",
    title_column: str | None = None,
    lang_column: str | None = None,
    pool: PoolConfig = _POOL,
    engine_factory: EngineFactory = VLLMEngine,
    **section: Any,
) -> "Dataset":
    """Queries and other texts that LLMs write for documents, as ``embedloom synthesize`` has them: a Dataset of pairs.

    Runs when it is called, on the connected Ray; see ``mine`` for ``out``, and for what another call does.

    Args:
        documents: that are written for; ids are text and unique.
        generators: models by name, or entries of ``synthesis.generators``, endpoints among them.
        families: entries of ``synthesis.families``: what is written, and how many rows.
        out: folder of all that is made, local or at an address such as ``s3://``.
        seed: decides which documents are read, and how answers are sampled.
        id_column: of the documents' ids.
        text_column: of their texts.
        title_column: of titles; None: none.
        lang_column: of languages (``eng``); None: none is known, which counts as English.
        pool: engines, and what each reserves.
        engine_factory: builds the engine inside an actor.
        section: further keys of the section ``synthesis``, such as ``quality`` or ``shard_rows``.

    Returns:
        Rows of the table ``pairs``: id, query, document_id, and for families that write both sides ``positive`` and ``negatives``.

    Raises:
        ConfigError: a key or value that is not allowed, or a check by a mining teacher, which only a run has.
        DataError: a column that is missing, or documents that a family cannot start from.
        StageError: a generator did not fill its quota, or an engine failed for good.
    """
    config = _section(generators, families, section)
    as_document = _Documents(id_column, text_column, title_column, lang_column)
    corpus = _written({DOCUMENTS_FOLDER: (documents, as_document)}, Place(out).absolute())

    def build(writer: ArtefactWriter) -> Artefact:
        models = model_sources(config)
        return synthesis_stage(config, seed, corpus, pool, writer, models, engine_factory=engine_factory)

    settings = [config.model_dump(mode="json"), seed]
    written = _built(Place(out).absolute(), "synthesis", settings, {"corpus": corpus}, build)
    return _read(written.place, PAIRS_FOLDER)


def _section(
    generators: str | Sequence[str | Mapping[str, Any]],
    families: Sequence[Mapping[str, Any]],
    more: Mapping[str, Any],
) -> SynthesisConfig:
    models = [generators] if isinstance(generators, str) else generators
    listed = [{"model": one} if isinstance(one, str) else dict(one) for one in models]
    config = validate(
        SynthesisConfig, {**more, "generators": listed, "families": list(families)}, "synthesize"
    )
    if config.quality.round_trip is not None:
        raise ConfigError(
            "synthesize: quality.round_trip checks with the first mining teacher, which only a run has; allowed: null"
        )
    return config


def _built(
    out: Place,
    kind: str,
    settings: Any,
    inputs: Mapping[str, Artefact],
    build: Callable[[ArtefactWriter], Artefact],
) -> Artefact:
    """The artefact of a kind below ``out``: as it is there, else built, or gone on with."""
    made_from = {name: artefact.fingerprint for name, artefact in inputs.items()}
    place, known = out.child(kind), fingerprint(settings)
    finished = Artefact.find(place, fingerprint(kind, known, made_from))
    return build(ArtefactWriter(place, kind, known, made_from, _PROFILE)) if finished is None else finished


def _read(place: Place, folder: str) -> "Dataset":
    import ray.data
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    names = place.names(folder, ".parquet")
    if place.is_local:
        return ray.data.read_parquet([str(place.local / name) for name in names])
    filesystem, root = place.filesystem()
    paths = [f"{root}/{name}" for name in names]
    return ray.data.read_parquet(paths, filesystem=PyFileSystem(FSSpecHandler(filesystem)))


# Rows of a Dataset become a table of our own, part by part; a part is named by what it holds.


_Rows = Callable[[pa.Table], pa.Table]


def _written(datasets: Mapping[str, tuple["Dataset", _Rows]], out: Place) -> Artefact:
    """An artefact with the rows of datasets; of equal rows that are there already, that one."""
    rows = out.child(_ROWS_FOLDER)
    place = rows.child(uuid4().hex)
    parts: list[tuple[str, int]] = []
    for folder, (dataset, convert) in datasets.items():
        written = dataset.map_batches(
            _WritePart(place, folder, convert), batch_size=_PART_ROWS, batch_format="pyarrow"
        )
        # The same rows in the same parts, however long each takes.
        written.context.execution_options.preserve_order = True
        parts += [(str(row["name"]), int(row["rows"])) for row in written.iter_rows()]
    if not sum(count for name, count in parts if name.startswith(DOCUMENTS_FOLDER)):
        raise DataError("documents: the dataset has no row")
    known = fingerprint(sorted(parts))
    wanted = fingerprint("corpus", known, {})
    for manifest in rows.files():
        if manifest.endswith(f"/{MANIFEST_FILE}"):
            there = Artefact.find(rows.child(manifest.rpartition("/")[0]), wanted)
            if there is not None:
                place.remove()
                return there
    return _committed(place, known, sum(count for _, count in parts))


def _committed(place: Place, known: str, rows: int) -> Artefact:
    """The folder as an artefact; its writer would empty it, as it begins with what it writes itself."""
    place.write_json("_building.json", {"kind": "corpus", "fingerprint": fingerprint("corpus", known, {})})
    return ArtefactWriter(place, "corpus", known, {}, _PROFILE).commit({"rows": rows})


@dataclass(frozen=True, slots=True)
class _WritePart:
    """Writes a batch as a part; a task that Ray runs again writes the same file."""

    place: Place
    folder: str
    convert: _Rows

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = self.convert(batch)
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        name = f"{self.folder}/part-{hashlib.sha256(sink.getvalue()).hexdigest()[:16]}.parquet"
        if table.num_rows:
            self.place.write_table(name, table)
        return pa.table({"name": [name], "rows": [table.num_rows]})


@dataclass(frozen=True, slots=True)
class _Documents:
    """Rows of the table ``documents``."""

    id: str
    text: str
    title: str | None
    lang: str | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        columns = columns_of(batch)
        optional = {
            key: strings_of(columns, name) if name is not None else [None] * batch.num_rows
            for key, name in (("title", self.title), ("lang", self.lang))
        }
        found = zip(_named(columns, self.id), strings_of(columns, self.text), *optional.values(), strict=True)
        rows = (
            {"id": name, "text": text or "", "title": title, "lang": lang, "source": _PROFILE}
            for name, text, title, lang in found
        )
        return table_from_rows("documents", rows)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Rows of the table ``pairs``."""

    query: str
    document_id: str

    def __call__(self, batch: pa.Table) -> pa.Table:
        columns = columns_of(batch)
        queries, owners = strings_of(columns, self.query), _named(columns, self.document_id)
        own = {
            name: columns[name].to_pylist()
            for name in ("id", "positive", "negatives", "task_type", "instruction", "lang", "document_lang", "origin", "dataset")
            if name in columns
        }  # fmt: skip
        rows = []
        for number, (query, owner) in enumerate(zip(queries, owners, strict=True)):
            given: dict[str, Any] = {
                name: values[number] for name, values in own.items() if values[number] is not None
            }
            task = given.get("task_type", "retrieval")
            rows.append(
                {
                    "id": content_id(query or "", owner), "query": query or "", "document_id": owner, "task_type": task,
                    "instruction": DEFAULT_INSTRUCTIONS.get(task, ""), "lang": "eng", "document_lang": "eng",
                    "origin": "public", **given,
                }
            )  # fmt: skip
        return table_from_rows("pairs", rows)


def _named(columns: Mapping[str, Any], name: str) -> list[str]:
    """A column of ids: texts, none null or empty."""
    found = strings_of(columns, name)
    for row, value in enumerate(found):
        if not value:
            raise DataError(f"column {name!r} holds {value!r} (row {row} of a batch); every row needs an id")
    return [str(value) for value in found]
