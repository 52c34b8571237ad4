"""The real step (encoder, DeepSpeed, plan, losses) on one and on two gloo processes, without Ray."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from embedloom.config.cluster import TrainingGroup
from embedloom.config.training import TrainingConfig, TrainingSource, TrainingStage
from embedloom.core.storage import Place
from embedloom.encoder.parity import embed_golden, lowest_cosine
from embedloom.errors import ConfigError
from embedloom.training.checkpoints import save_checkpoint
from embedloom.training.data import prepare_sources
from embedloom.training.loop import LoopConfig, StageTrainer
from embedloom.training.model import deepspeed_settings
from fakes import make_tiny_encoder, make_tiny_llama
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
            "pos_scores": [0.9],
            "neg_scores": [0.3 + n / 100, 0.1],
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
    distilled = make_config(tmp_path, tiny_model, distillation={"temperature": 0.2})
    one = run_group(
        {
            "gemini": Task(config),
            "infonce": Task(changed(config, loss="infonce")),
            "distilled": Task(distilled),
        },
        1,
    )
    # About 100 tokens a group: two or three groups a micro-batch, two or more micro-batches a worker.
    cut = {"micro_batch_tokens": 300}
    two = run_group(
        {
            "ZeRO-1": Task(changed(config, zero_stage=1, **cut)),
            "ZeRO-3": Task(changed(config, zero_stage=3, **cut)),
            "one micro-batch": Task(changed(config, zero_stage=2)),
            "infonce, ZeRO-3": Task(changed(config, loss="infonce", zero_stage=3, **cut)),
            "distilled, ZeRO-2": Task(changed(distilled, zero_stage=2, **cut)),
        },
        2,
    )
    for name, (losses, norms, weights, golden) in two.items():
        expected = one[next((of for of in ("infonce", "distilled") if of in name), "gemini")]
        assert losses == pytest.approx(expected[0], rel=1e-5), name
        assert norms == pytest.approx(expected[1], rel=1e-4), name
        np.testing.assert_allclose(weights, expected[2], rtol=1e-4, atol=2e-5, err_msg=name)
        assert lowest_cosine(golden, expected[3]) > 0.99999, name
    assert one["gemini"][0][-1] < one["gemini"][0][0]
    assert one["infonce"][0] != pytest.approx(one["gemini"][0], rel=1e-2)
    assert one["distilled"][0] != pytest.approx(one["gemini"][0], rel=1e-2)


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
        deepspeed_settings(config, TrainingGroup(), bf16_weights=True)
    assert "data_types" not in deepspeed_settings(config, TrainingGroup(), bf16_weights=False)


def test_zero_3_cannot_sum_bfloat16_gradients_of_a_step_in_float32(tiny_model, tmp_path):
    config = make_config(tmp_path, tiny_model, zero_stage=3).training
    group = TrainingGroup(gradient_reduction="step")
    with pytest.raises(
        ConfigError, match=r"gradient_reduction: step .* allowed: micro_batch, or gradient_dtype"
    ):
        deepspeed_settings(config, group, bf16_weights=True)
    deepspeed_settings(config, group, bf16_weights=False)
    deepspeed_settings(config, TrainingGroup(), bf16_weights=True)


def count_reductions(task, rank, world_size):
    """Elements that each of two steps reduces over the workers, micro-batches of each, the trained weights, and losses."""
    from deepspeed.comm.torch import TorchBackend

    trainer = StageTrainer(task.config, rank, world_size)
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.encoder.backbone.parameters())
    counts, passes, losses = [], [], []
    run = trainer.gradients.run

    def counted_run(micro_batches, *others):
        passes.append(len(micro_batches))
        return run(micro_batches, *others)

    trainer.gradients.run = counted_run
    with pytest.MonkeyPatch.context() as patched:
        # DeepSpeed's own reduce_scatter has taken torch's function when it was imported.
        for place, names in (
            (torch.distributed, ("all_reduce", "reduce", "reduce_scatter")), (TorchBackend, ("reduce_scatter_tensor",))
        ):  # fmt: skip
            for name in names:
                patched.setattr(place, name, counting(getattr(place, name), counts))
        for _ in range(2):
            counts.append(0)
            losses.append(trainer.train_step()[0].loss)
    return counts, passes, weights, losses


def counting(collective, counts):
    """The collective, which adds the elements that it reduces to the last of the counts."""

    def counted(*arguments, **named):
        tensors = [*arguments, *named.values()]
        sizes = [t.numel() if torch.is_tensor(t) else 0 for t in tensors]
        parts = [sum(t.numel() for t in ts) for ts in tensors if isinstance(ts, list)]
        counts[-1] += max([*sizes, *parts])
        return collective(*arguments, **named)

    return counted


@pytest.mark.slow
def test_a_step_of_several_micro_batches_reduces_its_gradient_once(tiny_model, tmp_path):
    """Counted in elements of all reducing collectives of two gloo workers: about the number of weights, and as many times
    that as there are micro-batches where the profile asks for a reduction after each."""
    config = changed(make_config(tmp_path, tiny_model, loss="infonce"), micro_batch_tokens=150)
    by_step, by_pass = (
        TrainingGroup(gradient_reduction="step"),
        TrainingGroup(gradient_reduction="micro_batch"),
    )
    bf16 = replace(config, dtype="bfloat16")
    tasks = {
        "1": Task(changed(config, zero_stage=1)),
        "2": Task(changed(config, zero_stage=2)),
        "3": Task(changed(replace(config, group=by_step), zero_stage=3)),
        "2, often": Task(changed(replace(config, group=by_pass), zero_stage=2)),
        "2, bfloat16": Task(changed(replace(bf16, group=TrainingGroup(bf16_weights=True)), zero_stage=2)),
        "2, bfloat16, often": Task(
            changed(
                replace(bf16, group=TrainingGroup(bf16_weights=True, gradient_reduction="micro_batch")),
                zero_stage=2,
            )
        ),
    }
    found = run_processes(count_reductions, tasks, 2)
    for name, (counts, passes, weights, losses) in found.items():
        assert min(passes) >= 3, name
        expected = passes if "often" in name else [1, 1]
        for count, times in zip(counts, expected, strict=True):
            # Beside gradients there are norms and the losses of the batch, some dozens of numbers.
            assert times * weights <= count < times * weights * 1.02, name
        half = "bfloat16" in name
        before = found["2, bfloat16, often" if half else "2, often"][3]
        # A cosine of bfloat16 is 0.004 off, and the loss has ten times it.
        expected = pytest.approx(before, abs=0.01) if half else pytest.approx(before, rel=1e-5)
        assert losses == expected, name


@pytest.mark.slow
def test_bfloat16_weights_train_as_on_a_gpu_whatever_the_zero_stage(tiny_model, tmp_path):
    """The branch that a GPU takes (bfloat16 weights, float32 sums and optimizer copy) on gloo: near the float32 run of
    one worker, alike over ZeRO stages with several micro-batches on two workers, and resumable by one or two workers."""
    config = make_config(tmp_path, tiny_model)
    exact = run_group({"one": Task(config)}, 1)["one"]
    cut = changed(
        replace(config, dtype="bfloat16", group=TrainingGroup(bf16_weights=True)), micro_batch_tokens=300
    )
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
        assert norms == pytest.approx(exact[1], rel=0.1), stage
        assert losses == pytest.approx(two["1"][0], rel=0.01), stage
        assert lowest_cosine(golden, exact[3]) > 0.99, stage
        assert two[f"{stage} begun"][0] == losses[:2], stage
    again, alone = run_group(later, 2), run_group(later, 1)
    for stage in (1, 2, 3):
        losses, _, weights, _ = two[f"{stage}"]
        assert again[f"{stage}"][0] == losses[2:], stage
        np.testing.assert_array_equal(again[f"{stage}"][2], weights, err_msg=str(stage))
        assert alone[f"{stage}"][0] == pytest.approx(losses[2:], rel=0.01), stage


@pytest.mark.slow
def test_a_run_goes_on_with_another_micro_batch_recomputation_and_zero_stage(tiny_model, tmp_path):
    """From the checkpoint of two workers to the same last step, whatever fits the memory: equal but for rounding."""
    config = make_config(tmp_path, tiny_model)
    first, later = {}, {}
    for before, now in ((1, 2), (2, 3), (3, 1), (2, 2)):
        folder = tmp_path / f"{before}-{now}"
        folder.mkdir()
        first[folder.name] = Task(changed(config, zero_stage=before), steps=2, save=folder)
        other = changed(config, zero_stage=now, micro_batch_tokens=300, gradient_checkpointing=2)
        later[folder.name] = Task(other, steps=1, start=folder)
    before = run_group({"whole": Task(changed(config, zero_stage=1)), **first}, 2)
    losses, norms, weights, _ = before["whole"]
    after = run_group(later, 2)
    alone = run_group({"3-1": later["3-1"], "2-3": later["2-3"]}, 1)
    for name, found in [*after.items(), *alone.items()]:
        assert before[name][0] == pytest.approx(losses[:2], rel=1e-5), name
        assert found[0] == pytest.approx(losses[2:], rel=1e-5), name
        assert found[1] == pytest.approx(norms[2:], rel=1e-4), name
        np.testing.assert_allclose(found[2], weights, rtol=1e-4, atol=5e-4, err_msg=name)
        assert np.abs(found[2] - weights).mean() < 2e-6, name


@pytest.mark.slow
def test_bfloat16_weights_go_on_with_another_zero_stage(tiny_model, tmp_path):
    config = replace(
        make_config(tmp_path, tiny_model), dtype="bfloat16", group=TrainingGroup(bf16_weights=True)
    )
    first, later = {}, {}
    for before, now in ((1, 2), (2, 1), (1, 3), (3, 2)):
        folder = tmp_path / f"{before}-{now}"
        folder.mkdir()
        first[folder.name] = Task(changed(config, zero_stage=before), steps=2, save=folder)
        later[folder.name] = Task(changed(config, zero_stage=now), steps=1, start=folder)
    whole = run_group({"whole": Task(changed(config, zero_stage=2)), **first}, 2)["whole"]
    after = run_group(later, 2)
    for name, (losses, _, weights, _) in after.items():
        assert losses == pytest.approx(whole[0][2:], rel=0.01), name
        assert np.abs(weights - whole[2]).mean() < 1e-3, name


@pytest.mark.slow
def test_recomputing_every_nth_layer_leaves_losses_and_gradients_as_they_are(tmp_path):
    llama = make_tiny_llama(tmp_path / "llama", layers=4)
    model = make_tiny_encoder(llama, tmp_path / "model")
    config = make_config(tmp_path, model)
    own = config.stage.model_copy(update={"gradient_checkpointing": 3})
    tasks = {
        "kept": Task(config),
        "all": Task(changed(config, gradient_checkpointing=True)),
        "every second": Task(changed(config, gradient_checkpointing=2)),
        "of the stage": Task(replace(config, stage=own)),
    }
    found = run_processes(recomputed, tasks, 1)
    assert {name: values[0] for name, values in found.items()} == {
        "kept": [], "all": [0, 1, 2, 3], "every second": [0, 2], "of the stage": [0, 3]
    }  # fmt: skip
    for name, (_, losses, norms, weights) in found.items():
        assert losses == pytest.approx(found["kept"][1], rel=1e-6), name
        assert norms == pytest.approx(found["kept"][2], rel=1e-5), name
        np.testing.assert_allclose(weights, found["kept"][3], rtol=1e-5, atol=1e-6, err_msg=name)


def recomputed(task, rank, world_size):
    """Layers that run twice in a training step, and what ``train`` gives."""
    runs = {}

    def count(name):
        def hook(*_):
            runs[name] = runs.get(name, 0) + 1

        return hook

    trainer = StageTrainer(task.config, rank, world_size)
    backbone = trainer.encoder.backbone
    backbone.get_input_embeddings().register_forward_hook(count("passes"))
    for number, layer in enumerate(backbone.layers):
        # Before and not after a forward: the second one ends where nothing more is needed of it.
        layer.mlp.register_forward_pre_hook(count(number))
    records = [trainer.train_step()[0] for _ in range(STEPS)]
    passes = runs.pop("passes")
    assert set(runs.values()) <= {passes, 2 * passes}
    twice = [number for number, times in sorted(runs.items()) if times > passes]
    flat = torch.cat([weight.detach().float().flatten() for weight in backbone.parameters()])
    return twice, [r.loss for r in records], [r.grad_norm for r in records], flat.numpy().copy()
