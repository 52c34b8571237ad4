"""Phrases or sentences on both sides."""

from embedloom.config.families import ShortShortConfig
from embedloom.synthesis.families.triples import Triples


class ShortShort(Triples[ShortShortConfig]):
    """A phrase, one that matches it with few words in common, and one that does not match."""

    name = "short_short"
    fields = ("input", "positive_document", "hard_negative_document")
    documents = ()

    def limits(self, options: ShortShortConfig) -> dict[str, int]:
        """Field -> most characters."""
        return dict.fromkeys(self.fields, options.max_query_characters)
