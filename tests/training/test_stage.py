"""Real Ray Train + DeepSpeed on two CPU workers with a tiny Llama."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from embedloom.config.cluster import TrainingGroup
from embedloom.config.training import Candidate, TrainingConfig, TrainingStage
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.prompting import DEFAULT_INSTRUCTIONS, NamedTask
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import GOLDEN_TEXTS
from embedloom.errors import StageError
from embedloom.training.dev import DEV_FILE
from embedloom.training.metrics import METRICS_FILE
from embedloom.training.stage import train_stage
from fakes_serving import client_of
from fakes_training import VectorTasks

STEPS = 24
WORDS = ["red", "green", "blue", "grey", "pink", "gold"]


def make_mining(folder: Path, rows: int = 48) -> Artefact:
    """Examples in which the positive repeats the query's word and the negatives do not."""
    writer = ArtefactWriter(Place(str(folder)), "mining", "test", {}, "local")
    examples = []
    for number in range(rows):
        word = WORDS[number % len(WORDS)]
        others = [other for other in WORDS if other != word][: 1 + number % 3]
        examples.append(
            {
                "id": f"row-{number:03d}",
                "query": f"{word} {number}",
                "query_instruction": "Find the colour",
                "positive": f"the colour {word} is number {number}",
                "positive_score": 0.9,
                "negatives": [f"nothing but {other}" for other in others],
                "negative_scores": [0.3] * len(others),
                "document_instruction": None,
                "task_type": "retrieval",
                "dataset": "public" if number % 4 else "synthetic",
            }
        )
    writer.place.write_table("examples/part-000000.parquet", table_from_rows("examples", examples))
    return writer.commit({"rows": rows})


def make_config(**changes: object) -> TrainingConfig:
    settings = {
        "candidates": [Candidate(name="alpha", seed=3)],
        "stages": [
            TrainingStage(
                name="pretrain",
                negatives=2,
                global_batch=8,
                learning_rate=5e-3,
                max_steps=STEPS,
                warmup_steps=2,
            )
        ],
        "mix": {"public": 0.75, "synthetic": 0.25},
        "checkpoint_every_steps": 3,
        "zero_stage": 1,
        "temperature": 0.1,
        "micro_batch_tokens": 256,
        "dev": {"every_steps": 5},
    }
    return TrainingConfig.model_validate({**settings, **changes})


def run(folder: Path, mining: Artefact, model: Path, config: TrainingConfig, workers: int = 2) -> Artefact:
    writer = ArtefactWriter(Place(str(folder)), "model", "test", {}, "local")
    group = TrainingGroup(workers=workers, cpus=1, threads=1)
    return train_stage(
        config, config.stages[0], config.candidates[0], model, mining, group, "float32", writer,
        Place(str(folder.parent / "prepared")), VectorTasks(),
    )  # fmt: skip


def dev_of(artefact: Artefact) -> dict:
    return json.loads((artefact.place.local / DEV_FILE).read_text())


def losses(artefact: Artefact) -> list[float]:
    lines = (artefact.place.local / METRICS_FILE).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def undisturbed(ray_local, tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    mining = make_mining(root / "mining")
    return mining, run(root / "two", mining, tiny_model, make_config())


@pytest.mark.ray
def test_training_lowers_the_loss_and_leaves_a_loadable_model(undisturbed, tiny_model):
    _, artefact = undisturbed
    curve = losses(artefact)
    assert len(curve) == STEPS
    assert np.mean(curve[-3:]) < np.mean(curve[:3])
    trained, base = (
        Encoder.load(artefact.place.local, dtype="float32"),
        Encoder.load(tiny_model, dtype="float32"),
    )
    assert trained.contract.max_query_tokens == base.contract.max_query_tokens
    assert not np.allclose(trained.embed(["red 1"], "query"), base.embed(["red 1"], "query"))
    assert not artefact.place.exists("_train")
    assert artefact.counts["rows"] == 8 * STEPS and artefact.counts["repeated_negatives"] > 0


@pytest.mark.ray
def test_the_trained_instruction_is_what_the_endpoint_sends_and_readers_put_before_a_query(undisturbed):
    """Examples, contract, cards, golden vectors, sentence-transformers and HTTP say the same."""
    _, artefact = undisturbed
    folder = artefact.place.local
    encoder = Encoder.load(folder, dtype="float32")
    assert encoder.contract.instructions["retrieval"] == "Find the colour"
    assert encoder.contract.instructions["sts"] == DEFAULT_INSTRUCTIONS["sts"]
    # Both sources have it; it is called after the one with more queries, 0.75 of them.
    assert encoder.contract.tasks == {
        "public": NamedTask(task_type="retrieval", instruction="Find the colour", share=1.0)
    }
    (stage,) = artefact.manifest["details"]["stages"]
    assert stage["queries"] == 8 * STEPS and sum(one["queries"] for one in stage["prompts"]) == 8 * STEPS
    assert "| public | retrieval | Find the colour |" in (folder / "README.md").read_text()
    prompts = json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == "Instruct: Find the colour\nQuery: " and prompts["document"] == ""
    golden = json.loads((folder / "_golden.json").read_text())["ids"][0]
    assert golden == encoder.tokenize([GOLDEN_TEXTS[0][0]], "query", None, "Find the colour")[0]
    with client_of(encoder) as client:
        body = {"model": "tiny", "input": "red 1", "input_type": "query"}
        found = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    trained_with = encoder.embed(["Instruct: Find the colour\nQuery: red 1"], "document", "retrieval")
    assert found == pytest.approx(trained_with[0].tolist(), abs=1e-5)


@pytest.mark.ray
def test_one_worker_and_zero_2_give_the_curve_of_two_workers(undisturbed, tiny_model, tmp_path):
    mining, artefact = undisturbed
    other = run(tmp_path / "one", mining, tiny_model, make_config(zero_stage=2), workers=1)
    # Losses of 1e-4 are float32 sums near 0: by processor they differ by 3e-8, which is more than their ten-thousandth part.
    assert losses(other) == pytest.approx(losses(artefact), rel=1e-4, abs=1e-6)


def is_running(process: psutil.Process, name: str) -> bool:
    try:
        return name in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def kill_a_worker_after_a_checkpoint(storage: Path, killed: list[int]) -> None:
    """Wait for the first checkpoint, then SIGKILL one process of the worker group."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not killed:
        if list(storage.glob("run/step-*/metrics.jsonl")):
            for process in psutil.Process().children(recursive=True):
                if is_running(process, "RayTrainWorker"):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    break
        time.sleep(0.05)


@pytest.mark.ray
def test_a_killed_rank_resumes_and_ends_with_the_same_weights(undisturbed, tiny_model, tmp_path):
    mining, artefact = undisturbed
    killed: list[int] = []
    killer = threading.Thread(
        target=kill_a_worker_after_a_checkpoint, args=(tmp_path / "killed" / "_train", killed)
    )
    killer.start()
    resumed = run(tmp_path / "killed", mining, tiny_model, make_config())
    killer.join()
    assert killed, "the training ended before a worker could be killed"
    assert losses(resumed) == pytest.approx(losses(artefact), rel=1e-6)
    assert dev_of(resumed)["best_step"] == dev_of(artefact)["best_step"]
    same = load_file(artefact.place.local / "model.safetensors")
    for name, tensor in load_file(resumed.place.local / "model.safetensors").items():
        np.testing.assert_allclose(tensor, same[name], rtol=1e-5, atol=1e-6)


@pytest.mark.ray
def test_a_loss_that_is_no_number_stops_the_run_and_names_its_examples(undisturbed, tiny_model, tmp_path):
    mining, _ = undisturbed
    stage = make_config().stages[0].model_copy(update={"learning_rate": 1e30})
    with pytest.raises(
        StageError, match=r"not finite at step [23] for \d of 8 queries: (public|synthetic)/row-"
    ):
        run(tmp_path / "nan", mining, tiny_model, make_config(stages=[stage]), workers=1)
    assert not (tmp_path / "nan" / "manifest.json").exists()


@pytest.mark.ray
def test_the_run_leaves_metrics_points_and_a_parity_record(undisturbed):
    _, artefact = undisturbed
    folder = artefact.place.local
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(record["padding_share"] < 0.5 and record["memory_mib"] > 0 for record in records)
    assert list((folder / "_tensorboard").glob("events*"))
    assert min(artefact.manifest["details"]["parity"].values()) > 0.9999
    assert 0 <= artefact.counts["imbalance"] < 0.5


@pytest.mark.ray
def test_the_manifest_and_the_cards_tell_the_dev_curve_and_the_sources(undisturbed):
    _, artefact = undisturbed
    details, folder = artefact.manifest["details"], artefact.place.local
    dev = dev_of(artefact)
    assert details["dev"] == dev and [p["step"] for p in dev["points"]] == [0, 5, 10, 15, 20, STEPS]
    best = max(point["score"] for point in dev["points"][1:])
    encoder = Encoder.load(folder, dtype="float32")
    vectors = encoder.embed(["red 1", "the colour red is number 1"], "document")
    assert float(vectors[0] @ vectors[1]) == pytest.approx(best, abs=1e-3)
    (stage,) = details["stages"]
    assert {source["name"]: source["rows"] for source in stage["sources"]} == {"public": 36, "synthetic": 12}
    assert f"at step {dev['best_step']}" in (folder / "README.md").read_text()
    assert "| public |" in (folder / "data_card.md").read_text()


def misread_start(loop):
    raise StageError("transformers reads another model than was trained")


def misread_model(checkpoint, readers):
    raise StageError("sentence-transformers reads another model than was trained")


@pytest.mark.ray
def test_a_reader_that_cannot_read_the_base_is_found_before_the_first_step(
    ray_local, undisturbed, tiny_model, tmp_path, monkeypatch
):
    mining, _ = undisturbed
    monkeypatch.setattr("embedloom.training.stage._start_parity", misread_start)
    monkeypatch.setattr("embedloom.training.stage._READABLE", {})
    with pytest.raises(StageError, match="transformers reads another model"):
        run(tmp_path / "model", mining, tiny_model, make_config(), workers=1)
    assert not list(tmp_path.rglob(METRICS_FILE))


def test_data_are_prepared_before_a_worker_is_asked_for(tiny_model, tmp_path, monkeypatch):
    """Without Ray here: preparing small data needs no task, and asking for a worker would start one."""
    mining = make_mining(tmp_path / "mining")
    asked = []

    def refuse(stage, *_, **__):
        asked.append([path.name for path in (tmp_path / "prepared").rglob("index.json")])
        raise StageError(f"{stage}: no worker here")
        yield

    monkeypatch.setattr("embedloom.training.stage.run_tasks", refuse)
    monkeypatch.setattr("embedloom.training.stage._READABLE", {})
    with pytest.raises(StageError, match="parity: no worker here"):
        run(tmp_path / "model", mining, tiny_model, make_config())
    assert asked == [["index.json", "index.json"]]  # of both sources of the mix


@pytest.mark.ray
def test_a_finished_model_whose_check_failed_is_checked_again_without_training(
    ray_local, undisturbed, tiny_model, tmp_path, monkeypatch
):
    mining, _ = undisturbed
    with monkeypatch.context() as broken:
        broken.setattr("embedloom.training.stage._finished_parity", misread_model)
        with pytest.raises(StageError, match="sentence-transformers reads another model"):
            run(tmp_path / "model", mining, tiny_model, make_config(), workers=1)
    (metrics,) = (tmp_path / "model" / "_train" / "run" / "model").glob(METRICS_FILE)
    trained = metrics.read_bytes()
    artefact = run(tmp_path / "model", mining, tiny_model, make_config(), workers=1)
    assert artefact.manifest["details"]["parity"]["transformers"] > 0.9999
    # The seconds of every step are in it, so a second training would have written another file.
    assert (artefact.place.local / METRICS_FILE).read_bytes() == trained
