import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.corpus.dedup import choose_bands, exact_duplicates, near_duplicates


def shingle_set(text):
    """Word 5-grams by plain Python, for texts of lower-case words."""
    words = text.split()
    size = min(5, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} if words else set()


def brute_force(texts, threshold):
    """The definition: each text against every kept one before it."""
    kept, dropped = [], {}
    for position, text in enumerate(texts):
        own = shingle_set(text)
        for first in kept:
            other = shingle_set(texts[first])
            similarity = len(own & other) / len(own | other) if own | other else 0.0
            if own and similarity >= threshold:
                dropped[position] = (first, similarity)
                break
        else:
            kept.append(position)
    return dropped


def edited_texts(seed, count, words=60):
    """Texts of which many are light edits of earlier ones."""
    source = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(200)]
    texts = []
    for _ in range(count):
        if texts and source.random() < 0.5:
            text = source.choice(texts).split()
            for _ in range(source.randrange(4)):
                text[source.randrange(len(text))] = source.choice(vocabulary)
        else:
            text = source.choices(vocabulary, k=source.randrange(1, words))
        texts.append(" ".join(text))
    return texts


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_near_duplicates_equal_brute_force(threshold):
    for seed in range(4):
        texts = edited_texts(seed, 120)
        found = near_duplicates(texts, threshold)
        assert found == brute_force(texts, threshold)
        assert found or threshold == 1.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=12))
def test_near_duplicates_of_tiny_texts_equal_brute_force(texts):
    assert near_duplicates(texts, 0.6) == brute_force(texts, 0.6)


def test_true_similarity_decides_at_the_threshold():
    base = [f"w{i}" for i in range(13)]  # 9 five-grams
    longer = [*base, "x"]  # the same 9 and one more: Jaccard 9/10
    texts = [" ".join(base), " ".join(longer)]
    assert near_duplicates(texts, 0.9) == {1: (0, 0.9)}
    assert near_duplicates(texts, 0.9001) == {}


def test_a_dropped_text_drops_no_other():
    def words(start):
        return " ".join(f"w{i}" for i in range(start, start + 40))

    chain = [words(0), words(3), words(6)]  # neighbours 33/39 = 0.846, the ends 30/42 = 0.71
    assert list(near_duplicates(chain, 0.8)) == [1]


def test_scripts_without_blanks_are_compared_by_character():
    text = "自然言語処理の研究は多くの応用を持つ分野であり今も発展している"
    assert near_duplicates([text, text[:-1] + "た", "全く別の内容を述べる文章がここにある"], 0.8).keys() == {
        1
    }


def test_punctuation_and_case_make_no_difference_to_near_duplicates():
    assert near_duplicates(["One two, three four five six!", "one TWO three four; five six"], 1.0) == {
        1: (0, 1.0)
    }


def test_texts_without_words_are_no_near_duplicates():
    assert near_duplicates(["...", "!!!", "", "a"], 0.5) == {}


def test_exact_duplicates_ignore_case_and_blanks():
    assert exact_duplicates(["One two", "three", "one\n  TWO ", "One, two", "THREE"]) == {2: 0, 4: 1}


@pytest.mark.parametrize(("threshold", "expected"), [(0.8, (128, 4)), (1.0, (128, 64)), (0.5, (128, 2))])
def test_bands_by_hand(threshold, expected):
    # (1 - 0.8**4)**32 = 4.7e-8 and (1 - 0.8**5)**25 = 4.9e-5; (1 - 0.5**2)**64 = 1.0e-8 and (1 - 0.5**3)**42 = 3.7e-3
    assert choose_bands(threshold) == expected


@given(st.floats(min_value=0.01, max_value=1.0))
def test_bands_keep_the_chance_of_a_miss(threshold):
    permutations, rows = choose_bands(threshold)
    assert (1 - threshold**rows) ** (permutations // rows) <= 1e-6


def test_ten_thousand_documents_take_seconds():
    source = random.Random(0)
    vocabulary = [f"term{i}" for i in range(5000)]
    texts = [" ".join(source.choices(vocabulary, k=100)) for _ in range(10_000)]  # about 800 characters each
    texts[9_999] = texts[5]
    started = time.process_time()
    assert near_duplicates(texts, 0.8) == {9_999: (5, 1.0)}
    assert time.process_time() - started < 15
