"""Reader of plain text, Markdown and reStructuredText: one file is one document and one group."""

from collections.abc import Iterator

from embedloom.config.data import CorpusSource
from embedloom.corpus.columns import files_of, label_of
from embedloom.corpus.rows import SourceRow
from embedloom.formats import TEXT_ENDINGS, read_text


def read_text_files(source: CorpusSource) -> Iterator[SourceRow]:
    """One row a file; the title is the first Markdown heading, else the file's name without its ending.

    Raises:
        DataError: no file, or one that is not UTF-8.
    """
    for path in files_of(source, TEXT_ENDINGS):
        title, text = read_text(path)
        label = label_of(source, path)
        yield SourceRow(text=text, title=title, lang=source.lang, source=label, group=label)
