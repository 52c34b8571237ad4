"""What can be embedded: a corpus artefact, Parquet, JSON lines, files of documents; all end as Parquet rows.

Parquet is read where it lies. JSON lines and documents have no row numbers to come back to, so they are written
once as ``documents/part-*.parquet`` below the vectors; documents that are longer than the model reads as chunks.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from embedloom.compute.shards import PART_PATTERN
from embedloom.config.corpus import DocumentKind
from embedloom.config.embedding import EmbeddingConfig
from embedloom.core.artefacts import MANIFEST_FILE, Artefact
from embedloom.core.contents import Contents, contents_of, digest
from embedloom.core.progress import note
from embedloom.core.prompting import PromptContract, Side, is_instructed
from embedloom.core.storage import (
    JSONL_ENDINGS,
    PARQUET_ENDINGS,
    Place,
    files_at,
    json_lines,
    named_below,
)
from embedloom.documents.cutting import Piece, cut_document, place_in
from embedloom.documents.listing import list_documents
from embedloom.documents.outline import Document
from embedloom.documents.reading import Reading, kind_of, read_path
from embedloom.encoder.registry import local_contents
from embedloom.errors import ConfigError, DataError

DOCUMENTS_FOLDER = "documents"
ORIGIN_COLUMNS = ("source", "url")  # what a document of any input may say of where it comes from
SPLITS = ("train", "dev", "test")
_COPIED = f"{DOCUMENTS_FOLDER}.json"  # written when the copy of foreign documents is complete
_COPY_ROWS = 10_000
_ALLOWED = "a corpus artefact, a file, folder or glob of Parquet or JSON lines, or a folder of documents"


@dataclass(frozen=True, slots=True)
class TextSource:
    """Parquet files whose rows are texts: (name, row count) in order, and the columns to read."""

    place: Place
    files: tuple[tuple[str, int], ...]
    text: str
    title: str | None
    id: str | None  # None: rows are known by their content
    side: Side
    # Where a row comes from: its own columns of that name, where the input has them.
    origin: tuple[str, ...] = ()
    # Files that are read at any row out of a copy with small row groups, and the artefact that has it.
    copies: frozenset[int] = frozenset()
    copied_to: Place | None = None

    def to_read(self, file: int) -> tuple[Place, str]:
        """Place and name that rows of a file are read from by their numbers."""
        if self.copied_to is not None and file in self.copies:
            return self.copied_to, copy_name(file)
        return self.place, self.files[file][0]

    @property
    def columns(self) -> list[str]:
        """The columns to read."""
        return [name for name in dict.fromkeys((self.id, self.title, self.text)) if name is not None]


# Rows of a Parquet file are decoded from the beginning of their group on, so every shard of a file in one group would
# read half the file.
GROUP_ROWS = 32_768
REGROUPED_FOLDER = "regrouped"
_REGROUPED_ROWS = 2048


def copy_name(file: int) -> str:
    """Name of the copy of an input's file."""
    return f"{REGROUPED_FOLDER}/{file:06d}.parquet"


def largest_group(place: Place, name: str) -> int:
    """Rows of the largest row group of a Parquet file."""
    return max(place.parquet_groups(name), default=0)


def regroup(file: int, source: TextSource, out: Place) -> None:
    """Write a copy of the columns of a file that are read, in small row groups; it is read once, a batch at a time."""
    name = source.files[file][0]
    out.write_tables(
        copy_name(file), source.place.iter_tables(name, source.columns, _REGROUPED_ROWS), _REGROUPED_ROWS
    )


def input_state(path: str, read_as: Mapping[str, DocumentKind] | None = None) -> Any:
    """What a changed input changes: a corpus artefact's fingerprint, else what every file holds, by its path below the
    input's folder; in an object store, every file's size and tag.

    Raises:
        DataError: nothing there.
    """
    if "://" in path:
        if Place(path).exists(MANIFEST_FILE):
            return Artefact.open(Place(path), "corpus").fingerprint
        place, names = _remote(path)
        states = place.states()
        return {name: str(states[name]) for name in names}
    if (Path(path).expanduser() / MANIFEST_FILE).is_file():
        return Artefact.open(Place(path), "corpus").fingerprint
    _, files = _local(path, read_as or {})
    return contents_of(named_below(path, files))


def embedding_node(
    config: EmbeddingConfig, own_models: set[str]
) -> tuple[tuple[Any, ...], dict[str, Contents]]:
    """What of the embedding section decides the vectors, and what the local files hold that they are made from.

    Inputs and models of the run itself are left to the graph, and so is where vectors are taken over from, which does
    not change them.
    """
    states: list[Any] = []
    reads: dict[str, Contents] = {}
    settings = config.model_dump(mode="json", exclude={"previous"})
    if config.corpus is not None:
        states.append(state := input_state(config.corpus, config.read_as))
        if "://" not in config.corpus:
            settings["corpus"] = None
        if isinstance(state, dict):
            reads[config.corpus] = state
    code = config.trust_remote_code
    held = None if config.model in own_models else local_contents(config.model, code=code)
    if held is not None:
        states.append(digest(held))
        settings["model"] = None
        reads[config.model] = held
    return (settings, states), reads


def open_input(path: str, config: EmbeddingConfig, out: Place, cutter: "Cutter | None" = None) -> TextSource:
    """The rows of an input; JSON lines and documents are copied to ``out/documents`` first, once.

    Args:
        path: the input.
        config: names the columns and the side; queries have no titles.
        out: the artefact being built.
        cutter: of documents that are longer than the model reads; None: they stay whole.

    Raises:
        DataError: nothing there, files of several kinds, or a column that is not there.
    """
    if "://" in path and not Place(path).exists(MANIFEST_FILE):
        return _table_source(*_remote(path), config)
    if "://" in path or (Path(path).expanduser() / MANIFEST_FILE).is_file():
        place = Artefact.open(Place(path), "corpus").place
        names = [name for split in SPLITS for name in place.names(f"{DOCUMENTS_FOLDER}/{split}", ".parquet")]
        return _table_source(place, names, config)
    kind, files = _local(path, config.read_as)
    if kind == "parquet":
        root = Path(os.path.commonpath([file.parent.absolute() for file in files]))
        names = [file.absolute().relative_to(root).as_posix() for file in files]
        return _table_source(Place(str(root)), names, config)
    if not out.exists(_COPIED):
        if kind == "jsonl":
            rows = _json_rows(files, path, config)
        else:
            _note_passed_over(path, config)
            rows = _document_rows(files, path, config, cutter)
        out.write_json(_COPIED, {"rows": _copy(rows, out)})
    names = out.names(DOCUMENTS_FOLDER, ".parquet")
    copied = config.model_copy(update={"text_column": "text", "title_column": None, "id_column": None})
    return _table_source(out, names, copied)


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts documents into chunks that a model reads whole.

    Attributes:
        tokenizer: the model's, a fast one.
        room: most tokens of a title and a chunk's text.
    """

    tokenizer: Any
    room: int

    @classmethod
    def of(cls, tokenizer: Any, contract: PromptContract, config: EmbeddingConfig) -> "Cutter | None":
        """The cutter for documents of a model; None for queries, and where the config wants none."""
        if config.side == "query" or not config.chunks:
            return None
        # Here, since it imports transformers and plans look at inputs too.
        from embedloom.encoder.tokenizer import prompt_ids

        prompt = contract.format("", config.side, config.task or config.task_type, config.instruction)
        # The blanks that join prompt, title and text may be a token each.
        taken = len(prompt_ids(tokenizer, prompt)) + 2
        return cls(tokenizer, max(1, contract.max_tokens(config.side) - taken))

    def pieces(self, document: Document) -> list[Piece]:
        """Where the text is cut; one piece where it fits."""
        title = self.tokenizer(document.title or "", add_special_tokens=False)["input_ids"]
        found = self.tokenizer(
            document.text,
            add_special_tokens=False,
            truncation=False,
            return_offsets_mapping=True,
            verbose=False,  # else it warns of the lengths that are about to be cut
        )
        # Every chunk repeats the title, but a long title leaves at least half of the room to the text.
        room = max(1, self.room - len(title), self.room // 2)
        return cut_document(document.text, found["offset_mapping"], document.outline, room)


def _remote(path: str) -> tuple[Place, list[str]]:
    """A Parquet file, or the Parquet files of a folder, in an object store."""
    if path.endswith(PARQUET_ENDINGS):
        folder, _, name = path.rpartition("/")
        return Place(folder), [name]
    names = Place(path).names("", ".parquet")
    if not names:
        raise DataError(f"embedding.corpus: {path!r} holds no .parquet file")
    return Place(path), names


def _local(path: str, read_as: Mapping[str, DocumentKind] = {}) -> tuple[str, list[Path]]:
    """Kind and files of a local input: tables of one kind, or documents of any; others are passed over.

    JSON beside documents says how a site is built (``package.json``, ``_category_.json``); JSON lines are data.
    """
    found: dict[str, list[Path]] = {}
    for file in files_at(path):
        name = file.name.lower()
        kind = "documents" if kind_of(name, read_as) is not None else ""
        kind = (
            "parquet" if name.endswith(PARQUET_ENDINGS) else "jsonl" if name.endswith(JSONL_ENDINGS) else kind
        )
        if kind:
            found.setdefault(kind, []).append(file)
    if "documents" in found and all(file.suffix.lower() == ".json" for file in found.get("jsonl", ())):
        found.pop("jsonl", None)
    if not found:
        raise DataError(
            f"embedding.corpus: {path!r} does not exist or holds no such file; allowed: {_ALLOWED}"
        )
    if len(found) > 1:
        seen = ", ".join(f"{len(listed)} {kind}" for kind, listed in found.items())
        endings = dict.fromkeys(file.suffix for listed in found.values() for file in listed)
        globs = " or ".join(f"'{path.rstrip('/')}/**/*{ending}'" for ending in list(endings)[:3])
        raise DataError(
            f"embedding.corpus: {path!r} holds files of several kinds ({seen}); give a glob, such as {globs}"
        )
    return next(iter(found.items()))


def _note_passed_over(path: str, config: EmbeddingConfig) -> None:
    listing = list_documents(path, config.read_as)
    if listing.passed:
        note(
            "embed",
            f"{path}: {len(listing.files):,} documents are read, passed over: {listing}; "
            "embedding.read_as ({.ENDING: text}) reads more",
        )


def _table_source(place: Place, names: list[str], config: EmbeddingConfig) -> TextSource:
    """Resolve the columns on the first file and check them on all."""
    footers = [(name, *place.parquet_footer(name)) for name in names]
    if not footers or not any(rows for _, _, rows in footers):
        raise DataError(f"embedding.corpus: {place.uri}: no rows to embed")
    first = footers[0][1].names
    id_column = config.id_column or next((name for name in ("id", "_id") if name in first), None)
    title = config.title_column or ("title" if "title" in first else None)
    if config.side == "query":
        title = None
    files = tuple((name, rows) for name, _, rows in footers)
    origin = tuple(
        name for name in ORIGIN_COLUMNS if all(_holds_text(schema, name) for _, schema, _ in footers)
    )
    source = TextSource(place, files, config.text_column, title, id_column, config.side, origin)
    for name, schema, _ in footers:
        _check_columns(source, schema, f"{place.uri}/{name}")
    return source


def _check_columns(source: TextSource, schema: pa.Schema, where: str) -> None:
    for key in ("text", "title", "id"):
        column = getattr(source, key)
        if column is None:
            continue
        if column not in schema.names:
            raise DataError(
                f"{where}: no column {column!r} (embedding.{key}_column); columns found: {schema.names}"
            )
        kind = schema.field(column).type
        if not _holds_text(schema, column) and not (key == "id" and pa.types.is_integer(kind)):
            allowed = "text or whole numbers" if key == "id" else "text"
            raise DataError(f"{where}: column {column!r} is {kind}; allowed: {allowed}")


def _holds_text(schema: pa.Schema, column: str) -> bool:
    if column not in schema.names:
        return False
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(fits(kind) for fits in texts)


def _json_rows(files: list[Path], path: str, config: EmbeddingConfig) -> Iterator[dict[str, Any]]:
    """Records of JSON lines; whether they have ids is decided by the very first one."""
    named: str | None = config.id_column
    first, titled = True, config.title_column is None
    for name, file in named_below(path, files).items():
        for number, record in json_lines(file):
            if first:
                named = named or next((key for key in ("id", "_id") if key in record), None)
                first = False
            where = f"{file}: line {number}"
            titled = titled or config.title_column in record
            row = {
                "text": _value(record, config.text_column, where, required=True),
                "title": _value(record, config.title_column or "title", where),
                **_origin(record, f"{name}:{number}"),
            }
            if named is not None:
                row["id"] = _value(record, named, where, required=True, whole_numbers=True)
            yield row
    if not titled and not first:
        raise DataError(f"{files[0]}: no line has the key {config.title_column!r} (embedding.title_column)")


def _origin(record: dict[str, Any], place: str) -> dict[str, str | None]:
    """What a record says of where it comes from, itself or in its ``metadata`` (BEIR, LangChain); else its line."""
    metadata = record.get("metadata")
    known = [record, metadata if isinstance(metadata, dict) else {}]
    found: dict[str, str | None] = {}
    for column in ORIGIN_COLUMNS:
        values = (one.get(column) for one in known)
        found[column] = next((value for value in values if value and _is_unicode(value)), None)
    return {**found, "source": found["source"] or found["url"] or place}


def _is_unicode(value: Any) -> bool:
    """Whether a value of JSON is a text that UTF-8 can hold: JSON can also state half a character."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _value(
    record: dict[str, Any], key: str, where: str, *, required: bool = False, whole_numbers: bool = False
) -> str | None:
    if required and key not in record:
        raise DataError(f"{where} has no key {key!r}; keys found: {list(record)}")
    value = record.get(key)
    if whole_numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{where}: key {key!r} holds {type(value).__name__} {str(value)[:40]!r}; allowed: text"
        )
    return value


def _document_rows(
    files: list[Path], path: str, config: EmbeddingConfig, cutter: Cutter | None
) -> Iterator[dict[str, Any]]:
    """A row a document or chunk; its id is its path below the folder, so an edited file keeps its id.

    Of a document that is cut the ids are ``PATH#chunk=1`` and so on, and their sources name page and heading.
    """
    reading = Reading(titles=config.titles, read_as=config.read_as)
    documents = cut = chunks = 0
    for name, file in named_below(path, files).items():
        for document in read_path(file, reading):
            documents += 1
            own = f"{name}#{document.part}" if document.part else name
            pieces = cutter.pieces(document) if cutter is not None else []
            row = {"id": own, "title": document.title, "text": document.text, "source": own, "url": None}
            if len(pieces) < 2:
                yield row
                continue
            cut, chunks = cut + 1, chunks + len(pieces)
            for number, piece in enumerate(pieces, start=1):
                text = document.text[piece.start : piece.stop].strip()
                place = place_in(own, document.text, document.outline, piece.start)
                yield {**row, "id": f"{own}#chunk={number}", "text": text, "source": place}
    if cut and cutter is not None:
        note(
            "embed",
            f"{cut:,} of {documents:,} documents are longer than the {cutter.room} tokens that the model reads beside its "
            f"prompt and are cut into {chunks:,} chunks (embedding.chunks: false cuts their ends off instead)",
        )


def _copy(rows: Iterator[dict[str, Any]], out: Place) -> int:
    """Write rows as numbered parts; returns how many there were."""
    total, waiting = 0, list[dict[str, Any]]()

    def write() -> None:
        names = [name for name in ("id", "title", "text", *ORIGIN_COLUMNS) if name in waiting[0]]
        schema = pa.schema([(name, pa.string()) for name in names])
        part = f"{DOCUMENTS_FOLDER}/{PART_PATTERN.format((total - 1) // _COPY_ROWS)}"
        try:
            table = pa.Table.from_pylist(waiting, schema=schema)
        except UnicodeEncodeError as error:
            raise DataError(
                f"embedding.corpus: rows {total - len(waiting)} to {total}: not Unicode ({error.reason}); allowed: UTF-8"
            ) from error
        out.write_table(part, table)
        waiting.clear()

    for row in rows:
        waiting.append(row)
        total += 1
        if len(waiting) == _COPY_ROWS:
            write()
    if waiting:
        write()
    return total


def check_instruction(config: EmbeddingConfig, symmetric_task_types: tuple[str, ...]) -> None:
    """Refuse an instruction that no text would carry.

    Raises:
        ConfigError: an instruction for documents of an asymmetric task.
    """
    if config.instruction and not is_instructed(config.side, config.task_type, symmetric_task_types):
        raise ConfigError(
            f"embedding.instruction: documents of task_type {config.task_type!r} carry no instruction; "
            f"allowed with side query, or with one of {', '.join(symmetric_task_types)}"
        )
