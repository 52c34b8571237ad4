"""Keys looked up by path, the JSON Schemas in the documentation, and the YAML files that name them."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.cli.config import ConfigFile, schema_of
from embedloom.config.keys import config_keys, find_keys, key_or_nearest
from embedloom.errors import ConfigError

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
NAMES_SCHEMA = re.compile(r"# yaml-language-server: \$schema=(\S+)")
KINDS = {
    "jobs/configs/[!a]*.yaml": "run",
    "jobs/configs/ablation_*.yaml": "ablation",
    "cluster/cluster.yaml": "cluster",
    "cluster/rates.yaml": "rates",
    "platform/embedloom/synthesis/prompts/*.yaml": "prompt",
}
SHIPPED = [(path, kind) for pattern, kind in KINDS.items() for path in sorted(ROOT.glob(pattern))]
KEYS = {file: config_keys(schema_of(file)) for file in ConfigFile}


def command(*words):
    return CliRunner().invoke(app, ["config", *words])


def shipped(test):
    names = [str(path.relative_to(ROOT)) for path, _ in SHIPPED]
    return pytest.mark.parametrize(("path", "kind"), SHIPPED, ids=names)(test)


def test_all_kinds_of_files_are_shipped():
    assert {kind for _, kind in SHIPPED} == set(ConfigFile)


@shipped
def test_first_line_names_the_schema_from_where_the_file_lies(path, kind):
    named = NAMES_SCHEMA.fullmatch(path.read_text().splitlines()[0])
    assert named
    assert (path.parent / named[1]).resolve() == REFERENCE / "schema" / f"{kind}.json"


@shipped
def test_shipped_file_is_valid_by_its_schema(path, kind):
    schema = json.loads((REFERENCE / "schema" / f"{kind}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(path.read_text()), schema, jsonschema.Draft202012Validator)


@shipped
def test_numbers_are_the_same_for_readers_of_yaml_1_2(path, kind):
    # 1_000 is a number in YAML 1.1 alone; editors read 1.2, in which it is a text.
    tokens = yaml.scan(path.read_text())
    plain = [token.value for token in tokens if isinstance(token, yaml.ScalarToken) and token.plain]
    assert [value for value in plain if re.fullmatch(r"[\d_.]*\d_\d[\d_.]*", value)] == []


def paths_in(node, path=()):
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*path, str(key))
            yield from paths_in(value, (*path, str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from paths_in(value, (*path, str(index)))


@shipped
def test_every_key_of_a_shipped_file_is_found(path, kind):
    keys = KEYS[ConfigFile(kind)]
    own = {
        "set",
        "grid",
        "fields",
    }  # keys of an ablation are paths of a run config; a field's is a JSON Schema
    given = [parts for parts in paths_in(yaml.safe_load(path.read_text())) if not own & set(parts[:-1])]
    assert given
    missing = [".".join(parts) for parts in given if not find_keys(keys, ".".join(parts))]
    assert missing == []


@pytest.mark.parametrize("file", ConfigFile)
def test_every_key_finds_itself(file):
    assert [key.path for key in KEYS[file] if key not in find_keys(KEYS[file], key.path)] == []


def test_documentation_is_current(tmp_path):
    """If this fails: embedloom config reference."""
    assert command("reference", "--out", str(tmp_path)).exit_code == 0
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.*")}
    assert len(made) == 1 + len(ConfigFile)
    for name, text in made.items():
        assert (REFERENCE / name).read_text() == text, name
    assert {path.name for path in (REFERENCE / "schema").iterdir()} == {
        f"{file.value}.json" for file in ConfigFile
    }


def test_links_of_the_page_lead_to_its_sections():
    page = (REFERENCE / "config.md").read_text()
    anchors = re.findall(r'<a id="([^"]+)">', page)
    links = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert len(links) > 50 and links <= set(anchors)


WRONG = [
    ("training.loss", "infonse"), ("mining.selection.margin_ratio", 1.5), ("mining.top_k", "many"),
    ("corpus.sources", []), ("training.dept", 3), ("mining.teachers", [7]), ("synthesis.families", [{"family": "x"}]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG)
def test_schema_refuses_what_the_config_refuses(path, value):
    content = yaml.safe_load((ROOT / "jobs/configs/quickstart_llama.yaml").read_text())
    *sections, key = path.split(".")
    node = content
    for section in sections:
        node = node[section]
    node[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema_of(ConfigFile.run), jsonschema.Draft202012Validator)


def test_schema_takes_the_older_name_of_runs():
    content = yaml.safe_load((ROOT / "jobs/configs/quickstart_llama.yaml").read_text())
    content["training"]["candidates"] = content["training"].pop("runs")
    jsonschema.validate(content, schema_of(ConfigFile.run), jsonschema.Draft202012Validator)
    del content["training"]["candidates"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema_of(ConfigFile.run), jsonschema.Draft202012Validator)


def test_show_tells_type_bounds_default_and_meaning():
    told = command("show", "mining.selection.margin_ratio").output
    for text in ("number", "above 0, at most 1", "0.95", "perc_pos", "arXiv 2407.15831"):
        assert text in told


def test_show_lists_the_allowed_values_and_the_keys_of_a_section():
    assert "infonce, gecko, qwen3, gemini" in command("show", "training.loss").output
    stages = command("show", "training.stages").output
    assert "global_batch" in stages and "learning_rate" in stages


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("training.stages.0.negatives", "training.stages.N.negatives"),
        ("training.stages.negatives", "training.stages.N.negatives"),
        ("training.stages[0].negatives", "training.stages.N.negatives"),
        ("training.mix.public", "training.mix"),
        ("training.runs.0.stages.finetune.sources.faq.cap", "training.runs.N.stages.NAME.sources.NAME.cap"),
        ("profiles.local.serve.streams", "profiles.NAME.serve.streams"),
        ("profiles.serve", "profiles.NAME.serve"),
        ("profiles.local", "profiles"),
        ("grid", "grid"),
        ("devices.cpu-core.price_per_hour.value", "devices.NAME.price_per_hour.value"),
    ],
)
def test_paths_may_hold_or_leave_out_indices_and_names(given, path):
    shown = command("show", given)
    assert shown.exit_code == 0
    assert path in shown.output.splitlines()


def test_a_key_that_families_have_differently_is_shown_for_each():
    shown = command("show", "synthesis.families.max_document_characters").output
    assert "2400" in shown and "4000" in shown and "seed_queries" in shown and "long_long" in shown


def test_overview_names_every_section_of_every_file():
    shown = command("show").output
    for name in ("mining", "training", "profiles", "grid", "rates", "messages"):
        assert re.search(rf"^  {name} ", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("mining.selection.margin_ration", "mining.selection.margin_ratio"),
        ("selection.margin_ratio", "mining.selection.margin_ratio"),
        ("traning.loss", "training.loss"),
        ("learning_rat", "training.stages.N.learning_rate"),
        ("profiles.local.serve.strems", "profiles.NAME.serve.streams"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(wrong, right):
    result = command("show", wrong)
    assert isinstance(result.exception, ConfigError) and result.exception.exit_code == 2
    assert wrong in str(result.exception) and right in str(result.exception)


def test_an_index_is_no_key_of_a_plain_list_entry():
    with pytest.raises(ConfigError, match="nearest"):
        key_or_nearest(KEYS[ConfigFile.run], "training.loss.0")


def test_schema_command_prints_what_is_written():
    for file in ConfigFile:
        assert (
            command("schema", file.value).output == (REFERENCE / "schema" / f"{file.value}.json").read_text()
        )
    assert command("schema").output == (REFERENCE / "schema" / "run.json").read_text()
    assert command("schema", "runs").exit_code == 2
