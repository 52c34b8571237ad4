"""Long texts on both sides: matching a document with another."""

from embedloom.config.families import LongLongConfig
from embedloom.synthesis.families.triples import Triples


class LongLong(Triples[LongLongConfig]):
    """A document, one that matches it with few words in common, and one that does not match."""

    name = "long_long"
    fields = ("input", "positive_document", "hard_negative_document")
    documents = fields

    def limits(self, options: LongLongConfig) -> dict[str, int]:
        """Field -> most characters."""
        return dict.fromkeys(self.fields, options.max_document_characters)
