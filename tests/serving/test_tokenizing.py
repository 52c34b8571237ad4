import numpy as np
import pytest

from embedloom.encoder.model import Encoder
from embedloom.serving.messages import Part, Refusal
from embedloom.serving.service import given_ids, text_ids
from fakes_serving import BOS, FakeEncoder

EVERYTHING = slice(0, None)


def ids_of(encoder, part: Part, truncate: str):
    return text_ids(encoder, part, EVERYTHING, truncate)


def test_cutting_the_start_keeps_bos_and_the_end_of_the_text():
    encoder = FakeEncoder(limit=16)
    text = "0123456789abcdefghij"
    (ids,) = ids_of(encoder, Part("document", [text]), "start")
    assert ids == encoder.tokenizer([text[-15:]])["input_ids"][0]
    assert ids[0] == BOS


def test_cutting_the_start_of_a_query_keeps_its_instruction():
    encoder = FakeEncoder(limit=32)
    (ids,) = ids_of(encoder, Part("query", ["abcdefghijklmnop"], instruction="Find"), "start")
    prompt = "Instruct: Find\nQuery: "
    kept = 32 - 1 - len(prompt)
    assert ids == encoder.tokenizer([prompt + "abcdefghijklmnop"[-kept:]])["input_ids"][0]


def test_an_instruction_that_fills_the_limit_is_refused():
    refusal = ids_of(FakeEncoder(limit=16), Part("query", ["abc"], instruction="Find it"), "start")
    assert isinstance(refusal, Refusal)
    assert "alone fill the limit of 16" in refusal.message


@pytest.mark.parametrize("text", ["word " * 60, "größer 日本語 " * 20, "x" * 200])
def test_a_real_tokenizer_cut_at_the_start_ends_like_the_whole_text(tiny_model, text):
    encoder = Encoder.load(tiny_model, dtype="float32")
    (whole,) = encoder.tokenizer([text])["input_ids"]
    (ids,) = ids_of(encoder, Part("document", [text]), "start")
    assert len(ids) == 64 and len(whole) > 64
    assert ids[0] == whole[0] == encoder.tokenizer.bos_token_id
    assert ids[1:] == whole[-63:]
    assert np.isfinite(encoder.embed_tokens([ids])).all()


def test_short_texts_are_the_same_however_they_would_be_cut():
    encoder = FakeEncoder()
    part = Part("query", ["ab", "c"], instruction="Find")
    assert ids_of(encoder, part, "none") == ids_of(encoder, part, "start") == ids_of(encoder, part, "end")


def test_refusals_name_the_item_of_the_whole_request():
    encoder = FakeEncoder(limit=16)
    refusal = text_ids(
        encoder, Part("document", ["ok", "ok", "x" * 40], name="documents"), slice(1, 3), "none"
    )
    assert refusal.message.startswith("documents[2] has 41 tokens")
    assert refusal.param == "documents"


@pytest.mark.parametrize(("truncate", "kept"), [("start", slice(-64, None)), ("end", slice(0, 64))])
def test_token_ids_are_cut_at_either_end(truncate, kept):
    given = list(range(100))
    assert given_ids(FakeEncoder(), Part("document", token_ids=[given]), truncate) == [given[kept]]


def test_an_instruction_that_leaves_nothing_of_a_query_cut_at_its_end_is_refused():
    # BOS, "Instruct: ", the instruction, "\nQuery: ": 1 + 10 + n + 8 tokens.
    for length, refused in ((12, False), (13, True), (40, True)):
        part = Part("query", ["abc"], instruction="i" * length, name="query", is_list=False)
        found = ids_of(FakeEncoder(limit=32), part, "end")
        assert isinstance(found, Refusal) == refused, length
    assert (found.param, found.code) == ("instruction", "context_length_exceeded")
    assert found.message.startswith("instruction: it alone fills the limit of 32 tokens for a query")
    (ids,) = ids_of(FakeEncoder(limit=32), Part("document", ["x" * 99]), "end")
    assert len(ids) == 32
