import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from embedloom.config.synthesis import (
    BitextConfig,
    ClassificationConfig,
    FamilyConfig,
    LongLongConfig,
    SeedQueriesConfig,
    ShortLongConfig,
    ShortShortConfig,
    STSConfig,
    TaskFamilyConfig,
    TranslationConfig,
)
from embedloom.errors import ConfigError
from embedloom.synthesis.families.registry import FAMILIES, family_prompt
from embedloom.synthesis.families.written import RULES as TASK_RULES
from embedloom.synthesis.families.written import tasks_prompt
from embedloom.synthesis.judge import RULES as JUDGE_RULES
from embedloom.synthesis.prompt import Prompt, PromptRules, load_prompt

SECTIONS: list[FamilyConfig] = [
    SeedQueriesConfig(rows=1),
    ShortLongConfig(rows=1),
    LongLongConfig(rows=1),
    ShortShortConfig(rows=1),
    ClassificationConfig(rows=1),
    STSConfig(rows=1),
    BitextConfig(rows=1, document_languages={"fra": 1}),
    TranslationConfig(rows=1),
    TranslationConfig(rows=1, sides="both", name="both_sides"),
]
SHIPPED = sorted((Path(__file__).parents[2] / "platform/embedloom/synthesis/prompts").glob("*.yaml"))
RULES = PromptRules(("answer",), ("document", "language"), required=("document",))
MINIMAL = {
    "version": 1,
    "messages": [
        {"role": "user", "content": '{document}\nAnswer like {"answer": "..."} in {language}, {tone}.'}
    ],
    "attributes": {"tone": ["briefly", "at length"]},
    "fields": {"answer": {"type": "string"}},
}


def write(folder: Path, **changes) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return str(path)


def test_placeholders_are_filled_once_and_json_braces_stay(tmp_path: Path):
    prompt = load_prompt(write(tmp_path), RULES)
    (message,) = prompt.render({"document": "a {tone} b", "language": "German", "tone": "briefly"})
    assert message == {
        "role": "user",
        "content": 'a {tone} b\nAnswer like {"answer": "..."} in German, briefly.',
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "{document} by {author}"}]},
            r"messages\.0\.content: unknown placeholder \{author\}; allowed: \{document\}, \{language\}, \{tone\}",
        ),
        (
            {"messages": [{"role": "user", "content": "In {language}."}]},
            r"messages: no message has the placeholder \{document\}",
        ),
        ({"fields": {"question": {"type": "string"}}}, "fields are question; allowed: exactly answer"),
        ({"attributes": {"language": ["x"]}}, r"attributes\.language: the name is taken"),
        ({"attributes": {"tone": []}}, "attributes: 'tone' has no values"),
        ({"attributes": {"two words": ["x"]}}, "attributes: 'two words' cannot be a placeholder"),
        ({"example": 1}, "example: unknown key"),
    ],
)
def test_a_wrong_prompt_is_named_with_what_is_allowed(tmp_path: Path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_prompt(write(tmp_path, **changes), RULES)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_prompt_names_its_key_and_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"families\.sts\.prompt: 'stz' is unknown; allowed: .*sts, sts_small"
    ):
        family_prompt(STSConfig(rows=1, prompt="stz"), small=False)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        family_prompt(STSConfig(rows=1, prompt="absent.yaml"), small=False)


def test_the_hash_follows_the_content_and_not_the_file(tmp_path: Path):
    first = load_prompt(write(tmp_path), RULES)
    (tmp_path / "other").mkdir()
    assert load_prompt(write(tmp_path / "other"), RULES).hash == first.hash
    changed = [
        {"version": 2},
        {"instruction": "Find it"},
        {"messages": [{"role": "user", "content": "{document}?"}]},
        {"attributes": {"tone": ["briefly"]}},
        {"fields": {"answer": {"type": "string", "minLength": 3}}},
    ]
    hashes = {load_prompt(write(tmp_path, **change), RULES).hash for change in changed}
    assert len(hashes | {first.hash}) == 6


def test_schemas_bound_a_text_one_character_above_the_limit(tmp_path: Path):
    prompt = load_prompt(write(tmp_path), RULES)
    text = {"type": "string", "maxLength": 81}
    assert prompt.answer_schema({"answer": 80}) == {
        "type": "object",
        "properties": {"answer": text},
        "required": ["answer"],
        "additionalProperties": False,
    }
    assert prompt.answer_schema({"answer": 80}, {"answer": 3})["properties"] == {
        "answer": {"type": "array", "items": text, "minItems": 3, "maxItems": 3}
    }


def test_a_pattern_is_the_only_bound(tmp_path: Path):
    """vLLM's grammar compiler refuses a pattern beside a length."""
    shape = {"type": "string", "pattern": "^a{2,9}$"}
    prompt = load_prompt(write(tmp_path, fields={"answer": shape}), RULES)
    assert prompt.answer_schema({"answer": 80})["properties"]["answer"] == shape


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.key)
def test_every_family_has_a_prompt_for_large_and_for_small_generators(section: FamilyConfig, small: bool):
    prompt = family_prompt(section, small)
    bounded = [field for field in prompt.fields.values() if "pattern" in field]
    assert len(bounded) == (len(prompt.fields) if small else 0)
    if isinstance(section, TaskFamilyConfig):
        assert tasks_prompt(section, small).hash != tasks_prompt(section, not small).hash


def test_no_shipped_prompt_is_left_over():
    names = {f"{name}{variant}" for name in own_names() for variant in ("", "_small")} | {"judge"}
    assert {path.stem for path in SHIPPED} == names


def own_names() -> set[str]:
    families = {FAMILIES[section.family].own_prompt(section)[0] for section in SECTIONS}
    return families | {f"{s.family}_tasks" for s in SECTIONS if isinstance(s, TaskFamilyConfig)}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_no_pattern_has_an_optional_group_after_a_bounded_repeat(path: Path):
    """xgrammar 0.2 lets the repeat run one over there, so its texts would not fit the schema: {0,1} is right."""
    for field in yaml.safe_load(path.read_text())["fields"].values():
        bare = re.sub(r"\[(\\.|[^\]\\])*\]|\\.", "", field.get("pattern", ""))  # without classes and escapes
        assert "?" not in bare
        re.compile(field.get("pattern", ""))


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_grammar_compiler_takes_every_shipped_schema(path: Path):
    xgrammar = pytest.importorskip("xgrammar")
    prompt = Prompt.model_validate(yaml.safe_load(path.read_text()))
    schema = prompt.answer_schema(dict.fromkeys(prompt.fields, 400))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "root ::=" in str(xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False))


@pytest.mark.parametrize(
    ("query", "fits"),
    [
        ("How do I sort an array by one column?", True),
        ("What does numpy.argsort return for ties?", True),
        ("Why is the k-means result different each time?", True),
        ("Wie sortiere ich eine Liste?", False),  # no question word it knows
        ("How do I sort", False),  # no end
        ("Why so?", False),  # too few words
        ("How do I sort, filter and group rows?", False),  # several clauses
        ("How do I slice()()() an array?", False),  # a loop inside a word
        ("What is it? What is it for and why?", False),  # two questions
        ("Why " + "so " * 13 + "long?", False),  # too many words
    ],
)
def test_the_small_query_pattern_takes_short_single_questions(query: str, fits: bool):
    (field,) = family_prompt(SeedQueriesConfig(rows=1), small=True).fields.values()
    assert bool(re.search(field["pattern"], query)) is fits


def test_the_judges_and_step_ones_prompts_hold_what_they_must():
    assert load_prompt("judge", JUDGE_RULES).fields["score"]["maximum"] == 10
    assert load_prompt("sts", PromptRules(("S1", "S2", "S3"), ("language", "document_language"))).attributes
    with pytest.raises(ConfigError, match="fields are tasks"):
        load_prompt("short_long_tasks", PromptRules(("task",), TASK_RULES.placeholders))
