"""Mistakes that can be seen before anything starts: each with the key, the value seen and what is allowed."""

import json
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedloom.encoder.registry import check_model_name
from embedloom.errors import ConfigError, DataError, MissingDependency, UserError
from embedloom.pipeline import preflight as module
from embedloom.pipeline.commands import execute, load
from embedloom.pipeline.plan import plan_table
from embedloom.pipeline.preflight import check_benchmark_names, check_port, preflight, problems

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
CLUSTER = ROOT / "cluster" / "cluster.yaml"
ALL = {"corpus", "encoder", "synthesize", "mine", "train", "merge", "evaluate", "gate", "embed"}


def quickstart(*overrides, profile="local"):
    return load(QUICKSTART, profile, CLUSTER, list(overrides))


def refused(*overrides, verbs=ALL):
    with pytest.raises(UserError) as caught:
        preflight(quickstart(*overrides), verbs)
    return str(caught.value)


def test_the_quickstart_has_all_it_needs():
    assert list(problems(quickstart(), ALL)) == []


# --- chunks that a teacher would not read to their ends


def test_a_teacher_that_reads_less_than_a_chunk_is_refused_by_both_keys():
    said = refused("corpus.chunk_tokens=256")
    assert said.startswith("mining.max_document_tokens is 128, below corpus.chunk_tokens 256")
    own = "mining.teachers=[{model: minilm-l6, max_document_tokens: 128}]"
    said = refused("corpus.chunk_tokens=256", "mining.max_document_tokens=256", own)
    assert said.startswith("mining.teachers.0.max_document_tokens is 128, below corpus.chunk_tokens 256")
    fits = quickstart("corpus.chunk_tokens=256", "mining.max_document_tokens=256")
    assert list(problems(fits, {"mine"})) == []


# --- pairs that training asks for


FAQ = "corpus.sources=[{format: jsonl, path: faq.jsonl, text_column: a, query_column: q, dataset: faq}]"
WRITTEN = "training.mix={synthetic: 1}"
ONE_RUN = "training.runs=[{name: a, seed: 1}]"


@pytest.mark.parametrize(
    ("overrides", "seen", "allowed"),
    [
        ([FAQ, ONE_RUN], "training.mix.public", "allowed: faq, synthetic"),
        ([FAQ, ONE_RUN, "training.mix={in_domain: 1}"], "training.mix.in_domain", "allowed: faq, synthetic"),
        (
            [FAQ, ONE_RUN, WRITTEN, "training.stages.0.sources=[{name: own, format: mined, dataset: faqs}]"],
            "training.stages.pretrain.sources.own.dataset",
            "(the nearest is 'faq'); allowed: faq, synthetic",
        ),
        (
            [
                "corpus.sources=[{format: text, path: handbook}]",
                ONE_RUN,
                "synthesis=null",
                "training.mix={public: 1}",
            ],
            "training.mix.public: this run has no pairs at all",
            "query_column",
        ),
    ],
)
def test_a_mix_or_source_that_no_pairs_are_called_by_is_refused_when_the_config_is_read(
    overrides, seen, allowed
):
    with pytest.raises(ConfigError) as caught:
        quickstart(*overrides)
    assert seen in str(caught.value) and allowed in str(caught.value)


def test_questions_that_documents_hold_are_public_pairs():
    documents = "corpus.sources=[{format: text, path: handbook}]"
    with pytest.raises(ConfigError, match=r"training.mix.public: .*allowed: synthetic"):
        quickstart(documents)
    extracted = "synthesis.families=[{family: seed_queries, rows: 9}, {family: existing_questions, rows: 9}]"
    assert quickstart(documents, extracted).config.synthesis.datasets == ("synthetic", "public")


def test_a_name_without_a_share_is_not_asked_for():
    quickstart(
        FAQ,
        "training.stages.0.sources=[{name: own, format: mined}]",
        "training.mix={public: 0, synthetic: 1}",
        ONE_RUN,
    )


# --- models


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("encoder.base=smollm2-135M", "encoder.base"),
        ("mining.teachers=[minilm-l7]", "mining.teachers.0"),
        ("mining.audit.judge.model=minilml6", "mining.audit.judge"),
        ("synthesis.generators.0.model=smollm-135m", "synthesis.generators.0.model"),
        ("embedding.model=minilm_l6", "embedding.model"),
    ],
)
def test_a_misspelt_model_of_the_registry_is_told_with_the_nearest(override, key):
    message = refused(override)
    nearest = "minilm-l6" if "minilm" in override else "smollm2-135m"
    assert key in message and override.split("=")[1].strip("[]") in message and f"'{nearest}'" in message


def test_a_model_that_is_not_there_is_refused(tmp_path):
    assert "mining.teachers.0: './none' does not exist" in refused("mining.teachers=[./none]")
    (tmp_path / "config.json").write_text("{}")
    assert "holds no weights; allowed: files ending in .safetensors" in refused(
        f"mining.teachers=[{tmp_path}]"
    )
    (tmp_path / "config.json").unlink()
    assert "has no config.json" in refused(f"mining.teachers=[{tmp_path}]")


def test_a_model_with_a_missing_shard_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(DataError, match=r"names 'model-00002-of-00002.safetensors', which is not beside it"):
        check_model_name(str(tmp_path), "encoder.base")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    check_model_name(str(tmp_path), "encoder.base")


def test_an_id_of_the_hub_is_refused_where_nothing_may_be_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "'nobody/nothing-at-all' is not in the Hugging Face cache" in refused(
        "mining.teachers=[nobody/nothing-at-all]"
    )
    monkeypatch.delenv("HF_HUB_OFFLINE")
    preflight(quickstart("mining.teachers=[nobody/nothing-at-all]"), {"mine"})


# --- tasks and their splits


def local_task(folder, kind="retrieval", splits=("dev",)):
    task = folder / kind / "sky"
    task.mkdir(parents=True)
    for name in ("corpus", "qrels"):
        pq.write_table(pa.table({"id": ["a"]}), task / f"{name}.parquet")
    pq.write_table(pa.table({"id": list(splits), "split": list(splits)}), task / "queries.parquet")
    return folder


def test_a_local_task_without_the_split_is_refused_with_those_it_has(tmp_path):
    local_task(tmp_path, splits=("dev", "train"))
    task = f"evaluation.tasks=[{{name: own, kind: local, path: {tmp_path}, split: test}}]"
    message = refused(task)
    assert "evaluation.tasks.0 ('own')" in message and "'test'" in message and "['dev', 'train']" in message
    preflight(quickstart(task.replace("split: test", "split: dev")), ALL)


def test_a_classification_task_needs_its_training_split_too(tmp_path):
    (tmp_path / "classification").mkdir()
    pq.write_table(
        pa.table({"text": ["a"], "split": ["test"]}), tmp_path / "classification" / "topic.parquet"
    )
    assert "no row of split 'train'" in refused(
        f"evaluation.tasks=[{{name: own, kind: local, path: {tmp_path}}}]"
    )


def test_a_beir_folder_without_the_split_is_refused_with_those_it_has(tmp_path):
    (tmp_path / "qrels").mkdir()
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        (tmp_path / name).write_text("")
    dev = f"training.dev={{tasks: [{{name: own, kind: beir, path: {tmp_path}, split: dev}}]}}"
    message = refused(dev)
    assert "training.dev.tasks.0 ('own')" in message and "qrels/dev.tsv is missing" in message
    assert "splits found: train" in message


def test_a_heldout_task_needs_a_share_and_pairs():
    assert "corpus.split.test is 0" in refused("corpus.split.test=0")
    only_written = ["corpus.sources=[{format: text, path: handbook}]", "training.mix={synthetic: 1}", ONE_RUN]
    message = refused(*only_written, verbs={"evaluate"})
    assert "evaluation.tasks.0 ('heldout')" in message and "no source of the corpus holds pairs" in message


def test_a_benchmark_that_mteb_does_not_know_is_refused():
    run = quickstart("evaluation.tasks=[{name: MTEB(nowhere), kind: benchmark}]")
    with pytest.raises(ConfigError, match="no mteb benchmark is named 'MTEB"):
        check_benchmark_names(run, {"evaluate"})
    check_benchmark_names(run, {"train"})
    with pytest.raises(DataError, match="no mteb task has this name"):
        check_benchmark_names(quickstart("evaluation.tasks=[{name: SciFacts, kind: mteb}]"), {"evaluate"})


# --- files and packages


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("corpus.sources=[{format: jsonl, path: none.jsonl, query_column: q}]", "corpus.sources"),
        ("corpus.sources.0.packages=[no_such_package]", "corpus.sources"),
    ],
)
def test_a_corpus_that_is_not_there_stops_plan_and_dry_run(override, key):
    for attempt in (plan_table, lambda run: execute(run, None, dry_run=True)):
        with pytest.raises(DataError, match=key):
            attempt(quickstart(override))


def test_training_files_that_are_not_there_are_refused():
    source = "training.stages.1.sources=[{name: faq, format: sentence_transformers, path: none.parquet}]"
    assert "training.stages.1.sources.0.path: 'none.parquet' does not exist" in refused(source)
    texts = source.replace("none.parquet", str(QUICKSTART)).replace("}]", ", local_texts: {nq: ./gone}}]")
    assert "training.stages.1.sources.0.local_texts.nq: './gone'" in refused(texts)


def test_files_of_evaluation_and_embedding_that_are_not_there_are_refused():
    assert "evaluation.pool: 'none.parquet'" in refused("evaluation.pool=none.parquet")
    assert "embedding.corpus: './none'" in refused("embedding.corpus=./none")


@pytest.mark.parametrize(
    ("package", "override", "told"),
    [
        (
            "openai",
            "mining.teachers=[{model: m, engine: openai, url: 'http://localhost/v1'}]",
            "mining.teachers.0",
        ),
        ("s3fs", "run.output_dir=s3://bucket/runs", "run.output_dir: s3://"),
        (
            "datasets",
            "corpus.sources=[{format: huggingface, path: a/b, query_column: q}]",
            "corpus.sources.0",
        ),
        ("vllm", "run.seed=1", "`embedloom synthesize`"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(package, override, told, monkeypatch):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(MissingDependency) as caught:
        preflight(quickstart(override), ALL)
    assert (
        told in str(caught.value)
        and package in str(caught.value)
        and "pip install 'embedloom[" in str(caught.value)
    )


# --- the port


@pytest.fixture
def taken_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_port_in_use_is_told_before_ray_starts(taken_port, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = quickstart(f"serving.port={taken_port}")
    with pytest.raises(ConfigError, match=rf"serving.port: {taken_port} is in use on 127.0.0.1"):
        check_port(run.config.serving, run.profile)
    preflight(run, ALL)  # no other command binds it
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_port(run.config.serving, run.profile)


# --- who looks when


def test_plan_lists_every_problem_and_dry_run_refuses_the_first():
    run = quickstart(
        "mining.teachers=[minilm-l7]", "evaluation.pool=none.parquet", "synthesis.generators.0.model=./gone"
    )
    lines = [line for line in plan_table(run).splitlines() if line.startswith("cannot be built yet")]
    assert len(lines) >= 3
    assert [
        key for key in ("./gone", "minilm-l7", "none.parquet") if any(key in line for line in lines)
    ] != []
    for dry_run in (True, False):
        with pytest.raises(DataError, match="gone"):
            execute(run, None, dry_run)


def test_a_plan_for_another_cluster_does_not_look_for_its_files_here():
    run = quickstart("mining.teachers=[/mnt/models/teacher]", profile="a100x64")
    assert "cannot be built yet" not in plan_table(run)
    assert execute(run, None, dry_run=True)
