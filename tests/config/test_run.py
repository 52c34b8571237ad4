from pathlib import Path

import pytest

from embedloom.config.base import apply_overrides
from embedloom.config.cluster import load_cluster
from embedloom.config.run import load_run
from embedloom.errors import ConfigError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart_llama.yaml"
CONFIGS = sorted(p for p in (ROOT / "jobs" / "configs").glob("*.yaml") if not p.name.startswith("ablation_"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    assert load_run(path).run.name


def test_shipped_cluster_config_loads_and_describes_64_gpus():
    cluster = load_cluster(ROOT / "cluster" / "cluster.yaml")
    assert cluster.profile("a100x64").total_gpus == 64
    assert cluster.profile("local").total_gpus == 0
    with pytest.raises(
        ConfigError, match=r"'h100x9' is not in the cluster config; allowed: a100x64, .*local"
    ):
        cluster.profile("h100x9")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "mining.selection.marginratio=0.9",
            r"mining\.selection\.marginratio: unknown key; the nearest valid key is 'margin_ratio'",
        ),
        (
            "training.stages.0.max_document_tokens=64",
            r"training\.stages\.pretrain\.max_document_tokens is 64, encoder\.max_document_tokens 48; allowed: up to",
        ),
        (
            "training.stages.0.negativs=2",
            r"training\.stages\.0\.negativs: unknown key; the nearest valid key is 'negatives'",
        ),
        (
            "mining.selection.margin_ratio=1.5",
            r"mining\.selection\.margin_ratio: .*less than or equal to 1 \(seen: 1\.5\)",
        ),
        (
            "training.mix={public: 0.5, web: 0.5}",
            r"unknown origin 'web' in mix; allowed: \['public', 'synthetic', 'in_domain'\]",
        ),
        (
            "mining.selection.negatives=1",
            "training.stages use up to 4 negatives, but mining.selection.negatives keeps 1",
        ),
        ("mining.selection.sample_from=2", "sample_from is 2, below negatives 4"),
        ("mining.selection.min_negatives=5", "min_negatives is 5, above negatives 4"),
        ("mining.teachers=[a, b, a]", "teachers must be different models"),
        (
            "synthesis.generators.0.weight=0",
            r"synthesis: generators: the weights sum to 0; at least one must be above 0",
        ),
        ("synthesis.generators=[{model: a}, {model: a}]", "generators: model 'a' stands 2 times"),
        (
            "synthesis.families=[{family: sts, rows: 1}, {family: sts, rows: 2}]",
            "families: name 'sts' stands 2 times",
        ),
        ("synthesis.languages={xxx: 1}", r"synthesis\.languages: 'xxx' is no known language; allowed: "),
        (
            "synthesis.families=[{family: bitext, rows: 1, document_languages: {eng: 1}}]",
            "document_languages has no language but 'eng', that of the text itself",
        ),
        ("synthesis.families.0.familly=sts", r"synthesis\.families.*unknown key"),
        ("synthesis.engine=fast", r"synthesis\.engine: unknown key"),
        (
            "mining.rescoring={model: m, top: 4}",
            r"rescoring\.top is 4, it must be above selection\.negatives \(4\) and not above top_k \(100\)",
        ),
        ("mining.rescoring={model: m, top: 101}", r"rescoring\.top is 101, .*not above top_k \(100\)"),
        (
            "mining={teachers: [a, b], rescoring: {model: m}, selection: {blend: intra_sample}}",
            r"selection\.blend is 'intra_sample', but with rescoring there is one list; allowed: 'first'",
        ),
        (
            "mining.rescoring={model: m, query_template: hi}",
            r"query_template: a template holds \{text\} once",
        ),
        ("mining.rescoring={model: m, max_token: 9}", "unknown key; the nearest valid key is 'max_tokens'"),
        ("synthesis=null", "training.mix.synthetic is above 0, but the config has no synthesis section"),
        ("encoder.template=hello", r"encoder\.template: template must contain \{text\}"),
        ("corpus.sources=[]", r"corpus\.sources: .*at least 1"),
        ("serving.port=70000", r"serving\.port: .*65535.*70000"),
        ("training.runs.1.name=alpha", "runs must have different names"),
        ("nonsense", r"--set 'nonsense': expected section\.key=value"),
        ("training.stages.7.negatives=1", "'7' is not an index of a list of 2"),
        ("run.name.deeper=1", "'run.name' is a value, not a section"),
    ],
)
def test_bad_values_name_the_key_the_value_and_the_allowed(override, message):
    with pytest.raises(ConfigError, match=message):
        load_run(QUICKSTART, [override])


def test_a_rule_about_baselines_needs_some():
    with pytest.raises(
        ConfigError,
        match=r"gate\.require_over_baseline is 'better', but evaluation\.baselines is empty; allowed: null",
    ):
        load_run(QUICKSTART.with_name("quickstart.yaml"), ["evaluation.baselines=[]"])


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file"):
        load_run(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not readable as YAML"):
        load_run(broken)
    broken.write_text("- a list")
    with pytest.raises(ConfigError, match="expected a mapping of sections, found list"):
        load_run(broken)


def test_overrides_parse_yaml_values():
    content = {"a": {"b": 1}, "list": [{"x": 1}]}
    assert apply_overrides(content, ["a.b=[1, 2]", "list.0.x=null", "new.key=true"]) == {
        "a": {"b": [1, 2]}, "list": [{"x": None}], "new": {"key": True},
    }  # fmt: skip


def test_the_papers_run_has_its_31_sources_and_batches():
    """arXiv 2511.07025, Tables 8 and 9: 4,309,502 examples in batches of 128 are its 33,668 steps."""
    stages = load_run(QUICKSTART.parent / "nemotron_8b.yaml").training.stages
    sources = stages[1].sources
    assert (len(sources), sum(source.cap for source in sources)) == (31, 4_309_502)
    assert -(-4_309_502 // stages[1].global_batch) == 33_668
    assert (stages[0].global_batch, stages[0].max_steps, stages[0].learning_rate) == (2048, 5773, 1e-5)
    assert (stages[1].learning_rate, stages[1].negatives, stages[0].negatives) == (2e-6, 4, 1)
