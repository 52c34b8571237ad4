"""Bitext mining: a text, a good translation, and one that reads well but is wrong in detail (arXiv 2401.00368)."""

from collections.abc import Mapping

from embedloom.config.families import BitextConfig
from embedloom.synthesis.families.opposite import Opposite


class Bitext(Opposite[BitextConfig]):
    """One text with two translations an attempt."""

    name = "bitext"
    task_type = "bitext"

    def same_reason(self, texts: Mapping[str, str]) -> str:
        """A translation that is its source was not translated."""
        same = texts["S1"].casefold() in (texts["S2"].casefold(), texts["S3"].casefold())
        return "untranslated" if same else "repeats_itself"
