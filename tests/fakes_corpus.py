"""Small tokenizers and source files for the corpus tests; never imported by the package."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from embedloom.config.corpus import CorpusSource
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.storage import Place


def save_word_tokenizer(folder: Path) -> Path:
    """One token a word: every run of characters between blanks counts as one (unknown) token."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return folder


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def jsonl_source(path: Path, **settings: object) -> CorpusSource:
    return CorpusSource(format="jsonl", path=str(path), **settings)


def corpus_writer(folder: Path) -> ArtefactWriter:
    return ArtefactWriter(Place(str(folder)), "corpus", "config", {}, "local")


def sentence(number: int, words: int = 20) -> str:
    """A text unlike that of every other number."""
    return " ".join(f"word{number}x{index}" for index in range(words))
