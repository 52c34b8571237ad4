"""Dev scores, the best model and adapters through real steps on two gloo processes, without Ray."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from embedloom.config.training import TrainingConfig, TrainingSource, TrainingStage
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import check_export, lowest_cosine
from embedloom.training.data import prepare_sources
from embedloom.training.dev import DEV_FILE, DevPoint, best_of
from embedloom.training.loop import LoopConfig, StageTrainer
from fakes_group import run_processes

STEPS = 4
TOKEN_IDS = [[1, 20 + number, *range(40, 41 + number % 5)] for number in range(7)]
LORA = {"rank": 2, "alpha": 8.0, "target_modules": ["q_proj", "down_proj"]}


@dataclass(frozen=True)
class ScriptedTasks:
    """Scores by how often it was asked; keeps the vectors it was shown."""

    scores: tuple[float, ...]
    seen: Path

    def open(self, encoder):
        return ScriptedBench(self)


class ScriptedBench:
    def __init__(self, tasks):
        self.token_ids = TOKEN_IDS
        self._tasks = tasks
        self._asked = 0

    def score(self, vectors):
        self._tasks.seen.mkdir(exist_ok=True)
        np.save(self._tasks.seen / f"{self._asked}.npy", vectors)
        score = self._tasks.scores[self._asked]
        self._asked += 1
        return {"one": score, "two": score}


@dataclass(frozen=True)
class Task:
    config: LoopConfig
    out: Path
    start: Path | None = None


def train(task, rank, world_size):
    """Run the real loop; what it would report to Ray Train is copied to ``out``."""
    trainer = StageTrainer(task.config, rank, world_size)
    if task.start is not None:
        trainer.resume(task.start)

    def report(folder, name):
        if folder is not None:
            shutil.copytree(folder, task.out / name, dirs_exist_ok=True)

    trainer._report = report
    trained = [n for n, p in trainer.encoder.backbone.named_parameters() if p.requires_grad]
    problem = trainer.run()
    return problem, [record.loss for record in trainer.writer.records], trained


def make_config(root, model, name, scores=None, keep="best", **changes):
    root = root / name
    root.mkdir()
    rows = [{"id": f"r{n}", "query": f"{n % 6} is", "pos": [f"{n % 6} {n}"], "neg": [f"{(n + 1) % 6}"]}
            for n in range(32)]  # fmt: skip
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TrainingSource(name="n", format="flagembedding", path=str(path), instruction="Find")
    stage = TrainingStage(
        name="s", negatives=1, global_batch=4, learning_rate=2e-2, max_steps=STEPS, warmup_steps=1,
        sources=(source,),
    )  # fmt: skip
    dev = {"every_steps": 1, "keep": keep} if scores else None
    training = TrainingConfig(
        candidates=[{"name": "a", "seed": 0}], stages=[stage], temperature=0.1, micro_batch_tokens=150,
        checkpoint_every_steps=3, trackers=(), dev=dev, **changes,
    )  # fmt: skip
    data = Place(str(root / "data"))
    prepared = prepare_sources("t", training, 1, (source,), None, model, data)
    folders = {key: index["folder"] for key, index in prepared.items()}
    tasks = ScriptedTasks(scores, root / "seen") if scores else None
    return LoopConfig(
        "t", training, stage, (source,), 5, 1.0, "float32", model, data, folders, Place(str(root)), 1, tasks
    )


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("dev")
    out = {name: root / f"out-{name}" for name in ("whole", "resumed", "sharded", "lora-2", "lora-3")}
    lora = {"lora": LORA, "gradient_checkpointing": True}
    scores = (0.95, 0.2, 0.9, 0.3, 0.9)  # the start, which cannot be kept, then the steps
    whole = make_config(root, tiny_model, "whole", scores, zero_stage=1, **lora)
    (root / "again").mkdir()
    tasks = {
        "whole": Task(whole, out["whole"]),
        "sharded": Task(
            make_config(root, tiny_model, "sharded", scores, keep="last", zero_stage=3), out["sharded"]
        ),
        "lora-2": Task(make_config(root, tiny_model, "lora-2", zero_stage=2, **lora), out["lora-2"]),
        "lora-3": Task(make_config(root, tiny_model, "lora-3", zero_stage=3, **lora), out["lora-3"]),
    }
    again = replace(
        whole, dev_tasks=ScriptedTasks(scores[4:], root / "again"), logs=Place(str(root / "again"))
    )
    own = Task(again, out["resumed"], out["whole"] / "step-00000003")
    found = run_processes(train, {**tasks, "resumed": own}, 2)
    return root, out, {**found, "again": (again, None, own.start)}


def vectors_of(folder):
    return Encoder.load(folder, dtype="float32", device="cpu").embed_tokens(TOKEN_IDS)


@pytest.mark.slow
def test_the_exported_model_is_the_best_scored_one_and_its_merged_weights_are_the_adapters(trained):
    root, out, found = trained
    model = out["whole"] / "model"
    dev = json.loads((model / DEV_FILE).read_text())
    assert found["whole"][0] is None and dev["best_step"] == 2
    assert [point["step"] for point in dev["points"]] == [0, 1, 2, 3, 4]
    seen = [np.load(root / "whole" / "seen" / f"{number}.npy") for number in range(5)]
    exported = vectors_of(model)
    # What the workers embedded together, with adapters, is what one process embeds with the merged weights.
    assert lowest_cosine(exported, seen[2]) > 0.99999
    assert all(lowest_cosine(exported, seen[other]) < 0.9999 for other in (0, 1, 3, 4))
    assert min(check_export(model).values()) > 0.99999
    scored = [json.loads(line)["dev_score"] for line in (model / "metrics.jsonl").read_text().splitlines()]
    assert scored == [0.2, 0.9, 0.3, 0.9]


@pytest.mark.slow
def test_a_resumed_run_exports_the_best_model_of_before(trained):
    _, out, found = trained
    before, after = out["whole"] / "model", out["resumed"] / "model"
    assert found["resumed"][1] == pytest.approx(found["whole"][1], rel=1e-6)
    assert (after / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
    assert json.loads((after / DEV_FILE).read_text()) == json.loads((before / DEV_FILE).read_text())


@pytest.mark.slow
def test_one_worker_goes_on_from_the_checkpoint_of_two(trained):
    root, out, found = trained
    again, _, start = found["again"]
    one = run_processes(train, {"one": Task(again, root / "out-one", start)}, 1)["one"]
    assert one[1] == pytest.approx(found["whole"][1], rel=1e-4)
    best = (out["whole"] / "model" / "model.safetensors").read_bytes()
    assert (root / "out-one" / "model" / "model.safetensors").read_bytes() == best


@pytest.mark.slow
def test_only_adapters_learn_and_the_export_differs_from_the_base_by_their_rank(trained, tiny_model):
    _, out, found = trained
    assert found["whole"][2] and all(".lora_" in name for name in found["whole"][2])
    base, merged = (
        load_file(folder / "model.safetensors") for folder in (tiny_model, out["whole"] / "model")
    )
    assert base.keys() == merged.keys()
    for name, tensor in merged.items():
        difference = tensor - base[name]
        if "q_proj" in name or "down_proj" in name:
            assert 1 <= np.linalg.matrix_rank(difference, tol=1e-5) <= LORA["rank"], name
        else:
            assert not difference.any(), name


@pytest.mark.slow
def test_adapters_learn_alike_under_zero_1_2_and_3(trained):
    _, out, found = trained
    for name in ("lora-2", "lora-3"):
        assert found[name][1] == pytest.approx(found["whole"][1], rel=1e-4), name
        assert min(check_export(out[name] / "model", ["embedloom"]).values()) > 0.99999, name
    assert found["whole"][1][-1] != pytest.approx(found["whole"][1][0], rel=1e-3)


@pytest.mark.slow
def test_a_sharded_model_is_scored_whole_and_the_last_one_kept_where_asked(trained):
    root, out, found = trained
    seen = np.load(root / "sharded" / "seen" / "4.npy")
    assert lowest_cosine(vectors_of(out["sharded"] / "model"), seen) > 0.99999
    assert json.loads((out["sharded"] / "model" / DEV_FILE).read_text())["best_step"] == 2
    assert not any(".lora_" in name for name in found["sharded"][2])


def test_the_earliest_of_equally_good_states_is_the_best_and_the_start_never_is():
    points = [DevPoint(0, 0.9, {}), DevPoint(5, 0.4, {}), DevPoint(10, 0.4, {})]
    assert best_of(points) is points[1]
    assert best_of(points[:1]) is None
