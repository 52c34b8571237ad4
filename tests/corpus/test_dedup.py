import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.core.text import Words, distinct_ngrams, minhash, minhashes, ngram_hashes
from embedloom.corpus.dedup import (
    MOST_IN_A_BAND,
    WORDS_PER_SHINGLE,
    bands_of,
    choose_bands,
    exact_duplicates,
    first_matches,
    jaccard,
    least_agreement,
    propose,
)


def near_duplicates(texts, threshold, crowded=0):
    """Text to drop -> (kept one, similarity): bands, pairs, verification and choice without the files between them."""
    shingles, offsets = distinct_ngrams(texts, WORDS_PER_SHINGLE, Words())
    sets = [shingles[start:stop] for start, stop in pairwise(offsets)]
    later, earlier, keys = propose(bands_of(shingles, offsets, np.arange(len(texts)), threshold), threshold)
    assert keys == crowded
    similarity = np.array(
        [jaccard(sets[one], sets[other]) for one, other in zip(later, earlier, strict=True)]
    )
    near = similarity >= threshold
    rows, firsts, found = first_matches(later[near], earlier[near], similarity[near])
    return dict(zip(rows.tolist(), zip(firsts.tolist(), found.tolist(), strict=True), strict=True))


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


def test_exact_duplicates_point_to_the_first_position():
    """Both halves of a digest must agree."""
    digests = np.array([7, 7, 9, 7, 9, 7], dtype=np.uint64)
    halves = np.array([1, 2, 3, 1, 3, 1], dtype=np.uint64)
    rows, firsts = exact_duplicates(digests, halves, np.array([50, 10, 30, 20, 40, 60]))
    assert dict(zip(rows.tolist(), firsts.tolist(), strict=True)) == {50: 20, 60: 20, 40: 30}


def test_signatures_and_ngrams_of_many_texts_are_those_of_each():
    texts = [*edited_texts(1, 300), "", "...", "a", "a b", "मेरा नाम", "今日は"]
    shingles, offsets = distinct_ngrams(texts, 5, Words())
    signatures = minhashes((shingles >> np.uint64(32)).astype(np.uint32), offsets, 128)
    for number, text in enumerate(texts):
        own = np.unique(ngram_hashes(text, 5, {}))
        assert np.array_equal(shingles[offsets[number] : offsets[number + 1]], own)
        # datasketch's own
        assert np.array_equal(signatures[number], minhash((own >> np.uint64(32)).tolist(), 128, int))


def test_sketches_hardly_ever_miss_a_pair_at_the_threshold():
    """By simulation: of 200,000 pairs whose bits agree with a chance of 0.9, none falls below the bound, and it is not idle."""
    agreed = np.random.default_rng(0).binomial(128, 0.9, 200_000)
    least = least_agreement(0.8)
    assert agreed.min() >= least
    assert least > 64 + 4 * 5.7  # four standard deviations above what unlike documents agree in


def test_a_crowded_key_is_held_against_its_first_documents_only():
    """Boilerplate with a number: all of them are found to repeat the first, in as many comparisons as a small group needs."""
    count = MOST_IN_A_BAND + 200
    boilerplate = " ".join(f"w{n}" for n in range(80))
    texts = [f"{boilerplate} number{n}" for n in range(count)]
    shingles, offsets = distinct_ngrams(texts, WORDS_PER_SHINGLE, Words())
    bands = bands_of(shingles, offsets, np.arange(count), 0.8)
    later, earlier, crowded = propose(bands, 0.8)
    assert crowded > 0
    assert near_duplicates(texts, 0.8, crowded).keys() == set(range(1, count))
    # Each is held against its first 16 in each of the 32 bands at most, not against all before it.
    assert len(later) <= 16 * 32 * count
    assert 0 in earlier


@pytest.mark.parametrize(("threshold", "expected"), [(0.8, (128, 4)), (1.0, (128, 64)), (0.5, (128, 2))])
def test_bands_by_hand(threshold, expected):
    # (1 - 0.8**4)**32 = 4.7e-8 and (1 - 0.8**5)**25 = 4.9e-5; (1 - 0.5**2)**64 = 1.0e-8 and (1 - 0.5**3)**42 = 3.7e-3
    assert choose_bands(threshold) == expected


@given(st.floats(min_value=0.01, max_value=1.0))
def test_bands_keep_the_chance_of_a_miss(threshold):
    permutations, rows = choose_bands(threshold)
    assert (1 - threshold**rows) ** (permutations // rows) <= 1e-6
