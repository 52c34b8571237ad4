import pytest
from pydantic import TypeAdapter, ValidationError

from embedloom.config.synthesis import (
    BitextConfig,
    ContaminationCheck,
    FamilyUnion,
    QualityConfig,
    SeedQueriesConfig,
)
from embedloom.core.text import LANGUAGE_CODES, check_languages, language_name, short_code

UNION = TypeAdapter(FamilyUnion)


def test_the_family_names_its_section():
    section = UNION.validate_python({"family": "seed_queries", "rows": 9, "queries_per_document": 3})
    assert section == SeedQueriesConfig(rows=9, queries_per_document=3)
    assert section.key == "seed_queries"
    assert UNION.validate_python({"family": "sts", "rows": 9, "name": "sts-b"}).key == "sts-b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"family": "haiku", "rows": 1}, "haiku.*seed_queries"),
        ({"family": "sts", "rows": 0}, "greater than or equal to 1"),
        ({"family": "sts", "rows": 1, "max_query_characters": 9}, "Extra inputs"),
        (
            {"family": "sts", "rows": 1, "languages": {"en": 1}},
            "'en' is no known language.*nearest are .*eng",
        ),
        ({"family": "sts", "rows": 1, "languages": {"eng": 0}}, "weight of 'eng' is 0; allowed: above 0"),
        ({"family": "sts", "rows": 1, "document_languages": {}}, "no language is given"),
        ({"family": "bitext", "rows": 1}, "bitext needs document_languages"),
        (
            {"family": "bitext", "rows": 1, "languages": {"deu": 1}, "document_languages": {"deu": 1}},
            "no language but 'deu'",
        ),
    ],
)
def test_a_wrong_section_says_what_is_wrong(content, message):
    with pytest.raises(ValidationError, match=message):
        UNION.validate_python(content)


def test_a_bitext_never_translates_into_its_own_language():
    section = BitextConfig(rows=1, document_languages={"deu": 2, "fra": 3})
    assert section.document_weights("deu") == {"fra": 3}
    assert section.document_weights("eng") == {"deu": 2, "fra": 3}
    assert SeedQueriesConfig(rows=1).document_weights("jpn") == {"jpn": 1.0}


def test_languages_are_named_for_people_and_for_the_identifier():
    assert language_name("deu") == "German"
    assert language_name("zho-CN") == language_name("zho_Hans") == "Chinese"
    assert language_name("xx-unknown") == "xx-unknown"
    assert (short_code("deu"), short_code("yue"), short_code("xx")) == ("de", "yue", None)
    check_languages({"eng": 1, "swa": 0.1})
    assert len(LANGUAGE_CODES) >= 93


def test_contamination_must_guard_something():
    with pytest.raises(ValidationError, match="neither files nor heldout"):
        ContaminationCheck(heldout=False)
    off = QualityConfig(language=None, near_duplicates=None, contamination=None, label_leak=False)
    assert off.language is None
