"""The checks: language, label leak, copies, duplicates, contamination."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedloom.config.synthesis import ContaminationCheck, LanguageCheck, QualityConfig
from embedloom.core.storage import Place
from embedloom.core.text import band_rows
from embedloom.errors import DataError
from embedloom.synthesis.checks import (
    RowContext,
    build_index,
    check_row,
    evaluation_texts,
    language_problem,
    load_index,
    save_index,
)
from embedloom.synthesis.duplicates import band_keys, exact_key, signature
from embedloom.synthesis.families.base import Attempt, Reject, Row

SENTENCES = {
    "eng": "The committee approved the new budget after a long debate.",
    "deu": "Der Ausschuss hat den neuen Haushalt nach langer Debatte genehmigt.",
    "fra": "Le comité a approuvé le nouveau budget après un long débat.",
    "jpn": "委員会は長い議論の末に新しい予算を承認しました。",
    "rus": "Комитет утвердил новый бюджет после долгих обсуждений.",
    "swa": "Kamati iliidhinisha bajeti mpya baada ya mjadala mrefu.",
    "ara": "وافقت اللجنة على الميزانية الجديدة بعد نقاش طويل.",
}
WORDS = [f"w{number}" for number in range(40)]


def row(query: str, positive: str | None = None, **changes: Any) -> Row:
    plain: Row = {
        "query": query, "positive": positive, "negatives": None, "task_type": "retrieval", "lang": "eng",
        "document_lang": "eng", "origin": "synthetic",
    }  # fmt: skip
    return plain | changes


def problem(one: Row, **quality: Any) -> str | None:
    attempt = Attempt("a", "k", "llm", 0, "eng", "eng", 1)
    found = check_row(one, RowContext(attempt, QualityConfig(**quality), None, ()))
    return found.reason if found else None


class TestLanguage:
    check = LanguageCheck()

    @pytest.mark.parametrize("language", SENTENCES)
    def test_a_text_in_its_language_passes_and_in_another_does_not(self, language: str):
        for written, text in SENTENCES.items():
            found = language_problem(text, language, self.check)
            assert (found is None) == (written == language), (language, written, found)

    @pytest.mark.parametrize(
        ("text", "language"),
        [
            ("tar -xzf", "eng"),  # too short to judge
            (SENTENCES["eng"], "ast"),  # unknown to the model
            ("Komisija je odobrila novi proračun nakon duge rasprave.", "srp"),  # Croatian: too close to tell
            ("12 345 678 ... 9 !! ??", "deu"),  # no letters
        ],
    )
    def test_what_cannot_be_judged_passes(self, text: str, language: str):
        assert language_problem(text, language, self.check) is None

    def test_positives_and_negatives_are_judged_in_the_documents_language(self):
        mixed = row(SENTENCES["eng"], SENTENCES["fra"], document_lang="fra", negatives=[SENTENCES["deu"]])
        assert problem(mixed) == "language"
        assert (
            problem(mixed | {"negatives": ["Le vieux chat gris dort tranquillement sur la chaise."]}) is None
        )


@pytest.mark.parametrize(
    ("text", "label", "leaks"),
    [
        ("What a great phone, I love it.", "positive", False),
        ("A positive surprise in every way.", "positive", True),
        ("It breaks all the time.", "Very Bad", False),
        ("It was a BAD choice.", "very bad", True),
        ("We sat on the beach of the lake.", "end of life", False),  # "of" is in any text
        ("这个产品很好", "好评", False),  # 很好 is "very good", 好评 "good review": one character is no word
        ("这个产品得到很多好评。", "好评", True),
        ("यह फ़ोन बहुत अच्छा है और मुझे पसंद आया।", "सकारात्मक", False),
        ("यह एक सकारात्मक समीक्षा है।", "सकारात्मक", True),
        ("मैं घर में हूँ।", "हिंदी में", False),  # "में" is in any text
        ("ข่าวนี้เกี่ยวกับการเมืองในประเทศ", "กีฬา", False),
        ("ข่าวกีฬาวันนี้", "กีฬา", True),
        ("இந்த படம் எனக்கு மிகவும் பிடித்தது.", "நேர்மறை", False),
        ("এটি একটি ইতিবাচক মন্তব্য।", "ইতিবাচক", True),
        ("오늘 경기는 긍정적인 결과였다.", "긍정", True),
        ("Это и то, и другое.", "и", False),
    ],
)
def test_label_words_in_the_text_are_a_leak(text: str, label: str, leaks: bool):
    one = row(text, label, task_type="classification", negatives=["other"])
    assert problem(one, language=None) == ("label_leak" if leaks else None)
    assert problem(one, language=None, label_leak=False) is None
    assert problem(row(text, label), language=None) is None, "only classification has labels"


def test_a_query_that_stands_in_its_written_document_is_a_copy():
    assert problem(row("new budget", SENTENCES["eng"])) == "copies_document"
    assert problem(row("budget of the year", SENTENCES["eng"])) is None
    assert problem(row("new budget", SENTENCES["eng"], task_type="sts")) is None


class TestDuplicates:
    def test_equal_but_for_case_blanks_and_forms(self):
        assert exact_key(row("How  do I sort?")) == exact_key(row("how do i SORT?"))
        assert exact_key(row("ＡＢＣ")) == exact_key(row("abc"))  # noqa: RUF001 - full-width letters are the point
        assert exact_key(row("How do I sort?")) != exact_key(row("How do I search?"))

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            ("How do I sort an array by its second column?", "How do I sort an array by the second column?"),
            ("How do I sort an array by its second column?", "What is the capital of France, and why?"),
            (
                "配列を二番目の列で並べ替えるにはどうすればよいですか",
                "配列を三番目の列で並べ替えるにはどうすればよいですか",
            ),
            ("ab", "ab"),
        ],
    )
    def test_a_signature_estimates_the_jaccard_similarity(self, left: str, right: str):
        grams = [
            {t[n : n + 5] for n in range(max(1, len(t) - 4))} for t in (left.casefold(), right.casefold())
        ]
        true = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
        estimate = np.mean(
            [
                a == b
                for a, b in zip(
                    *(np.frombuffer(signature(row(text)), "<u4") for text in (left, right)), strict=True
                )
            ]
        )
        assert estimate == pytest.approx(true, abs=4 * 0.0442)  # four standard errors
        assert len(signature(row(left))) == 512

    def test_bands_are_as_long_as_the_miss_chance_allows(self):
        for threshold in (0.5, 0.7, 0.8, 0.9, 0.95):
            rows = band_rows(threshold, 128, 1e-3)
            assert (1 - threshold**rows) ** (128 // rows) <= 1e-3
            assert (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > 1e-3
        assert band_rows(1.0, 128, 1e-3) == 128

    def test_like_queries_share_a_band_and_unlike_ones_do_not(self):
        first, second = (
            signature(row(f"How do I sort a very long array of numbers by its {word} column in one pass?"))
            for word in ("second", "seventh")
        )
        other = signature(row("Where can the oldest lighthouse of the northern coast be visited in winter?"))
        keys = [set(band_keys(one, 0.8)) for one in (first, second, other)]
        assert keys[0] & keys[1] and not keys[0] & keys[2]
        assert len(keys[0]) == 128 // band_rows(0.8, 128, 1e-3)
        assert all(0 <= key < 2**64 for key in keys[0])


class TestContamination:
    def test_a_whole_evaluation_text_is_refused_whatever_its_case(self):
        index = build_index(["Who wrote the first novel?", "Why?", "誰が最初の小説を書いたか"])
        assert isinstance(index.problem("who wrote the FIRST novel", 0.3), Reject)
        assert isinstance(index.problem("誰が最初の小説を書いたか。", 0.3), Reject)
        assert index.problem("Why?", 0.3) is None  # too short not to be chance
        assert index.problem("Who wrote the second novel?", 0.3) is None

    def test_the_share_of_13_grams_decides(self):
        index = build_index([" ".join(WORDS[:20])])  # 8 of them
        text = " ".join([*WORDS[:20], *WORDS[30:]])  # 18, of which the first 8 are shared
        found = index.problem(text, 0.4)
        assert isinstance(found, Reject) and found.detail.startswith("44%")
        assert index.problem(text, 0.45) is None
        assert index.problem(" ".join(WORDS[20:]), 0.0) is None

    def test_a_saved_index_is_the_same(self, tmp_path: Path):
        index = build_index([" ".join(WORDS), "a second text of some length"])
        place = Place(str(tmp_path))
        save_index(place, "guard.npz", index)
        again = load_index(place, "guard.npz")
        np.testing.assert_array_equal(again.grams, index.grams)
        np.testing.assert_array_equal(again.texts, index.texts)
        assert len(again.grams) == 28
        assert build_index([]).problem(" ".join(WORDS), 0.0) is None

    def test_texts_come_from_files_and_the_held_out_split(self, tmp_path: Path):
        pq.write_table(pa.table({"id": ["1"], "text": ["from parquet"], "x": [None]}), tmp_path / "a.parquet")
        (tmp_path / "b.jsonl").write_text(json.dumps({"query": "from lines", "n": 1}) + "\n")
        corpus = Place(str(tmp_path / "corpus"))
        documents = pa.table({"id": ["d"], "title": ["T"], "text": ["held out"]})
        for split in ("train", "dev", "test"):
            corpus.write_table(f"documents/{split}/part-000000.parquet", documents)
        corpus.write_table("pairs/test/part-000000.parquet", pa.table({"query": ["a test query"]}))
        check = ContaminationCheck(files=(str(tmp_path / "*.*"),))
        assert sorted(evaluation_texts(check, corpus)) == [
            "T held out", "T held out", "a test query", "from lines", "from parquet",
        ]  # fmt: skip
        without = ContaminationCheck(files=(str(tmp_path / "b.jsonl"),), heldout=False)
        assert list(evaluation_texts(without, corpus)) == ["from lines"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("c.txt", "x", "read from Parquet or JSON lines"),
            ("c.jsonl", '{"body": "x"}', "none of the columns query, text, .*; found body"),
            (None, "", "matches no file"),
        ],
    )
    def test_files_it_cannot_read_are_named(
        self, tmp_path: Path, name: str | None, content: str, message: str
    ):
        if name:
            (tmp_path / name).write_text(content)
        check = ContaminationCheck(files=(str(tmp_path / (name or "absent.jsonl")),), heldout=False)
        with pytest.raises(DataError, match=message):
            list(evaluation_texts(check, Place(str(tmp_path))))
