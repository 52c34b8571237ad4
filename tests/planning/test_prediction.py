"""The plan: steps, FLOPs, hours, money, critical path and idle GPUs, against numbers worked out by hand."""

import shutil

import pytest
import yaml

from embedloom.pipeline.commands import load
from embedloom.pipeline.graph import graph
from embedloom.pipeline.plan import plan_table
from embedloom.planning.cost import Estimate, Plan, Workers, make_plan
from embedloom.planning.work import SEARCH_TYPE, Known, Work
from fakes_quickstart import CLUSTER, ROOT, quickstart

NEMOTRON = ROOT / "jobs" / "configs" / "nemotron_8b.yaml"
TEXT_FLOPS = 6 * 6_979_321_856 * 512 + 12 * 32 * 4096 * 512**2  # forward and backward of 512 tokens


@pytest.fixture(scope="module")
def nemotron():
    return load(NEMOTRON, "a100x64", CLUSTER, [])


def test_8b_plan_has_the_papers_steps_and_its_hours_beside_ours(nemotron):
    text = plan_table(nemotron)
    assert "pretrain (each of 6 candidates): 5,773 steps x 2,048 queries, 1 negatives, lr 1e-05" in text
    assert "finetune (each of 6 candidates): 33,668 steps x 128 queries, 4 negatives, lr 2e-06" in text
    assert "on 64 workers x 11 CPU + 1 GPU" in text
    assert (
        "published, and not what the plan is fitted to: 25.0 + 21.5 = 46.5 h on 64 a100-80gb, 2,976 GPU-hours"
        in text
    )


def seconds_of(one: Estimate) -> dict[str, float]:
    return {part.name: part.seconds for part in one.parts}


def test_a_training_stage_by_its_parts(nemotron):
    plan = make_plan(nemotron, graph(nemotron), nemotron.rates, Known())
    one, later = plan.estimates["training/run1/pretrain"], plan.estimates["training/run2/pretrain"]
    assert one.work.flops == pytest.approx(5_773 * 2_048 * 3 * TEXT_FLOPS)
    assert one.work.tokens == 5_773 * 2_048 * 3 * 512
    weights, ring = 7_504_924_672, 63 / 64
    # One micro-batch a step: 30 GB of gradients go round beside the backward, all but the last bucket of 5e8, then weights
    # of two bytes are gathered.
    step = (2 * ring * 5e8 * 4 + ring * weights * 2) / 40e9
    assert seconds_of(later) == pytest.approx(
        {
            "starting": 300,
            "computing": one.work.flops / (64 * 312e12 * 0.45),
            "communication": 5_773 * step,
            "checkpoints": 11 * weights * 14 / 5e9,  # 105 GB after every 500 steps
            "reading weights": 8 * weights * 2 / 5e9,  # by eight nodes
        }
    )
    assert later.seconds == pytest.approx(sum(seconds_of(later).values()))
    assert plan.cost("training/run2/pretrain") == pytest.approx(later.seconds / 3600 * 64 * 3.43)
    # Nodes without work are kept longer than preparation takes on 534 CPUs: 18.2 G tokens at 240,000 a second each, 142 s.
    assert seconds_of(one) == pytest.approx(seconds_of(later))


def test_nodes_are_bought_anew_after_a_preparation_that_is_longer_than_they_are_kept(tmp_path):
    content = yaml.safe_load(CLUSTER.read_text())
    del content["profiles"]["a100x64"]["pools"]["cpu"]  # 30 CPUs take 42 minutes
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
    shutil.copy(CLUSTER.with_name("rates.yaml"), tmp_path)
    run = load(NEMOTRON, "a100x64", tmp_path / "cluster.yaml", [])
    plan = make_plan(run, graph(run), run.rates, Known())
    one, later = plan.estimates["training/run1/pretrain"], plan.estimates["training/run2/pretrain"]
    assert seconds_of(one) == pytest.approx({**seconds_of(later), "buying nodes": 600})


def test_reductions_longer_than_the_backward_are_waited_for(nemotron):
    one = make_plan(nemotron, graph(nemotron), nemotron.rates, Known()).estimates["training/run2/finetune"]
    steps, weights, ring = one.work.steps.steps, 7_504_924_672, 63 / 64
    backward = (
        2 / 3 * one.work.flops / steps / (64 * 312e12 * 0.45)
    )  # 1.25 s of the 1.48 that 30 GB take to go round
    step = 2 * ring * weights * 4 / 40e9 - backward + ring * weights * 2 / 40e9
    assert seconds_of(one)["communication"] == pytest.approx(steps * step)


def test_several_micro_batches_reduce_once_and_are_waited_for(nemotron):
    run = load(NEMOTRON, "a100x64", CLUSTER, ["training.micro_batch_tokens=16384"])
    one = make_plan(run, graph(run), run.rates, Known()).estimates["training/run1/pretrain"]
    step = (2 * 63 / 64 * 7_504_924_672 * 4 + 63 / 64 * 7_504_924_672 * 2) / 40e9
    assert seconds_of(one)["communication"] == pytest.approx(5_773 * step)


def test_tokens_are_prepared_once_on_machines_without_gpus(nemotron):
    plan = make_plan(nemotron, graph(nemotron), nemotron.rates, Known())
    lines = {name: one for name, one in plan.estimates.items() if name.startswith("preparation/")}
    assert list(lines) == ["preparation/pretrain", "preparation/finetune"]
    one = lines["preparation/pretrain"]
    cores = sum(pool.cpus * pool.max_nodes for pool in nemotron.profile.pools.values() if not pool.gpus)
    assert one.seconds == pytest.approx(18_160_287_744 / (240_000 * cores))
    assert one.workers.gpus == 0
    assert all("preparation/finetune" in plan.inputs[f"training/run{n}/finetune"] for n in range(1, 7))
    assert set(plan.inputs["preparation/pretrain"]) == {"examples", "encoder"}  # the texts and the tokenizer


def test_search_is_counted_in_the_type_it_computes_in(nemotron):
    one = make_plan(nemotron, graph(nemotron), nemotron.rates, Known()).estimates["mining"]
    pairs, documents = 13_436_557, 7_500_000
    peak = {"float32": 19.5e12, "bfloat16": 312e12}[SEARCH_TYPE]
    searching = 2 * 2.0 * pairs * documents * 4096 / (64 * 0.5 * peak)
    assert seconds_of(one)[f"searching in {SEARCH_TYPE}"] == pytest.approx(searching)
    embedding = (one.work.flops - 2 * 2.0 * pairs * documents * 4096) / (64 * 312e12 * 0.45)
    assert seconds_of(one)["computing"] == pytest.approx(embedding)


def test_candidates_one_after_another_and_side_by_side(nemotron):
    plan = make_plan(nemotron, graph(nemotron), nemotron.rates, Known())
    own = {
        run: sum(plan.estimates[f"training/{run}/{stage}"].seconds for stage in ("pretrain", "finetune"))
        for run in (f"run{n}" for n in range(1, 7))
    }
    hours = sum(own.values()) / 3600
    lines = [line for line in plan_table(nemotron).splitlines() if line.startswith("6 candidates")]
    money = f"{hours * 64:,.0f} GPU-hours, {hours * 64 * 3.43:,.0f} USD"
    assert lines == [
        f"6 candidates one after another on 64 GPUs: {hours:,.1f} h, {money}",
        f"6 candidates side by side on 384 GPUs (a group of 64 each): {max(own.values()) / 3600:,.1f} h, {money}",
    ]


def test_every_figure_is_measured_published_or_assumed(nemotron):
    lines = plan_table(nemotron).splitlines()
    grounds = [
        line.split(":")[0]
        for line in lines
        if line.split(":")[0] in ("measured", "published", "assumed", "not known")
    ]
    assert grounds == sorted(grounds, key=["measured", "published", "assumed"].index)
    assert any(line.startswith("assumed: training: ") for line in lines)
    assert any(line.startswith("assumed: training (communication): ") for line in lines)
    assert any(line.startswith("measured: preparation: ") for line in lines)
    assert any(line.startswith("published: price: ") for line in lines)


def test_a_gpu_whose_kind_is_not_stated_is_no_cpu(tmp_path):
    clusters = yaml.safe_load(CLUSTER.read_text())
    del clusters["profiles"]["h100x1"]["accelerator"]
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(clusters))
    shutil.copy(CLUSTER.with_name("rates.yaml"), tmp_path)
    config = ROOT / "jobs" / "configs" / "quickstart.yaml"
    unsaid = load(config, "h100x1", tmp_path / "cluster.yaml", [])
    assert "the profile does not say which GPUs it has (accelerator)" in plan_table(unsaid)
    said = load(config, "h100x1", CLUSTER, [])
    assert make_plan(said, graph(said), said.rates, Known()).estimates["vectors"].device == "h100-80gb"


def test_an_unknown_model_is_not_priced_and_said_so(nemotron):
    run = load(NEMOTRON, "a100x64", CLUSTER, ["encoder.base=somebody/new-8b"])
    text = plan_table(run)
    assert "not predicted, and in no sum: training/run1/pretrain" in text
    assert "the shape of somebody/new-8b is not in the rates file" in text


def test_a_corpus_of_unknown_size_is_a_lower_bound(tmp_path):
    text = plan_table(quickstart(tmp_path))
    line = next(line for line in text.splitlines() if line.startswith("vectors  ") and "≥" in line)
    assert "≥ 80" in line
    assert "one stage after another: at least" in text
    assert "sizes: at least those that the synthesis reads" in text


def test_without_a_rates_file_the_plan_says_so(tmp_path):
    copy = tmp_path / "cluster.yaml"
    copy.write_text(CLUSTER.read_text())
    run = load(NEMOTRON, "a100x64", copy, [])
    assert "no rates.yaml beside the cluster config" in plan_table(run)


def _made_up() -> Plan:
    """a (1 h, 8 GPUs) -> b (2 h, no GPU); a -> c (5 h, 4 GPUs); d (unknown)."""

    def one(name, hours, gpus):
        return Estimate(
            Work(name, "embed"), Workers("w", gpus, 2.0), "g", None if hours is None else hours * 3600
        )

    estimates = {"a": one("a", 1, 8), "b": one("b", 2, 0), "c": one("c", 5, 4), "d": one("d", None, 8)}
    return Plan(estimates, {"a": (), "b": ("a",), "c": ("a",), "d": ("b",)}, {"g": 2.0}, "USD", 8, {})


def test_sums_critical_path_and_idle_gpus():
    plan = _made_up()
    assert plan.seconds == 8 * 3600
    assert plan.critical_path() == (["a", "c"], 6 * 3600)
    assert plan.gpu_hours == 1 * 8 + 5 * 4
    assert plan.idle_gpu_hours() == {"b": 16.0, "c": 20.0}
    assert plan.held_gpu_hours == plan.gpu_hours + sum(plan.idle_gpu_hours().values())
    assert plan.total_cost == 2.0 * (8 + 2 * 2 + 20)  # b's two cores are priced as devices too
    assert plan.unknown == ["d"]


def test_data_stages_of_100_million_documents_by_hand():
    """Cores of eight nodes share the corpus; one task gathers the pairs before 64 GPUs mine them."""
    limit = "corpus.sources.0.limit=100000000"
    runs = [
        load(NEMOTRON, "a100x64", CLUSTER, [limit, f"corpus.chunk_tokens={tokens}"])
        for tokens in (512, "null")
    ]
    cut, whole = (make_plan(run, graph(run), run.rates, Known()) for run in runs)
    cores = cut.estimates["corpus"].workers.cores
    assert cores > 100 and cut.estimates["corpus"].workers.gpus == 0
    assert cut.estimates["corpus"].seconds == pytest.approx(1e8 / 1110 / cores)
    assert whole.estimates["corpus"].seconds == pytest.approx(1e8 / 4250 / cores)
    mining = cut.estimates["mining"]
    (gathering,) = (part for part in mining.parts if part.name == "gathering pairs")
    assert gathering.seconds == pytest.approx(mining.work.rows / 35_000)
