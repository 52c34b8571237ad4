"""Every key of every config file says what it is, in the JSON Schema that editors, `config show` and the docs read."""

import re

import pytest

from embedloom.config.ablation import AblationConfig
from embedloom.config.cluster import ClusterConfig
from embedloom.config.rates import RatesConfig
from embedloom.config.run import RunConfig
from embedloom.config.serving import ApplicationArgs
from embedloom.synthesis.prompt import Prompt

CONFIGS = [RunConfig, ClusterConfig, AblationConfig, RatesConfig, Prompt, ApplicationArgs]
FILLERS = {
    "a", "an", "and", "are", "as", "at", "be", "by", "each", "for", "from", "has", "have", "in", "is", "it",
    "its", "not", "of", "on", "or", "that", "the", "this", "to", "what", "with",
}  # fmt: skip


def properties(model):
    """(section.key, its schema) of every section of a config."""
    schema = model.model_json_schema()
    for name, section in [(model.__name__, schema), *schema.get("$defs", {}).items()]:
        for shape in [section, *section.get("anyOf", [])]:
            for key, value in shape.get("properties", {}).items():
                yield f"{name}.{key}", value


def words(text):
    return {word.rstrip("s") for word in re.findall(r"[a-z0-9]+", text.lower())} - FILLERS


@pytest.mark.parametrize("model", CONFIGS, ids=lambda model: model.__name__)
def test_every_key_is_described_by_more_than_its_name(model):
    found = dict(properties(model))
    assert found
    empty = {
        key
        for key, value in found.items()
        if len(words(value.get("description", "")) - words(key.split(".")[1])) < 2
    }
    assert empty == set()


@pytest.mark.parametrize("model", CONFIGS, ids=lambda model: model.__name__)
def test_every_description_is_a_sentence(model):
    assert {key for key, value in properties(model) if not value["description"].endswith(".")} == set()


@pytest.mark.parametrize("model", CONFIGS, ids=lambda model: model.__name__)
def test_every_key_that_may_be_null_says_what_null_does(model):
    silent = {
        key
        for key, value in properties(model)
        if {"type": "null"} in value.get("anyOf", []) and "Null" not in value["description"]
    }
    assert silent == set()
