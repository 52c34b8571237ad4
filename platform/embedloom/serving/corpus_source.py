"""Which corpus is searched, in a form that is cheap to send: a gateway without one must not import torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedloom.model_folder import ModelFolder
from embedloom.storage import Place, absolute

if TYPE_CHECKING:
    from embedloom.serving.corpus import SearchCorpus


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """A vectors artefact, and the model that must have made it."""

    uri: str
    documents: str | None
    contract_hash: str
    model_id: str
    normalize: bool

    @classmethod
    def of(cls, corpus: str, documents: str | None, model: ModelFolder) -> "CorpusSource":
        """The source of a config's paths, absolute for replicas that run in other folders."""
        texts = None if documents is None else absolute(documents)
        return cls(absolute(corpus), texts, model.contract.hash, model.id, model.contract.normalize)

    def check(self) -> None:
        """Raise DataError or ConfigError if another model made it; reads the manifest only."""
        from embedloom.serving.corpus import check_corpus

        check_corpus(Place(self.uri), self.contract_hash, self.model_id)

    def open(self) -> "SearchCorpus":
        """The corpus, loaded."""
        from embedloom.serving.corpus import load_corpus

        return load_corpus(Place(self.uri), self.documents, self.contract_hash, self.model_id, self.normalize)
