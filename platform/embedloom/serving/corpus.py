"""An embedded corpus to search: its FAISS index, or exact search over its vectors, and the texts behind the rows."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.config.embedding import EmbeddingConfig
from embedloom.config.serving import SearchConfig, SearchMode
from embedloom.core.artefacts import MANIFEST_FILE, Artefact, fingerprint
from embedloom.core.contents import cache_folder, made_once
from embedloom.core.progress import note
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.retrieval.fusion import USUAL_WEIGHT, Candidates, Ranked, reciprocal_rank, weighted_sum
from embedloom.retrieval.index import FACTS_FILE, load_index
from embedloom.retrieval.inputs import DOCUMENTS_FOLDER, TextSource, open_input
from embedloom.retrieval.ledger import ROWS_FOLDER, VECTORS_FOLDER, text_digest, texts_of
from embedloom.retrieval.lexical import LEXICAL_FACTS, LexicalIndex, best_rows, load_lexical
from embedloom.retrieval.search import DocumentBlock, pair_scores
from embedloom.retrieval.stored import stored_vectors
from embedloom.retrieval.vector_files import check_same_contract, read_vectors
from embedloom.serving.messages import Vectors
from embedloom.serving.schemas import CorpusCard, SearchHit

# The texts behind the rows of a vectors artefact, and where they come from, read from the input it was embedded from.
#
# The artefact's ``rows/`` says for each vector which file and row its text stands in, and the text's digest: a text that
# was edited since is not shown as if it were what was embedded.


DENSE = SearchConfig()
_MEMORY_BYTES = 512 * 2**20  # of texts kept ready; files beyond it are read again, row group by row group
_COPIED = f"{DOCUMENTS_FOLDER}.json"  # there, JSON lines and text files were copied into the artefact
_CHUNKS_FOLDER = "chunks"
# Nothing that a browser would drop or take for a blank: a link must be what it looks like.
_NOT_IN_A_URL = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029\\<>\"]")

Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class CorpusText:
    """What is known of one row.

    Attributes:
        title: of its document.
        text: as it was embedded.
        source: where it comes from: what its input says, else the file and the row, from 1.
        url: the same as a link, where it is one.
        chunk: which piece of a document that was cut, from 1; None: it is whole.
        chunks: how many pieces there are.
    """

    title: str | None = None
    text: str | None = None
    source: str | None = None
    url: str | None = None
    chunk: int | None = None
    chunks: int | None = None


def link_of(text: str | None) -> str | None:
    """The text where it is an address that a browser may be sent to, else None.

    Only http and https, so that no document brings a script along (``javascript:``) or names a file (``file:``);
    without a user's name, which would make ``https://bank.example@evil.example`` look like the bank.
    """
    if not text or _NOT_IN_A_URL.search(text):
        return None
    try:
        parts = urlsplit(text)
    except ValueError:
        return None
    safe = parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    return text if safe else None


class CorpusTexts:
    """Title, text and origin of rows."""

    def __init__(self, source: TextSource, rows: pa.Table, chunks: pa.Table | None, in_place: bool) -> None:
        """Build one.

        Args:
            source: the input.
            rows: where each row's text stands: id, file, row and digest.
            chunks: which of them are pieces of longer documents.
            in_place: whether the input's files are the user's own, so that their names say something.
        """
        self._source = source
        self._in_place = in_place
        self._files = rows.column("file").to_numpy()
        self._rows = rows.column("row").to_numpy()
        self._digests = rows.column("digest").combine_chunks()
        self._chunks = chunks
        # Row of a document's chunk in ``chunks``; null where it is whole.
        self._places = pc.index_in(rows.column("id"), chunks.column("id")) if chunks is not None else None
        self._columns = list(dict.fromkeys((*source.columns, *source.origin)))
        self._kept: dict[int, pa.Table] = {}
        self._room = _MEMORY_BYTES

    def read(self, rows: Rows) -> list[CorpusText]:
        """What is known of each row; nothing where the text is no longer the embedded one."""
        return [self._read(int(row)) for row in rows]

    def _read(self, row: int) -> CorpusText:
        file, number = int(self._files[row]), int(self._rows[row])
        if file >= len(self._source.files) or number >= self._source.files[file][1]:
            return CorpusText()
        table = self._row(file, number)
        if text_digest(texts_of(table, self._source)[0]) != self._digests[row].as_py():
            return CorpusText()
        said = {name: table.column(name)[0].as_py() for name in self._columns}
        source = said.get("source") or said.get("url")
        if source is None and self._in_place:
            source = f"{self._source.files[file][0]}:{number + 1}"
        chunk, chunks = self._chunk(row)
        return CorpusText(
            title=(said[self._source.title] if self._source.title else None) or None,
            text=said[self._source.text],
            source=source,
            url=link_of(said.get("url")) or link_of(source),
            chunk=chunk,
            chunks=chunks,
        )

    def _chunk(self, row: int) -> tuple[int | None, int | None]:
        place = None if self._places is None else self._places[row].as_py()
        if self._chunks is None or place is None:
            return None, None
        return self._chunks.column("chunk")[place].as_py(), self._chunks.column("chunks")[place].as_py()

    def _row(self, file: int, number: int) -> pa.Table:
        name, columns = self._source.files[file][0], self._columns
        if file not in self._kept:
            whole = self._source.place.read_table(name, columns) if self._room > 0 else None
            if whole is None or whole.nbytes > self._room:
                return self._source.place.read_rows(name, number, number + 1, columns)
            self._kept[file] = whole
            self._room -= whole.nbytes
        return self._kept[file].slice(number, 1)


def open_texts(vectors: Artefact, documents: str | None) -> CorpusTexts | None:
    """The texts of a vectors artefact, or None where they are nowhere to be found.

    Args:
        vectors: the artefact.
        documents: the input it was embedded from; None takes the copy that the artefact holds (of JSON lines and
            text files), the corpus artefact beside it, if it is the one that was embedded, or the input that the
            artefact says it was made from.

    Raises:
        DataError: an input that cannot be read, or the artefact says of no row where its text stands.
    """
    place = vectors.place
    source = _source(vectors, documents)
    if source is None:
        return None
    names = place.names(ROWS_FOLDER, ".parquet")
    if not names:
        raise DataError(
            f"{place.uri}/{ROWS_FOLDER}: missing, so which text belongs to which vector is unknown; embed again"
        )
    tables = [place.read_table(name, ["id", "file", "row", "digest"]) for name in names]
    rows, in_place = pa.concat_tables(tables), not place.exists(_COPIED)
    texts = CorpusTexts(source, rows, _chunks(source.place), in_place)
    if documents is not None and texts.read(np.zeros(1, np.int64))[0].text is None:
        raise DataError(
            f"serving.documents: {documents}: is not what {place.uri} was embedded from, or has changed since"
        )
    return texts


def _chunks(corpus: Place) -> pa.Table | None:
    """Which documents of a corpus artefact are pieces of longer ones."""
    names = corpus.names(_CHUNKS_FOLDER, ".parquet") if corpus.exists(MANIFEST_FILE) else []
    return pa.concat_tables(corpus.read_table(name) for name in names) if names else None


def _source(vectors: Artefact, documents: str | None) -> TextSource | None:
    place, given = vectors.place, dict(vectors.manifest["details"].get("input") or {})
    path = given.pop("path", None)
    config = EmbeddingConfig(**given)
    if place.exists(_COPIED):
        copied = place.names(DOCUMENTS_FOLDER, ".parquet")
        return open_input(str(place.local / DOCUMENTS_FOLDER), EmbeddingConfig(), place) if copied else None
    if documents is not None:
        return open_input(documents, config, place)
    beside = _beside(vectors)
    if beside is not None:
        return open_input(str(beside), config, place)
    if path is None:
        return None
    try:
        return open_input(path, config, place)
    except DataError as error:
        note("serve", f"hits are shown without their texts: {error}; serving.documents says where they are")
        return None


def _beside(vectors: Artefact) -> Path | None:
    """The corpus artefact beside the vectors of a run, if they are its vectors."""
    if not vectors.place.is_local:
        return None
    beside = vectors.place.local.parent / "corpus"
    if not (beside / MANIFEST_FILE).is_file():
        return None
    corpus = Artefact.open(Place(str(beside)), "corpus")
    # A run states the corpus's own fingerprint, `embedloom embed CORPUS` that of its state.
    known = {corpus.fingerprint, fingerprint(corpus.fingerprint)}
    return beside if not known.isdisjoint(vectors.manifest["inputs"].values()) else None


# An embedded corpus to search: its FAISS index, or exact search over its vectors, and the texts behind the rows.
#
# Loads torch through ``retrieval``; a gateway without a corpus never imports it.


class _Searcher(Protocol):
    """Anything that finds rows."""

    kind: str

    def rows(self, query: Vectors, count: int) -> tuple[Rows, Vectors]:
        """Rows and scores of the nearest vectors, best first: [<= count] each."""
        ...

    def scores(self, query: Vectors, rows: Rows) -> Vectors:
        """Scores of these rows' vectors: [rows]."""
        ...


class _Exact:
    """Every vector compared; equal scores in the order of their ids."""

    kind = "exact"

    def __init__(self, ids: pa.Array, vectors: Vectors) -> None:
        order = pc.sort_indices(ids).to_numpy()
        ranks = np.empty(len(ids), dtype=np.int64)
        ranks[order] = np.arange(len(ids), dtype=np.int64)
        self._row_of_rank = order
        self._vectors = vectors
        self._block = DocumentBlock(vectors, ranks)

    def rows(self, query: Vectors, count: int) -> tuple[Rows, Vectors]:
        best = self._block.search(query[None], count)
        return self._row_of_rank[best.positions[0]].astype(np.int64), best.scores[0]

    def scores(self, query: Vectors, rows: Rows) -> Vectors:
        return pair_scores(np.broadcast_to(query, (len(rows), len(query))), self._vectors[rows])


class _Faiss:
    """What the artefact's index finds."""

    def __init__(self, index: Any, kind: str) -> None:
        self.kind = kind
        self._index = index

    def rows(self, query: Vectors, count: int) -> tuple[Rows, Vectors]:
        scores, rows = self._index.search(np.ascontiguousarray(query[None], dtype=np.float32), count)
        found = rows[0] >= 0  # an approximate index may come back with fewer
        return rows[0][found], scores[0][found]

    def scores(self, query: Vectors, rows: Rows) -> Vectors:
        if not len(rows):
            return np.empty(0, np.float32)
        if self.kind == "ivf":
            self._index.make_direct_map()  # at once where it is there: vectors of cells are found by their row
        return pair_scores(
            np.broadcast_to(query, (len(rows), len(query))), self._index.reconstruct_batch(rows)
        )


class SearchCorpus:
    """A vectors artefact, ready to be asked with vectors of the model that made it, with words, or with both."""

    def __init__(
        self,
        ids: pa.Array,
        searcher: _Searcher,
        dimension: int,
        normalize: bool,
        contract_hash: str,
        texts: CorpusTexts | None,
        lexical: LexicalIndex | None = None,
        search: SearchConfig = DENSE,
    ) -> None:
        self.contract_hash = contract_hash
        self.card = _card(len(ids), dimension, searcher.kind, texts is not None, lexical is not None, search)
        self._ids = ids
        self._searcher = searcher
        self._dimension = dimension
        self._normalize = normalize
        self._texts = texts
        self._lexical = lexical
        self._fusion = search
        tuned = None if lexical is None else lexical.facts.get("weight")
        self._weight = next(one for one in (search.weight, tuned, USUAL_WEIGHT) if one is not None)

    def match_words(self, text: str) -> Vectors:
        """BM25 of every row: float32 [rows]; only where the artefact has an index of words."""
        if self._lexical is None:
            raise RuntimeError("a corpus without an index of words was asked for some")
        return self._lexical.scores(text)

    def search(
        self, query: Vectors | None, count: int, with_texts: bool, words: Vectors | None = None
    ) -> list[SearchHit]:
        """The best documents, best first: by vectors, by words, or by both, fused.

        Args:
            query: float32 [the model's dimension]; cut to the corpus's where its vectors are cut. None: by words alone.
            count: documents wanted.
            with_texts: whether titles, texts and where they come from come along.
            words: what ``match_words`` gave. None: by vectors alone.
        """
        rows, scores = self._found(query, count, words)
        ids = self._ids.take(pa.array(rows)).to_pylist()
        read = self._texts.read if self._texts is not None and with_texts else _unknown
        return [
            SearchHit(id=own, score=float(score), **asdict(text))
            for own, score, text in zip(ids, scores, read(rows), strict=True)
        ]

    def _found(self, query: Vectors | None, count: int, words: Vectors | None) -> tuple[Rows, Any]:
        count = min(count, len(self._ids))
        if query is None:
            return best_rows(np.empty(0, np.float32) if words is None else words, count)
        query = query[: self._dimension]
        if self._normalize:
            query = query / max(float(np.linalg.norm(query)), 1e-12)
        if words is None:
            return self._searcher.rows(query, count)
        depth = min(max(self._fusion.depth, count), len(self._ids))
        dense, lexical = Ranked(*self._searcher.rows(query, depth)), Ranked(*best_rows(words, depth))
        if self._fusion.fusion == "reciprocal_rank":
            fused = reciprocal_rank((dense, lexical), self._fusion.rank_constant)
        else:
            both = Candidates.of(
                dense,
                lexical,
                lambda rows: self._searcher.scores(query, rows),
                lambda rows: words[rows],
                floor=-1.0 if self._normalize else None,
            )
            fused = weighted_sum(both, self._weight)
        return fused.rows[:count], fused.scores[:count]


def _card(
    documents: int, dimension: int, kind: str, texts: bool, lexical: bool, search: SearchConfig
) -> CorpusCard:
    modes: list[SearchMode] = ["dense", "lexical", "hybrid"] if lexical else ["dense"]
    return CorpusCard(
        documents=documents, dimension=dimension, index=kind, texts=texts, modes=modes, mode=search.mode
    )


def card_of(vectors: Artefact, documents: str | None, search: SearchConfig) -> CorpusCard:
    """What ``load_corpus`` would say of an artefact, by its manifest and the heads of its files."""
    place = vectors.place
    names = place.names(VECTORS_FOLDER, ".parquet")
    texts, lexical = _source(vectors, documents) is not None, place.exists(LEXICAL_FACTS)
    if place.exists(FACTS_FILE):
        facts = place.read_json(FACTS_FILE)
        return _card(facts["rows"], facts["dimension"], facts["kind"], texts, lexical, search)
    rows = sum(place.parquet_footer(name)[1] for name in names)
    first = stored_vectors(place.read_rows(names[0], 0, 1), names[0])
    return _card(rows, int(first.shape[1]), "exact", texts, lexical, search)


def _unknown(rows: Rows) -> list[CorpusText]:
    return [CorpusText()] * len(rows)


def load_corpus(
    place: Place,
    documents: str | None,
    contract_hash: str,
    model: str,
    normalize: bool,
    search: SearchConfig = DENSE,
    mapped: bool = False,
) -> SearchCorpus:
    """Open a vectors artefact for search, checked against the model that will embed the queries.

    Args:
        place: the artefact.
        documents: the input it was embedded from; None: look beside it.
        contract_hash: of the served model.
        model: what ``ModelFolder.id`` says of the served model.
        normalize: whether its vectors have unit length.
        search: how it is searched where requests do not say it.
        mapped: whether vectors and index are mapped from files, so that several processes of a node share their memory;
            vectors are written out once a node, in float32, into its cache.

    Raises:
        ConfigError: searches by words are the rule, and it was embedded without an index of them.
        DataError: no finished artefact of documents, or one of another contract or other weights.
        MissingDependency: it has an index and FAISS is not installed.
    """
    artefact = check_corpus(place, contract_hash, model, search)
    if place.exists(FACTS_FILE):
        index = load_index(place, contract_hash, mapped)
        ids, dimension = index.ids.combine_chunks(), index.dimension
        searcher: _Searcher = _Faiss(index.faiss_index, str(place.read_json(FACTS_FILE)["kind"]))
    else:
        read = _mapped_vectors if mapped else read_vectors
        names, vectors = read(place, VECTORS_FOLDER, contract_hash)
        ids, dimension = pa.array(names, pa.string()), int(vectors.shape[1])
        searcher = _Exact(ids, vectors)
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks)
    texts = open_texts(artefact, documents)
    lexical = load_lexical(place)
    if lexical is not None and len(lexical) != len(ids):
        raise DataError(
            f"{place.uri}: {len(ids)} vectors, its index of words has {len(lexical)} rows; embed again"
        )
    return SearchCorpus(ids, searcher, dimension, normalize, contract_hash, texts, lexical, search)


def _mapped_vectors(place: Place, folder: str, contract_hash: str) -> tuple[list[str], Vectors]:
    """As ``read_vectors``, the vectors in a file of this node's cache that all its processes map."""
    states = {name: [str(part) for part in state] for name, state in place.child(folder).states().items()}
    key = fingerprint(place.uri, contract_hash, states)

    def write(out: Path) -> None:
        ids, vectors = read_vectors(place, folder, contract_hash)
        np.save(out / "vectors.npy", vectors)
        (out / "ids.json").write_text(json.dumps(ids))

    # Of corpora that were embedded again, the copies of before stay: who else reads them is unknown.
    made = made_once(cache_folder() / "corpora" / key, write)
    vectors = np.load(made / "vectors.npy", mmap_mode="r")
    return json.loads((made / "ids.json").read_text()), vectors


def check_corpus(place: Place, contract_hash: str, model: str, search: SearchConfig = DENSE) -> Artefact:
    """The artefact, if the served model made it.

    Raises:
        ConfigError: it is of queries, or is to be searched by words and has no index of them.
        DataError: see ``load_corpus``.
    """
    artefact = Artefact.open(place, "vectors")
    details = artefact.manifest["details"]
    check_same_contract(("the served model", contract_hash), (place.uri, str(details.get("contract_hash"))))
    if details.get("model_id") != model:
        raise DataError(
            f"serving.corpus: {place.uri}: embedded by model {details.get('model_id')!r}, the served model is {model!r}; "
            "vectors of different weights cannot be compared, embed the corpus with the served model"
        )
    side = dict(details.get("recipe") or {}).get("side", "document")
    if side != "document":
        raise ConfigError(f"serving.corpus: {place.uri}: its vectors are of side {side!r}; allowed: document")
    if search.mode != "dense" and not place.exists(LEXICAL_FACTS):
        raise ConfigError(
            f"serving.search.mode: {search.mode!r}, but {place.uri} has no index of words; allowed here: dense, or embed it "
            "again with embedding.lexical (`embedloom embed ... --lexical`), which keeps its vectors"
        )
    return artefact
