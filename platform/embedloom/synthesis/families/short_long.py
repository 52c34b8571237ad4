"""Short query, long documents: the usual shape of search."""

from embedloom.config.families import ShortLongConfig
from embedloom.synthesis.families.triples import Triples


class ShortLong(Triples[ShortLongConfig]):
    """A query, a document that answers it, and one that looks as if it did."""

    name = "short_long"
    fields = ("user_query", "positive_document", "hard_negative_document")
    documents = ("positive_document", "hard_negative_document")

    def limits(self, options: ShortLongConfig) -> dict[str, int]:
        """Field -> most characters."""
        most = options.max_document_characters
        return {
            "user_query": options.max_query_characters,
            "positive_document": most,
            "hard_negative_document": most,
        }
