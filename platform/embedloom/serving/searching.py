"""Where the served corpus is searched: in threads of the process that answers HTTP, or in replicas of a deployment of its own.

Replicas of their own are scaled by what is searched, and not by what is embedded or parsed; vectors that are searched exactly, and
FAISS indexes that can be read so, are mapped from a file of the node's cache, so that its replicas hold them once.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from embedloom.config.serving import SearchConfig, ServingConfig
from embedloom.core.artefacts import Artefact, fingerprint
from embedloom.core.model_folder import ModelFolder
from embedloom.core.storage import Place, absolute
from embedloom.serving.messages import Vectors
from embedloom.serving.schemas import CorpusCard, SearchHit

if TYPE_CHECKING:
    from embedloom.serving.corpus import SearchCorpus

SEARCHERS = "search"  # the deployment
_MOVED_SECONDS = 0.5  # between two tries while replicas change to the corpus that this process serves


# Which corpus is searched, in a form that is cheap to send: a gateway without one must not import torch.


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """A vectors artefact, and the model that must have made it."""

    uri: str
    documents: str | None
    contract_hash: str
    model_id: str
    normalize: bool
    search: SearchConfig

    @classmethod
    def of(cls, corpus: str, serving: ServingConfig, model: ModelFolder) -> "CorpusSource":
        """The source of a config's paths, absolute for replicas that run in other folders."""
        texts = None if serving.documents is None else absolute(serving.documents)
        contract = model.contract
        return cls(absolute(corpus), texts, contract.hash, model.id, contract.normalize, serving.search)

    def check(self) -> None:
        """Raise DataError or ConfigError if another model made it; reads the manifest only."""
        from embedloom.serving.corpus import check_corpus

        check_corpus(Place(self.uri), self.contract_hash, self.model_id, self.search)

    @property
    def identity(self) -> str:
        """What tells it from the corpus of another version of the endpoint."""
        return fingerprint(asdict(self))

    def card(self) -> CorpusCard:
        """What it is, by its manifest and the heads of its files."""
        from embedloom.serving.corpus import card_of

        return card_of(Artefact.open(Place(self.uri), "vectors"), self.documents, self.search)

    def open(self, mapped: bool = False) -> "SearchCorpus":
        """The corpus, loaded; ``mapped`` where several processes of a node open it, which then share its vectors."""
        from embedloom.serving.corpus import load_corpus

        return load_corpus(
            Place(self.uri),
            self.documents,
            self.contract_hash,
            self.model_id,
            self.normalize,
            self.search,
            mapped,
        )


class Corpus(Protocol):
    """Embedded documents that can be searched."""

    card: CorpusCard
    contract_hash: str

    def match_words(self, text: str) -> Vectors:
        """How well the words of every document match: [documents]; where ``card.modes`` has lexical."""
        ...

    def search(
        self, query: Vectors | None, count: int, with_texts: bool, words: Vectors | None = None
    ) -> list[SearchHit]:
        """The best documents, best first: by a query vector [dimension], by matches of words, or by both."""
        ...


class Lookup(ABC):
    """A corpus as the routes ask it, wherever it is searched."""

    card: CorpusCard
    contract_hash: str

    @abstractmethod
    def words(self, text: str) -> Awaitable[Any]:
        """The matches of a text's words, for ``search``; begun at once where that can be."""

    @abstractmethod
    async def search(
        self, query: Vectors | None, count: int, with_texts: bool, words: Awaitable[Any] | None = None
    ) -> list[SearchHit]:
        """The best documents, best first.

        Args:
            query: float32 [dimension]; None: by words alone.
            count: documents wanted.
            with_texts: whether titles and texts come along.
            words: what ``words`` gave; None: by the vector alone.
        """


class InThreads(Lookup):
    """Searched here: one thread for vectors, one for words, which a hybrid search keeps busy both."""

    def __init__(self, corpus: Corpus) -> None:
        self.card, self.contract_hash = corpus.card, corpus.contract_hash
        self._corpus = corpus
        self._search_thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._words_thread = ThreadPoolExecutor(1, thread_name_prefix="words")

    @classmethod
    def of(cls, corpus: Corpus | Lookup | None) -> Lookup | None:
        """A corpus as the routes ask it; one that is searched elsewhere stays there."""
        return corpus if corpus is None or isinstance(corpus, Lookup) else cls(corpus)

    def words(self, text: str) -> Awaitable[Any]:
        """See ``Lookup``: looked up while the query is embedded, so that a hybrid search takes hardly longer than a dense one."""
        return asyncio.get_running_loop().run_in_executor(self._words_thread, self._corpus.match_words, text)

    async def search(
        self, query: Vectors | None, count: int, with_texts: bool, words: Awaitable[Any] | None = None
    ) -> list[SearchHit]:
        """See ``Lookup``."""
        matches = None if words is None else await words
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._search_thread, self._corpus.search, query, count, with_texts, matches
        )


@dataclass(frozen=True, slots=True)
class Search:
    """One search, on its way to a replica."""

    identity: str  # of the corpus that the asking process serves
    query: Vectors | None
    count: int
    with_texts: bool
    text: str | None  # whose words are looked up there; None: by the vector alone


Call = Callable[[str, Search], Awaitable[Any]]


class RemoteCorpus(Lookup):
    """Searched by replicas behind a Serve handle."""

    def __init__(self, call: Call, identity: str, card: CorpusCard, contract_hash: str) -> None:
        """Build one.

        Args:
            call: calls a method of one of the replicas, again where one died.
            identity: ``CorpusSource.identity`` of the corpus that is served.
            card: what it is.
            contract_hash: what its queries are embedded under.
        """
        self.card, self.contract_hash = card, contract_hash
        self._call, self._identity = call, identity

    def words(self, text: str) -> Awaitable[Any]:
        """See ``Lookup``: the text itself; its matches are as many numbers as there are documents, so they are made over there."""
        known: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        known.set_result(text)
        return known

    async def search(
        self, query: Vectors | None, count: int, with_texts: bool, words: Awaitable[Any] | None = None
    ) -> list[SearchHit]:
        """See ``Lookup``. While a deploy changes the corpus, waits for a replica that has this one, as long as the request may."""
        text = None if words is None else await words
        asked = Search(self._identity, query, count, with_texts, text)
        while (found := await self._call("search", asked)) is None:
            await asyncio.sleep(_MOVED_SECONDS)
        return list(found)


class SearchReplica:
    """One of the replicas that search a corpus; its methods are called by handle, never by HTTP."""

    def __init__(self, source: CorpusSource, threads: int) -> None:
        """Load it.

        Args:
            source: of the corpus.
            threads: that one search may take.
        """
        self._identity = source.identity
        corpus = source.open(mapped=True)
        import torch

        torch.set_num_threads(threads)
        self._lookup = InThreads(corpus)

    async def search(self, asked: Search) -> list[SearchHit] | None:
        """See ``Lookup.search``; None: this replica has another corpus than the one that is asked."""
        if asked.identity != self._identity:
            return None
        words = None if asked.text is None else self._lookup.words(asked.text)
        return await self._lookup.search(asked.query, asked.count, asked.with_texts, words)
