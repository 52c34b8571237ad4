"""The real step (encoder, DeepSpeed, plan, losses) on one and on two gloo processes, without Ray."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from embedloom.config.training import TrainingConfig, TrainingSource, TrainingStage
from embedloom.core.storage import Place
from embedloom.encoder.parity import embed_golden, lowest_cosine
from embedloom.errors import ConfigError
from embedloom.training.checkpoints import save_checkpoint
from embedloom.training.data import prepare_sources
from embedloom.training.loop import LoopConfig, StageTrainer
from embedloom.training.model import deepspeed_settings
from fakes_group import run_processes

STEPS = 3
COLOURS = ["red", "green", "blue", "grey", "pink", "gold"]


def make_config(root, model, **changes):
    rows = [
        {
            "id": f"r{n}",
            "query": f"{COLOURS[n % 6]} " * (1 + n % 3),
            "pos": [f"the colour {COLOURS[n % 6]} is {n}"],
            "neg": [f"only {COLOURS[(n + k) % 6]} {'word ' * (n % 7)}" for k in (1, 2)],
        }
        for n in range(40)
    ]
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The tiny model reads 64 bytes: after a longer instruction all queries would be cut to the same text.
    source = TrainingSource(name="colours", format="flagembedding", path=str(path), instruction="Find")
    stage = TrainingStage(
        name="s", negatives=2, global_batch=7, learning_rate=5e-3, max_steps=STEPS, warmup_steps=1,
        sources=(source,),
    )  # fmt: skip
    settings = {"loss": "gemini", "temperature": 0.1, "zero_stage": 0, "micro_batch_tokens": 100_000}
    training = TrainingConfig(
        candidates=[{"name": "a", "seed": 0}], stages=[stage], **{**settings, **changes}
    )
    data = Place(str(root / "data"))
    prepared = prepare_sources("t", training, 2, (source,), None, model, data)
    folders = {name: index["folder"] for name, index in prepared.items()}
    return LoopConfig(
        "t", training, stage, (source,), 5, 1.0, "float32", model, data, folders, Place(str(root)), 1
    )


def changed(config, **changes):
    return replace(config, training=config.training.model_copy(update=changes))


@dataclass(frozen=True)
class Task:
    """What a group of workers does: some steps from a checkpoint or from the start, and perhaps a checkpoint."""

    config: LoopConfig
    steps: int = STEPS
    start: Path | None = None
    save: Path | None = None


def train(task, rank, world_size):
    """Losses, gradient norms, all weights and the golden vectors after the steps."""
    import deepspeed

    trainer = StageTrainer(task.config, rank, world_size)
    if task.start is not None:
        trainer.resume(task.start)
    records = [trainer.train_step()[0] for _ in range(task.steps)]
    if task.save is not None:
        save_checkpoint(trainer.engine, task.save, trainer._state(), records if rank == 0 else None)
    golden = embed_golden(trainer.encoder)[1]
    weights = list(trainer.encoder.backbone.parameters())
    with deepspeed.zero.GatheredParameters(weights, enabled=task.config.training.zero_stage == 3):
        flat = torch.cat([weight.detach().float().flatten() for weight in weights]).numpy().copy()
    return [r.loss for r in records], [r.grad_norm for r in records], flat, golden


def run_group(tasks, world_size):
    return run_processes(train, tasks, world_size)


@pytest.mark.slow
def test_two_workers_with_cached_gradients_train_as_one_with_the_whole_batch(tiny_model, tmp_path):
    config = make_config(tmp_path, tiny_model)
    one = run_group({"gemini": Task(config), "infonce": Task(changed(config, loss="infonce"))}, 1)
    # About 100 tokens a group: two or three groups a micro-batch, two or more micro-batches a worker.
    cut = {"micro_batch_tokens": 300}
    two = run_group(
        {
            "ZeRO-1": Task(changed(config, zero_stage=1, **cut)),
            "ZeRO-3": Task(changed(config, zero_stage=3, **cut)),
            "one micro-batch": Task(changed(config, zero_stage=2)),
            "infonce, ZeRO-3": Task(changed(config, loss="infonce", zero_stage=3, **cut)),
        },
        2,
    )
    for name, (losses, norms, weights, golden) in two.items():
        expected = one["infonce" if "infonce" in name else "gemini"]
        assert losses == pytest.approx(expected[0], rel=1e-5), name
        assert norms == pytest.approx(expected[1], rel=1e-4), name
        np.testing.assert_allclose(weights, expected[2], rtol=1e-4, atol=2e-5, err_msg=name)
        assert lowest_cosine(golden, expected[3]) > 0.99999, name
    assert one["gemini"][0][-1] < one["gemini"][0][0]
    assert one["infonce"][0] != pytest.approx(one["gemini"][0], rel=1e-2)


@pytest.mark.slow
def test_another_number_of_workers_goes_on_from_a_checkpoint(tiny_model, tmp_path):
    config = make_config(tmp_path, tiny_model)
    first, later, whole = {}, {}, {}
    for stage in (1, 2, 3):
        folder = tmp_path / f"zero-{stage}"
        folder.mkdir()
        own = changed(config, zero_stage=stage)
        whole[f"{stage}"] = Task(own)
        first[f"{stage}"] = Task(own, steps=2, save=folder)
        later[f"{stage}"] = Task(own, steps=1, start=folder)
    before = run_group({**{f"whole {k}": v for k, v in whole.items()}, **first}, 2)
    after = run_group(later, 1)
    for stage in later:
        losses, norms, weights, _ = before[f"whole {stage}"]
        assert before[stage][0] == losses[:2]
        assert after[stage][0] == pytest.approx(losses[2:], rel=1e-5), stage
        assert after[stage][1] == pytest.approx(norms[2:], rel=1e-4), stage
        # Adam divides a gradient by its own size: where it is all but zero, rounding decides a part of a step (5e-3).
        np.testing.assert_allclose(after[stage][2], weights, rtol=1e-4, atol=5e-4, err_msg=stage)
        assert np.abs(after[stage][2] - weights).mean() < 2e-6, stage


def test_bfloat16_weights_need_zero(tiny_model, tmp_path):
    config = make_config(tmp_path, tiny_model, zero_stage=0).training
    with pytest.raises(
        ConfigError, match=r"training\.zero_stage: 0.*allowed: 1, 2, 3, or .*bf16_weights: false"
    ):
        deepspeed_settings(config, bf16_weights=True)
    assert "data_types" not in deepspeed_settings(config, bf16_weights=False)


@pytest.mark.slow
def test_bfloat16_weights_train_as_on_a_gpu_whatever_the_zero_stage(tiny_model, tmp_path):
    """The branch that a GPU takes (bfloat16 weights, float32 sums and optimizer copy) on gloo: near the float32 run of
    one worker, alike over ZeRO stages with several micro-batches on two workers, and resumable by one or two workers."""
    config = make_config(tmp_path, tiny_model)
    exact = run_group({"one": Task(config)}, 1)["one"]
    cut = changed(replace(config, dtype="bfloat16", bf16_weights=True), micro_batch_tokens=300)
    tasks, later = {}, {}
    for stage in (1, 2, 3):
        own = changed(cut, zero_stage=stage)
        folder = tmp_path / f"bf16-zero-{stage}"
        folder.mkdir()
        tasks[f"{stage}"] = Task(own)
        tasks[f"{stage} begun"] = Task(own, steps=2, save=folder)
        later[f"{stage}"] = Task(own, steps=1, start=folder)
    two = run_group(tasks, 2)
    for stage in (1, 2, 3):
        losses, norms, weights, golden = two[f"{stage}"]
        assert losses == pytest.approx(exact[0], rel=0.03), stage
        # DeepSpeed 0.19.8 reports the first norm of its ZeRO-1 bfloat16 optimizer a fifth too high with several
        # micro-batches, and that one only; Adam's first step has the same size whatever it is.
        first = 1 if stage == 1 else 0
        assert norms[first:] == pytest.approx(exact[1][first:], rel=0.1), stage
        assert losses == pytest.approx(two["1"][0], rel=0.01), stage
        assert lowest_cosine(golden, exact[3]) > 0.99, stage
        assert two[f"{stage} begun"][0] == losses[:2], stage
    again, alone = run_group(later, 2), run_group(later, 1)
    for stage in (1, 2, 3):
        losses, _, weights, _ = two[f"{stage}"]
        assert again[f"{stage}"][0] == losses[2:], stage
        np.testing.assert_array_equal(again[f"{stage}"][2], weights, err_msg=str(stage))
        assert alone[f"{stage}"][0] == pytest.approx(losses[2:], rel=0.01), stage
