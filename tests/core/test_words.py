"""What a word is, in every script; held against Unicode's own segmentation (UAX #29) by the ``regex`` package."""

# ruff: noqa: RUF001 - other scripts are the point

import re
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from embedloom.core.text import letters_in, stands_alone, terms_of, words_of

# Script, text, its words, by hand: a blank or a sign parts words, and nothing inside one does.
SENTENCES = {
    "latin": ("Schöne Grüße, Zoë!", "schöne grüsse zoë"),
    "latin decomposed": ("Cafe\u0301 de\u0301ja\u0300", "café déjà"),
    "vietnamese": ("Tiếng Việt, dễ đọc.", "tiếng việt dễ đọc"),
    "greek": ("Καλημέρα, κόσμε·", "καλημέρα κόσμε"),
    "cyrillic": ("Доброе утро, мир!", "доброе утро мир"),
    "armenian": ("Բարեւ ձեզ։", "բարեւ ձեզ"),
    "georgian": ("გამარჯობა, მსოფლიო.", "გამარჯობა მსოფლიო"),
    "hebrew with points": ("שָׁלוֹם עוֹלָם", "שָׁלוֹם עוֹלָם"),
    "arabic with vowels": ("اَلْعَرَبِيَّةُ لُغَةٌ، نَعَمْ", "اَلْعَرَبِيَّةُ لُغَةٌ نَعَمْ"),
    "persian with joiner": ("می\u200cخواهم بروم؟", "می\u200cخواهم بروم"),
    "devanagari": ("यह सकारात्मक समीक्षा है।", "यह सकारात्मक समीक्षा है"),
    "bengali": ("এটি ইতিবাচক মন্তব্য।", "এটি ইতিবাচক মন্তব্য"),
    "gurmukhi": ("ਸਤਿ ਸ੍ਰੀ ਅਕਾਲ।", "ਸਤਿ ਸ੍ਰੀ ਅਕਾਲ"),
    "gujarati": ("ગુજરાતી ભાષા.", "ગુજરાતી ભાષા"),
    "odia": ("ଓଡ଼ିଆ ଭାଷା।", "ଓଡ଼ିଆ ଭାଷା"),
    "tamil": ("தமிழ் மொழி, நன்றி.", "தமிழ் மொழி நன்றி"),
    "telugu": ("తెలుగు భాష.", "తెలుగు భాష"),
    "kannada": ("ಕನ್ನಡ ಭಾಷೆ.", "ಕನ್ನಡ ಭಾಷೆ"),
    "malayalam": ("മലയാളം ഭാഷ.", "മലയാളം ഭാഷ"),
    "sinhala with joiner": ("ශ්\u200dරී ලංකාව.", "ශ්\u200dරී ලංකාව"),
    "tibetan": ("བོད་སྐད།", "བོད སྐད"),
    "ethiopic": ("ሰላም፡ዓለም።", "ሰላም ዓለም"),
    "mongolian": ("ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ", "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ"),
    "cherokee": ("ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ", "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ"),
    "thaana": ("ދިވެހި ބަސް", "ދިވެހި ބަސް"),
    "thai": ("สวัสดี ชาวโลก", "ส วั ส ดี ช า ว โ ล ก"),
    "lao": ("ສະບາຍດີ", "ສ ະ ບ າ ຍ ດີ"),
    "khmer": ("ភាសា", "ភា សា"),
    "burmese": ("မြန်မာ။", "မြ န် မာ"),
    "han": ("这个，很好。", "这 个 很 好"),
    "kana": ("カタカナ・ひらがな", "カ タ カ ナ ひ ら が な"),
    "hangul": ("안녕, 세계", "안 녕 세 계"),
    "digits and signs": ("1\ufe0f\u20e3 don't 3.14 foo_bar 👩\u200d💻", "1 don t 3 14 foo_bar"),
}


@pytest.mark.parametrize("script", SENTENCES)
def test_words_by_script(script: str):
    text, words = SENTENCES[script]
    assert words_of(text) == unicodedata.normalize("NFC", words.casefold()).split()


@pytest.mark.parametrize("script", SENTENCES)
def test_no_word_ends_within_a_character(script: str):
    """A user-perceived character (``\\X``) that begins a word lies in it whole."""
    text = unicodedata.normalize("NFC", SENTENCES[script][0].casefold())
    begins = {found.start(): found.end() for found in regex.finditer(r"\X", text)}
    place = 0
    for word in words_of(text):
        place = text.index(word, place)
        end = place + len(word)
        if script not in (
            "digits and signs",
            "thai",
            "lao",
        ):  # a keycap's marks; SARA AM and its kin are letters
            assert place in begins
            assert end == len(text) or end in begins
        place = end


@given(st.text(alphabet=st.characters(categories=("L", "N", "P", "Z", "S"), max_codepoint=0x0DFF)))
def test_without_marks_a_word_is_a_run_of_letters_and_digits(text: str):
    """As the standard library's ``\\w`` has it, where a text needs no composing."""
    plain = unicodedata.normalize("NFC", text.casefold())
    if not any(unicodedata.category(one).startswith("M") for one in plain):
        assert words_of(text) == re.findall(r"\w+", plain)


@given(st.text())
def test_terms_are_the_words_and_any_text_has_some(text: str):
    assert [word for term in terms_of(text) for word in term] == words_of(text)
    assert all(len(term) == 1 or all(map(stands_alone, term)) for term in terms_of(text))


def test_terms_keep_together_what_nothing_parts():
    assert terms_of("東京タワー, 大阪 and กีฬา") == [
        tuple("東京タワー"),
        ("大", "阪"),
        ("and",),
        ("กี", "ฬ", "า"),
    ]
    assert terms_of("고객 불만") == [("고", "객"), ("불", "만")]


def test_letters_are_counted_without_marks():
    assert [letters_in(word) for word in ("में", "खेल", "no", "กี")] == [1, 2, 2, 1]
