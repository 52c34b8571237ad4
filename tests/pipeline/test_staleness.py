"""What a run reads is known by what it holds: touched and copied files change nothing, other bytes do, and are named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from embedloom.core import contents
from embedloom.core.artefacts import Artefact, fingerprint
from embedloom.core.contents import changes, contents_of, path_contents
from embedloom.core.model_folder import ModelFolder
from embedloom.encoder import registry
from embedloom.encoder.packaged import PackagedModel, Part
from embedloom.encoder.registry import hub_revision, local_contents
from embedloom.errors import MissingDependency
from embedloom.pipeline.commands import execute, load
from embedloom.pipeline.graph import build_nodes, fingerprints, finished, graph, missing, states, writer_for
from embedloom.retrieval.identity import aside_of
from embedloom.retrieval.inputs import input_state
from fakes_mining import make_tiny_cross_encoder

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster" / "cluster.yaml"
OLD = 1_600_000_000 * 10**9  # long before any cache could be racing it


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path / "cache"))


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_beir(folder: Path) -> Path:
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{n}", "text": f"chapitre {n}"} for n in range(3)])
    write_lines(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"où est {n} ?"} for n in range(3)])
    (folder / "qrels").mkdir()
    for split in ("train", "dev", "test"):
        rows = "".join(f"q{n}\td{n}\t1\n" for n in range(3))
        (folder / f"qrels/{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    return folder


@pytest.fixture
def inputs(tmp_path, tiny_llama, tiny_model):
    """One of everything that a run can read from this machine."""
    place = tmp_path / "in"
    docs = [
        {"id": f"d{n}", "text": f"Kapitel {n} über Flüsse, Seen und das Meer, Nummer {n}"} for n in range(40)
    ]
    write_lines(place / "docs.jsonl", docs)
    shutil.copytree(tiny_llama, place / "base")
    for name in ("teacher", "judge", "writer", "embedder"):
        shutil.copytree(tiny_model, place / name)
    make_tiny_cross_encoder(place / "cross")
    write_beir(place / "task")
    write_beir(place / "watched")
    write_lines(
        place / "pairs.jsonl",
        [{"anchor": f"a{n}", "positive": f"p{n}", "negative": f"n{n}"} for n in range(4)],
    )
    write_lines(place / "guarded.jsonl", [{"query": "never train on this"}])
    write_lines(place / "others.jsonl", [{"text": "something to embed"}])
    prompt = yaml.safe_load((ROOT / "platform/embedloom/synthesis/prompts/seed_queries.yaml").read_text())
    (place / "prompt.yaml").write_text(yaml.safe_dump(prompt, allow_unicode=True))
    return place


def write_config(place: Path, folder: Path) -> Path:
    source = {"name": "own", "format": "sentence_transformers", "path": str(place / "pairs.jsonl")}
    beir = {"kind": "beir"}
    content = {
        "run": {"name": "r", "output_dir": str(folder / "runs")},
        "corpus": {
            "sources": [{"format": "jsonl", "path": str(place / "docs.jsonl"), "id_column": "id"}],
            "min_characters": 5,
            "near_duplicate_threshold": None,
            "chunk_tokens": 64,
        },
        "synthesis": {
            "generators": [{"model": str(place / "writer")}],
            "families": [{"family": "seed_queries", "rows": 4, "prompt": str(place / "prompt.yaml")}],
            "quality": {"contamination": {"files": [str(place / "guarded.jsonl")]}},
        },
        "mining": {
            "teachers": [str(place / "teacher")],
            "selection": {"negatives": 2},
            "top_k": 20,
            "rescoring": {"model": str(place / "cross"), "top": 10},
            "audit": {"judge": str(place / "judge")},
        },
        "encoder": {"base": str(place / "base"), "max_query_tokens": 64, "max_document_tokens": 64},
        "training": {
            "candidates": [{"name": "a", "seed": 1}],
            "stages": [
                {
                    "name": "tune",
                    "negatives": 1,
                    "max_steps": 1,
                    "global_batch": 4,
                    "learning_rate": 0.001,
                    "sources": [source],
                }
            ],
            "dev": {"tasks": [{**beir, "name": "watched", "split": "dev", "path": str(place / "watched")}]},
        },
        "evaluation": {"tasks": [{**beir, "name": "task", "path": str(place / "task")}]},
        "embedding": {"model": str(place / "embedder"), "corpus": str(place / "others.jsonl")},
    }
    path = folder / "run.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def opened(place: Path, folder: Path, *overrides: str):
    return load(write_config(place, folder), "local", CLUSTER, list(overrides))


def own_settings(run) -> dict[str, str]:
    return {name: fingerprint(*node.settings) for name, node in graph(run).items()}


def edit(path: Path) -> None:
    """Other content of the same size, with its former times: only who reads it, or asks the inode, can know."""
    before = path.stat()
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        name = max(tensors, key=lambda one: tensors[one].numel())
        tensors[name].view(-1)[tensors[name].numel() // 2] += 1
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        content = bytearray(path.read_bytes())
        position = max(content.rfind(b"0"), content.rfind(b"n"))
        content[position : position + 1] = b"1" if content[position : position + 1] == b"0" else b"m"
        path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


READ_BY = [
    ("docs.jsonl", {"corpus"}),
    ("base/model.safetensors", {"encoder"}),
    ("base/tokenizer.json", {"encoder", "corpus"}),
    ("writer/model.safetensors", {"synthesis"}),
    ("prompt.yaml", {"synthesis"}),
    ("guarded.jsonl", {"synthesis"}),
    ("teacher/model.safetensors", {"mining", "evaluation"}),
    ("teacher/contract.json", {"mining", "evaluation"}),
    ("cross/model.safetensors", {"rescoring"}),
    ("judge/tokenizer.json", {"examples"}),
    ("pairs.jsonl", {"training/a/tune"}),
    ("watched/queries.jsonl", {"training/a/tune"}),
    ("task/qrels/test.tsv", {"evaluation"}),
    ("others.jsonl", {"vectors"}),
    ("embedder/model.safetensors", {"vectors"}),
]


@pytest.mark.parametrize(("file", "nodes"), READ_BY)
def test_other_bytes_make_stale_what_reads_them_and_nothing_else(inputs, tmp_path, file, nodes):
    for path in inputs.rglob("*"):
        os.utime(path, ns=(OLD, OLD))
    run = opened(inputs, tmp_path)
    before = own_settings(run)
    assert own_settings(run) == before  # by the cache
    if file == "prompt.yaml":  # still a prompt afterwards
        prompt = yaml.safe_load((inputs / file).read_text())
        prompt["instruction"] = str(prompt["instruction"]) + " Auf Deutsch."
        (inputs / file).write_text(yaml.safe_dump(prompt))
    else:
        edit(inputs / file)
    after = own_settings(run)
    assert {name for name in before if before[name] != after[name]} == nodes


def test_touched_and_copied_inputs_change_no_fingerprint(inputs, tmp_path):
    run = opened(inputs, tmp_path)
    before = fingerprints(graph(run))
    for path in inputs.rglob("*"):
        path.touch()
    assert fingerprints(graph(run)) == before
    shutil.copytree(inputs, tmp_path / "copy")  # new inodes, new times
    shutil.rmtree(inputs)
    shutil.move(tmp_path / "copy", inputs)
    assert fingerprints(graph(run)) == before
    gate = {"verdict": "refused", "weights": "x"}
    for name in ("base", "teacher", "judge", "embedder", "cross"):  # somebody judged them meanwhile
        (inputs / name / "gate.json").write_text(json.dumps(gate))
        (inputs / name / ".cache").mkdir()
        (inputs / name / ".cache/lock.json").write_text("{}")
    assert fingerprints(graph(run)) == before


def test_data_and_models_may_lie_elsewhere(inputs, tmp_path):
    """Where files lie decides nothing. Teachers, writers and judges keep their names: those stand in what they made."""
    before = fingerprints(graph(opened(inputs, tmp_path)))
    other = tmp_path / "andere Platte"
    shutil.copytree(inputs, other)
    moved = graph(
        opened(
            inputs, tmp_path,
            f"encoder.base={other}/base", f"corpus.sources.0.path={other}/docs.jsonl",
            f"training.stages.0.sources.0.path={other}/pairs.jsonl", f"training.dev.tasks.0.path={other}/watched",
            f"evaluation.tasks.0.path={other}/task", f"embedding.corpus={other}/others.jsonl",
            f"embedding.model={other}/embedder", f"synthesis.families.0.prompt={other}/prompt.yaml",
            f"synthesis.quality.contamination.files=['{other}/guarded.jsonl']",
        )
    )  # fmt: skip
    assert fingerprints(moved) == before
    renamed = fingerprints(graph(opened(inputs, tmp_path, f"mining.teachers=['{other}/teacher']")))
    assert renamed["mining"] != before["mining"]


def test_plan_and_replay_name_what_changed(inputs, tmp_path):
    """The corpus and the base are built for real; then their inputs change one after another."""
    run = opened(inputs, tmp_path)
    nodes = graph(run)
    build_nodes(run, nodes, ["corpus", "encoder"], {})
    assert [one.state for one in states(run)][:2] == ["finished", "finished"]
    for path in inputs.rglob("*"):
        path.touch()
    assert [one.state for one in states(run)][:2] == ["finished", "finished"]

    edit(inputs / "base/model.safetensors")
    found = {one.name: one for one in states(run)}
    assert found["corpus"].state == "finished"
    assert (found["encoder"].state, found["encoder"].reason) == (
        "stale",
        f"{inputs}/base changed: model.safetensors",
    )
    plan = execute(run, None, dry_run=True)
    assert f"encoder is built again: {inputs}/base changed: model.safetensors" in plan.splitlines()

    write_lines(inputs / "docs.jsonl", [{"id": "x", "text": "ein ganz anderer Text über Berge"}])
    other = opened(inputs, tmp_path, "corpus.min_characters=7", "encoder.max_query_tokens=32")
    reasons = {one.name: one.reason for one in states(other)}
    assert reasons["corpus"] == f"{inputs}/docs.jsonl changed: docs.jsonl; min_characters 5 -> 7"
    assert reasons["encoder"].endswith("model.safetensors; max_query_tokens 64 -> 32")


def cached(cache: Path, model: Path, commit: str) -> None:
    """What huggingface_hub keeps of a model whose main branch stands at ``commit``."""
    root = cache / "models--org--base"
    shutil.copytree(model, root / "snapshots" / commit)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)


def test_a_hub_model_that_moved_is_seen_without_asking_the_hub(inputs, tmp_path, tiny_model, monkeypatch):
    """The commit is what huggingface_hub's own reading of its cache says; fingerprints do not have it."""
    from huggingface_hub import constants, snapshot_download

    old, new = "a" * 40, "b" * 40
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))  # for its own reading below
    run = opened(inputs, tmp_path, "encoder.base=org/base")
    nodes, wanted = graph(run), fingerprints(graph(run))
    cached(tmp_path / "hub", inputs / "base", old)
    assert fingerprints(graph(run)) == wanted  # known before it is fetched
    build_nodes(run, nodes, ["corpus", "encoder"], done := {})
    assert Path(snapshot_download("org/base", local_files_only=True)).name == hub_revision("org/base") == old
    assert [done[name].manifest["revisions"] for name in ("corpus", "encoder")] == [{"org/base": old}] * 2
    trained = "training/a/tune"
    made_from = dict.fromkeys(nodes[trained].inputs, done["encoder"].fingerprint)
    child = writer_for(run, nodes, trained, made_from, done["encoder"].manifest["revisions"])
    assert child.commit({}).manifest["revisions"] == {"org/base": old}  # not its own input, yet made with it
    assert sorted(finished(run, nodes)) == ["corpus", "encoder", trained]

    cached(tmp_path / "hub", tiny_model, new)
    assert (hub_revision("org/base"), fingerprints(graph(run))) == (new, wanted)
    reason = f"org/base moved: commit {'a' * 12} -> {'b' * 12}"
    assert {one.name: one.reason for one in states(run) if one.state == "stale"} == {
        "corpus": reason, "encoder": reason, trained: reason,
    }  # fmt: skip
    assert finished(run, nodes) == {} and missing(run, nodes, "encoder") == ["encoder"]
    assert f"encoder is built again: {reason}" in execute(run, None, dry_run=True).splitlines()
    build_nodes(run, nodes, ["encoder"], done)
    assert done["encoder"].manifest["revisions"] == {"org/base": new}
    assert sorted(finished(run, nodes)) == ["encoder"]


@pytest.mark.parametrize("name", ["org/base", "smollm2-135m", "minilm-l6", "./here", "/there", "a.gguf"])
def test_only_hub_models_in_the_cache_have_a_commit(name, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_revision(name) is None


def test_an_artefact_of_an_earlier_version_says_so(inputs, tmp_path):
    run = opened(inputs, tmp_path)
    build_nodes(run, graph(run), ["encoder"], {})
    place = run.place.child("encoder")
    manifest = place.read_json("manifest.json")
    manifest.pop("origin")
    place.write_json("manifest.json", {**manifest, "fingerprint": "0" * 16, "config_fingerprint": "0" * 16})
    (reason,) = [one.reason for one in states(run) if one.name == "encoder"]
    assert reason == "its settings or the files it reads changed; which, an earlier version did not record"


def test_a_rebuild_says_why_it_replaces(inputs, tmp_path, capsys):
    run = opened(inputs, tmp_path)
    build_nodes(run, graph(run), ["encoder"], {})
    edit(inputs / "base/config.json")
    capsys.readouterr()
    build_nodes(run, graph(run), ["encoder"], {})
    assert f"what is there is replaced: {inputs}/base changed: config.json" in capsys.readouterr().err


def test_a_middle_layer_tells_two_models_apart(tmp_path, tiny_model):
    """Tuned models share their first and last megabytes; a hash of the edges called them one."""
    import torch

    for name, value in (("a", 0.0), ("b", 1.0)):
        shutil.copytree(tiny_model, tmp_path / name / "model")
        tensors = {f"layer{n}": torch.full((2**20,), value if n == 2 else 5.0) for n in range(5)}
        save_file(tensors, tmp_path / name / "model/model.safetensors")
        os.utime(tmp_path / name / "model/model.safetensors", ns=(OLD, OLD))
    left, right = tmp_path / "a/model", tmp_path / "b/model"
    assert (left / "model.safetensors").stat().st_size == (right / "model.safetensors").stat().st_size
    assert (
        ModelFolder(left).fingerprint != ModelFolder(right).fingerprint
        and ModelFolder(left).id != ModelFolder(right).id
    )
    identity = ModelFolder(left).fingerprint, ModelFolder(left).id
    for name in (
        "gate.json",
        "int8.json",
        "lineage.json",
        "README.md",
    ):  # what others write beside the weights
        (left / name).write_text("{}")
    assert (ModelFolder(left).fingerprint, ModelFolder(left).id) == identity


@pytest.fixture
def read(monkeypatch):
    """Names of the files whose bytes were read."""
    names: list[str] = []
    plain = contents._hash
    monkeypatch.setattr(contents, "_hash", lambda path: names.append(path.name) or plain(path))
    return names


def cache_files(tmp_path):
    return sorted((tmp_path / "cache/hashes").glob("*.json"))


def test_files_are_read_once_until_they_change(tmp_path, read, tiny_model, monkeypatch):
    monkeypatch.setattr(contents, "_RACY_NANOSECONDS", -(10**18))
    shutil.copytree(tiny_model, tmp_path / "model")
    for path in (tmp_path / "model").rglob("*"):
        os.utime(path, ns=(OLD, OLD))
    first = ModelFolder(tmp_path / "model").contents
    assert read and set(read) == {Path(name).name for name in first}
    assert ModelFolder(tmp_path / "model").contents == first and len(read) == len(first)
    edit(tmp_path / "model/model.safetensors")
    assert changes(first, ModelFolder(tmp_path / "model").contents) == ["model.safetensors"]
    assert len(read) == len(first) + 1


def test_the_cache_is_only_a_cache(tmp_path, read, monkeypatch):
    """Deleted, cut, of another form, of a folder that cannot be written: the hashes are the same."""
    monkeypatch.setattr(contents, "_RACY_NANOSECONDS", -(10**18))
    write_lines(tmp_path / "in/a.jsonl", [{"text": "a"}])
    write_lines(tmp_path / "in/b.jsonl", [{"text": "b"}])
    right = path_contents(str(tmp_path / "in"))
    assert read == ["a.jsonl", "b.jsonl"]
    assert path_contents(str(tmp_path / "in")) == right and len(read) == 2
    (kept,) = cache_files(tmp_path)
    whole = kept.read_text()
    entry = json.loads(whole)["files"]["a.jsonl"]
    broken = [
        "", whole[:-9], "[]", '{"files": []}', "\x00" * 50, '{"files": {"a.jsonl": null}}',
        json.dumps({"files": {"a.jsonl": [*entry[:-1], 7], "b.jsonl": entry[:-1]}}),
        json.dumps({"files": {"a.jsonl": [0, 0, 0, 0, "f" * 32]}}),
    ]  # fmt: skip
    for content in broken:
        kept.write_text(content)
        assert path_contents(str(tmp_path / "in")) == right
        assert json.loads(kept.read_text()) == json.loads(whole)
    shutil.rmtree(tmp_path / "cache")
    assert path_contents(str(tmp_path / "in")) == right
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert path_contents(str(tmp_path / "in")) == right


def test_a_file_changed_within_the_clocks_tick_is_read_again(tmp_path, read):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    first = contents_of({"a": path})
    path.write_text(path.read_text().replace("a", "b"))
    assert contents_of({"a": path}) != first and len(read) == 2
    assert not cache_files(tmp_path)


def toy_model(held):
    return PackagedModel((Part("toy", "toy_models", "model"),), "folder", "MIT", held, "1.0")


def test_a_registry_name_is_its_content(tmp_path, monkeypatch):
    """As long as the package holds what it held, the name is all; another release of it is another model."""
    package = tmp_path / "toy_models"
    write_lines(package / "model/config.json", [{"hidden": 1}])
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    held = contents.digest(ModelFolder(package / "model").contents)
    monkeypatch.setitem(registry.REGISTRY, "toy", toy_model(held))
    assert local_contents("toy") is None
    write_lines(package / "model/config.json", [{"hidden": 2}])
    assert list(local_contents("toy")) == ["config.json"]
    assert local_contents("org/on-the-hub") is None and local_contents("./nowhere") is None


@pytest.mark.parametrize("name", sorted(registry.REGISTRY))
def test_installed_registry_models_hold_what_their_names_stand_for(name):
    try:
        found = registry.REGISTRY[name].contents(name)
    except MissingDependency:
        if registry.REGISTRY[name].extra == "demo":  # in every lock
            raise
        pytest.skip(f"{name} is not installed")
    assert contents.digest(found) == registry.REGISTRY[name].holds
    assert local_contents(name) is None


def test_an_embedded_input_is_its_content(tmp_path):
    folder = tmp_path / "in"
    write_lines(folder / "unter/ä.jsonl", [{"text": "x"}])
    before = input_state(str(folder))
    assert before == {"unter/ä.jsonl": contents_of({"": folder / "unter/ä.jsonl"})[""]}
    shutil.copytree(folder, tmp_path / "copy")
    assert input_state(str(tmp_path / "copy")) == before
    edit(folder / "unter/ä.jsonl") if b"0" in (folder / "unter/ä.jsonl").read_bytes() else write_lines(
        folder / "unter/ä.jsonl", [{"text": "y"}]
    )
    assert input_state(str(folder)) != before


def begun(run):
    """The writer of the synthesis of a run, opened as its stage would."""
    nodes = graph(run)
    return writer_for(run, nodes, "synthesis", {"corpus": fingerprints(nodes)["corpus"]})


ROWS = "synthesis.families.0.rows"
LIMIT = "synthesis.max_attempts_per_row"


@pytest.mark.parametrize(
    ("changed", "kept", "final"),
    [
        ((f"{LIMIT}=12",), True, True),
        (("synthesis.expected_acceptance=0.5",), True, True),
        ((f"{ROWS}=9",), True, False),
        ((f"{ROWS}=2", f"{LIMIT}=12"), True, False),
        (("synthesis.shard_rows=4",), False, False),
        (("synthesis.sampling.top_p=0.5",), False, False),
        ((f"{ROWS}=9", "run.seed=7"), False, False),
        ((f"{ROWS}=9", "corpus.min_characters=7"), False, False),
    ],
)
def test_begun_synthesis_goes_on_under_other_limits_and_numbers_of_rows(
    inputs, tmp_path, changed, kept, final
):
    place = begun(opened(inputs, tmp_path)).place
    place.write_json("steps/rows/round-000/plan.json", {})
    place.write_json("pairs/part-000000.json", {})
    other = opened(inputs, tmp_path, *changed)
    for _ in range(2):  # and once more, should it be killed right then
        writer = begun(other)
        assert writer.resumed is (kept or _ == 1)
        assert place.exists("steps/rows/round-000/plan.json") is kept
        assert place.exists("pairs/part-000000.json") is final, "cut to the former quotas"
        assert writer.fingerprint == fingerprints(graph(other))["synthesis"]


def test_finished_synthesis_stays_under_another_limit(inputs, tmp_path):
    run = opened(inputs, tmp_path)
    done = begun(run).commit({"rows": 4})
    raised = opened(inputs, tmp_path, f"{LIMIT}=12")
    assert finished(raised, graph(raised))["synthesis"].fingerprint == done.fingerprint
    assert fingerprints(graph(raised)) == fingerprints(graph(run)), "nothing behind it is stale either"
    grown = opened(inputs, tmp_path, f"{ROWS}=9")
    assert "synthesis" not in finished(grown, graph(grown))


@pytest.mark.parametrize(("changed", "aside"), [((f"{ROWS}=9",), True), ((f"{ROWS}=9", "run.seed=7"), False)])
def test_finished_synthesis_waits_aside_while_one_with_other_numbers_of_rows_is_written(
    inputs, tmp_path, changed, aside
):
    done = begun(opened(inputs, tmp_path)).commit({"rows": 4})
    writer = begun(opened(inputs, tmp_path, *changed))
    assert not writer.resumed and not writer.place.exists("manifest.json")
    there = aside_of(done.place)
    assert there.exists("manifest.json") is aside
    if aside:
        assert Artefact.open(there).fingerprint == done.fingerprint
        assert begun(opened(inputs, tmp_path, *changed)).resumed, "killed and begun once more"
