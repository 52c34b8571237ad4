"""What does not fit is refused with what would: GPUs of every stage, and the machine that reads the corpus."""

from dataclasses import replace

import pytest

from embedloom.config.cluster import TrainingGroup
from embedloom.errors import ConfigError
from embedloom.pipeline.commands import execute, load
from embedloom.pipeline.graph import graph
from embedloom.pipeline.plan import plan_table
from embedloom.planning.memory import (
    fits,
    memory_problems,
    shape_of,
    step_tokens,
    trainer_of,
)
from embedloom.planning.training_time import checkpoint_bytes, preparation_cores, step_communication
from embedloom.planning.work import Known
from fakes_quickstart import CLUSTER, ROOT, quickstart

NEMOTRON = ROOT / "jobs" / "configs" / "nemotron_8b.yaml"
# One candidate on pairs that stand in the corpus: the generators of the mix want nodes of eight GPUs.
ALONE = ["synthesis=null", "training.mix={public: 1.0}", "training.runs=[{name: one, seed: 1}]",
         "corpus.sources.0.query_column=q", "corpus.sources.0.limit=1000000"]  # fmt: skip


def problems(run):
    nodes = graph(run)
    return [str(problem) for problem in memory_problems(run, nodes, Known(), list(nodes))]


def held(run, stage):
    nodes = graph(run)
    return [one for one in fits(run, nodes, run.rates, Known(), list(nodes)) if one.stage == stage]


@pytest.fixture(scope="module")
def nemotron():
    return load(NEMOTRON, "a100x64", CLUSTER, [])


def test_the_paper_run_fits_the_64_gpus_in_every_stage(nemotron):
    assert problems(nemotron) == []
    nodes = graph(nemotron)
    found = fits(nemotron, nodes, nemotron.rates, Known(), list(nodes))
    assert {one.stage for one in found} == {
        "synthesis", "mining", "mining (search)", "training (pretrain)", "training (finetune)", "evaluation", "embedding",
        "serving",
    }  # fmt: skip
    assert all(one.memory is not None and one.fits for one in found)
    (pretrain,) = held(nemotron, "training (pretrain)")
    # 15.0 + 1.4 + 0.5 + 1.05 + 4 + 1 + 3 without a token, 0.62464 MB for each of 49,152.
    assert pretrain.memory.total / 1e9 == pytest.approx(25.93 + 30.70, abs=0.05)
    table = plan_table(nemotron)
    assert "cannot be built:" not in table
    assert (
        "training (pretrain)  meta-llama/Llama-3.1-8B, ZeRO-2 on 64 GPUs, 32 of 32 layers computed again, 49,152 tokens"
        in table
    )


def test_a_step_of_the_paper_by_workers_and_groups(nemotron):
    shape = shape_of(nemotron.rates.models["meta-llama/Llama-3.1-8B"])
    pretrain, finetune = nemotron.config.training.stages
    first, second = (step_tokens(nemotron, stage, shape, 85e9) for stage in (pretrain, finetune))
    assert (first.group, first.rank, first.micro_batch, first.passes) == (1_536, 49_152, 49_152, 1)
    assert (second.group, second.rank, second.micro_batch, second.passes) == (3_072, 6_144, 6_144, 1)
    small = load(NEMOTRON, "a100x64", CLUSTER, ["training.micro_batch_tokens=1024"])
    alone = step_tokens(small, pretrain, shape, 85e9)
    assert (alone.micro_batch, alone.passes) == (1_536, 32)  # a group is never cut
    # On a GPU of 64 GB a share of 56.6 GB has to be cut, and two passes keep whole gradients: 55.5 GB without a token.
    narrow = step_tokens(nemotron, pretrain, shape, 62e9)
    assert narrow.passes > 1


def test_an_8b_model_on_one_80_gb_gpu_is_refused_with_what_fits():
    run = load(NEMOTRON, "h100x1", CLUSTER, ALONE)
    refused = problems(run)
    assert len(refused) == 2
    # 18 bytes for each of 7.505 billion weights are 135 GB. On four GPUs a step of several micro-batches would still keep
    # 30 GB of gradients under ZeRO-2, and under ZeRO-3 it does not.
    assert "training (pretrain): meta-llama/Llama-3.1-8B, ZeRO-2 on 1 GPU" in refused[0]
    assert "training.zero_stage: 3" in refused[0]
    assert "weights 15.0, optimizer 90.1, gradients 30.0" in refused[0]
    assert "4 GPUs (stages.training.workers, of which this profile has 1)" in refused[0]
    table = plan_table(run)
    assert all(f"cannot be built: {message}" in table for message in refused)


def test_a_run_that_cannot_fit_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr("embedloom.pipeline.commands.preflight", lambda *_: None)
    run = load(NEMOTRON, "h100x1", CLUSTER, [*ALONE, f"run.output_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"training \(pretrain\): .* takes 14[0-9] GB of a GPU"):
        execute(run, None, dry_run=False)
    assert not list(tmp_path.iterdir())


def test_adapters_on_one_gpu_fit():
    run = load(NEMOTRON, "h100x1", CLUSTER, [*ALONE, "training.lora={rank: 16}"])
    assert problems(run) == []


def test_recomputation_is_proposed_where_it_is_enough():
    wide = ["training.gradient_checkpointing=false", "training.micro_batch_tokens=49152"]
    (message,) = problems(load(NEMOTRON, "a100x64", CLUSTER, wide))
    assert message.startswith(
        "training (pretrain): meta-llama/Llama-3.1-8B, ZeRO-2 on 64 GPUs, 0 of 32 layers computed again"
    )
    # 7.2 MB a token leave 2,933 tokens beside 55.5 GB, fewer than a reduction is worth; 0.62 MB leave 33,636.
    assert "training.gradient_checkpointing: true, training.micro_batch_tokens: 32768" in message
    assert "GPUs (stages" not in message


def test_a_generator_that_is_too_large_says_over_how_many_gpus_it_fits():
    generators = (
        "synthesis.generators=[{model: mistralai/Mixtral-8x22B-Instruct-v0.1, pool: {max_actors: 1, cpus: 2, gpus: 2, "
        "tensor_parallel: 2}}]"
    )
    run = load(NEMOTRON, "a100x64", CLUSTER, [generators, "synthesis.tasks.cross_model=0.0"])
    (message,) = problems(run)
    assert "synthesis: mistralai/Mixtral-8x22B-Instruct-v0.1 over 2 GPUs takes 148 GB" in message
    assert "tensor_parallel and gpus of 8 or more" in message  # 282 / 4 + 7.25 are 77.8 of 76.5


def test_replicas_that_share_a_gpu_are_summed_in_the_type_they_compute_in():
    (half,) = held(load(NEMOTRON, "h100x1", CLUSTER, ALONE), "serving")
    assert "in bfloat16 x 2 on a GPU" in half.what
    assert half.memory.fixed["weights"] == 2 * 2 * 7_504_924_672
    (exact,) = held(load(NEMOTRON, "h100x1", CLUSTER, [*ALONE, "serving.compute_dtype=float32"]), "serving")
    assert exact.memory.fixed["weights"] == 2 * half.memory.fixed["weights"]


def test_a_model_of_unknown_size_is_not_checked_and_said_so():
    run = load(NEMOTRON, "a100x64", CLUSTER, ["encoder.base=somebody/new-8b"])
    assert problems(run) == []
    assert (
        "memory: somebody/new-8b: its size is not in the rates file, so its memory is not checked"
        in plan_table(run)
    )


@pytest.mark.parametrize("limit", ["null", "3000000000"])
def test_a_corpus_of_any_size_is_built_in_blocks_of_a_fixed_one(limit):
    """Three billion documents, or nobody knows how many, on a head of 118 GiB."""
    assert problems(load(NEMOTRON, "a100x64", CLUSTER, [f"corpus.sources.0.limit={limit}"])) == []


def test_the_group_and_the_stage_decide_how_it_trains(nemotron):
    config, shape = nemotron.config.training, shape_of(nemotron.rates.models["meta-llama/Llama-3.1-8B"])
    pretrain, finetune = config.stages

    def made(stage=pretrain, dtype="auto", section=config, **group):
        return trainer_of(section, stage, TrainingGroup(gpus=1, **group), dtype, shape)

    assert made().weight_dtype == "bfloat16"
    assert made(dtype="float32").weight_dtype == "float32"
    assert made(bf16_weights=False).weight_dtype == "float32"
    assert (made().recomputed_layers, made(finetune).recomputed_layers) == (32, 16)
    assert made().reduces_once and not made(gradient_reduction="micro_batch").reduces_once
    frozen = config.model_copy(update={"freeze_token_embeddings": True})
    assert made(section=frozen).trained_weights == 7_504_924_672 - 525_336_576


def by_hand(nemotron, **changes):
    group = TrainingGroup(workers=64, gpus=1, gradient_dtype="bfloat16")
    shape = shape_of(nemotron.rates.models["meta-llama/Llama-3.1-8B"])
    trainer = trainer_of(nemotron.config.training, nemotron.config.training.stages[0], group, "auto", shape)
    return shape, replace(trainer, **changes)


def test_communication_of_an_8b_step_by_hand(nemotron):
    # 15 GB of gradients go round in 0.74 s at 40 GB/s, 15 GB of weights are gathered in 0.37.
    shape, trainer = by_hand(nemotron, overlaps=False, reduces_once=False)
    assert step_communication(shape, trainer, 4, 40e9, 0.0) == pytest.approx(4 * 0.739 + 0.369, abs=0.01)
    shape, once = by_hand(nemotron, reduces_once=True)
    assert step_communication(shape, once, 4, 40e9, 10.0) == pytest.approx(0.739 + 0.369, abs=0.01)
    assert checkpoint_bytes(shape, trainer) / 1e9 == pytest.approx(105, abs=0.1)


def test_reductions_hide_behind_the_backward_but_for_the_last_bucket(nemotron):
    shape, beside = by_hand(nemotron, overlaps=True, reduces_once=False)
    gathered = 63 / 64 * 7_504_924_672 * 2 / 40e9
    reduced, last = 2 * gathered, 2 * 63 / 64 * 5e8 * 2 / 40e9
    assert step_communication(shape, beside, 1, 40e9, 10.0) == pytest.approx(gathered + last)
    assert step_communication(shape, beside, 1, 40e9, 0.2) == pytest.approx(gathered + reduced - 0.2)


def test_cores_that_prepare_are_those_of_machines_without_gpus(nemotron, tmp_path):
    plain = [pool for pool in nemotron.profile.pools.values() if not pool.gpus]
    assert preparation_cores(nemotron.profile) == sum(pool.cpus * pool.max_nodes for pool in plain) >= 30
    assert preparation_cores(quickstart(tmp_path).profile) == 8
