import re
from pathlib import Path

import pytest
import yaml

from embedloom.errors import ConfigError
from embedloom.synthesis.prompt import Prompt, load_prompt

MINIMAL = {
    "version": 1,
    "instruction": "Given a question, retrieve passages that answer it",
    "messages": [
        {"role": "user", "content": '{document}\nTitle: {title}. Answer like {"query": "..."} in {lang}.'}
    ],
}


def write(folder: Path, **changes) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return str(path)


def test_placeholders_are_filled_once_and_json_braces_stay(tmp_path: Path):
    prompt = load_prompt(write(tmp_path))
    (message,) = prompt.render(document="a {title} b", title="T", lang="deu", count=1)
    assert message == {
        "role": "user",
        "content": 'a {title} b\nTitle: T. Answer like {"query": "..."} in deu.',
    }


def test_an_unknown_placeholder_is_named_with_the_allowed_ones(tmp_path: Path):
    messages = [{"role": "user", "content": "{document} by {author}"}]
    with pytest.raises(ConfigError) as caught:
        load_prompt(write(tmp_path, messages=messages))
    message = str(caught.value)
    assert "messages.0.content: unknown placeholder {author}" in message
    assert "allowed: {document}, {title}, {lang}, {count}" in message
    assert "\n" not in message


def test_a_prompt_that_hides_the_document_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"messages: no message has the placeholder \{document\}"):
        load_prompt(
            write(tmp_path, messages=[{"role": "user", "content": "Write a question about {title}."}])
        )


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"^synthesis.prompt: 'seed_quarry' is unknown; allowed: seed_query, or"
    ):
        load_prompt("seed_quarry")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such config file"):
        load_prompt(str(tmp_path / "absent.yaml"))


def test_several_queries_need_their_own_messages(tmp_path: Path):
    prompt = load_prompt(write(tmp_path))
    with pytest.raises(
        ConfigError, match=r"^synthesis.queries_per_document: 3, but the prompt has no messages_many"
    ):
        prompt.templates(3)


def test_the_hash_follows_the_content_and_not_the_file(tmp_path: Path):
    first = load_prompt(write(tmp_path))
    (tmp_path / "other").mkdir()
    assert load_prompt(write(tmp_path / "other")).hash == first.hash
    changed = [
        {"version": 2},
        {"instruction": "Find it"},
        {"messages": [{"role": "user", "content": "{document}?"}]},
        {"messages_many": [{"role": "user", "content": "{document} {count}"}]},
        {"query_schema": {"type": "string", "minLength": 3}},
    ]
    hashes = {load_prompt(write(tmp_path, **change)).hash for change in changed}
    assert len(hashes | {first.hash}) == 6


def test_schemas_bound_the_query_one_character_above_the_limit(tmp_path: Path):
    prompt = load_prompt(write(tmp_path, query_schema={"type": "string", "minLength": 4}))
    query = {"type": "string", "minLength": 4, "maxLength": 81}
    assert prompt.answer_schema(1, 80) == {
        "type": "object",
        "properties": {"query": query},
        "required": ["query"],
        "additionalProperties": False,
    }
    assert prompt.answer_schema(3, 80)["properties"] == {
        "queries": {"type": "array", "items": query, "minItems": 3, "maxItems": 3}
    }


def test_a_pattern_is_the_only_bound(tmp_path: Path):
    """vLLM's grammar compiler refuses a pattern beside a length."""
    prompt = load_prompt(write(tmp_path, query_schema={"type": "string", "pattern": "^a{2,9}$"}))
    assert prompt.answer_schema(1, 80)["properties"]["query"] == {"type": "string", "pattern": "^a{2,9}$"}


class TestSeedQuery:
    """The prompt the package ships."""

    @pytest.fixture(scope="class")
    def prompt(self) -> Prompt:
        return load_prompt("seed_query")

    def test_it_serves_one_and_several_queries(self, prompt: Prompt):
        (one,) = prompt.render("THE TEXT", "", "eng", 1)
        (many,) = prompt.render("THE TEXT", "", "eng", 4)
        assert one["content"].startswith("THE TEXT\n\nWrite one")
        assert many["content"].startswith("THE TEXT\n\nWrite 4")

    @pytest.mark.parametrize(
        ("query", "fits"),
        [
            ("How do I sort an array by one column?", True),
            ("What does numpy.argsort return for ties?", True),
            ("Why is the k-means result different each time?", True),
            ("Wie sortiere ich eine Liste?", False),  # no question word it knows
            ("How do I sort", False),  # no end
            ("Why so?", False),  # too few words
            ("How to sort an array in Python?", False),  # the start small models never end
            ("How do I sort, filter and group rows?", False),  # several clauses
            ("How do I slice()()() an array?", False),  # a loop inside a word
            ("What is it? What is it for and why?", False),  # two questions
            ("Why " + "so " * 13 + "long?", False),  # too many words
        ],
    )
    def test_its_pattern_takes_short_single_questions(self, prompt: Prompt, query: str, fits: bool):
        pattern = prompt.answer_schema(1, 120)["properties"]["query"]["pattern"]
        assert bool(re.search(pattern, query)) is fits
