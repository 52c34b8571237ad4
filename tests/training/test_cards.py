"""Cards say what was trained on what, from the manifests alone."""

import yaml

from embedloom.config.training import TrainingSource
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.storage import Place
from embedloom.training.cards import DATA_CARD, MODEL_CARD, Lineage, model_card, stage_facts, write_cards
from fakes_training import training_config

SOURCES = (
    TrainingSource(name="paq", format="embed_nemotron", path="data/PAQ", cap=40, license="cc-by-sa-3.0"),
    TrainingSource(name="own", format="mined", dataset="synthetic"),
)
PREPARED = {
    "paq": {"parts": [30, 20], "tokens": 12345, "rejects": {"no_positive": 2}},
    "own": {"parts": [7], "tokens": 99, "rejects": {}},
}
DEV = {
    "metric": "ndcg_at_10", "kept": "best", "best_step": 20,
    "points": [{"step": 0, "score": 0.25, "tasks": {"dev": 0.25}}, {"step": 10, "score": 0.5, "tasks": {"dev": 0.5}},
               {"step": 20, "score": 0.75, "tasks": {"dev": 0.75}}, {"step": 30, "score": 0.7, "tasks": {"dev": 0.7}}],
}  # fmt: skip


def facts(**changes):
    config = training_config(lora={"rank": 4, "alpha": 8}, loss="gecko")
    own = stage_facts(config, config.stages[0], config.candidates[0], SOURCES, PREPARED)
    return {**own, "steps": 30, "dev": None, **changes}


def test_the_cards_name_base_stages_sources_loss_steps_and_dev_score(tmp_path):
    write_cards(tmp_path, Lineage("org/base-1b", [facts(name="pretrain"), facts(name="finetune", dev=DEV)]))
    card = (tmp_path / MODEL_CARD).read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "org/base-1b" and header["library_name"] == "sentence-transformers"
    assert header["datasets"] == ["nvidia/embed-nemotron-dataset-v1"]
    pretrain, finetune = card.split("## Stage ")[1:]
    assert pretrain.startswith("pretrain") and "not measured" in pretrain
    for part in ("gecko", "30 of 2 queries, from 57 examples of 2 source(s)", "rank 4, alpha 8"):
        assert part in finetune
    assert "dev ndcg_at_10: 0.75000 at step 20, whose weights these are, 0.25000 before the stage" in finetune
    data = (tmp_path / DATA_CARD).read_text()
    paq, own = (next(line for line in data.splitlines() if line.startswith(f"| {n}")) for n in ("paq", "own"))
    for part in ("`data/PAQ`", "| 50 |", "| 40 rows |", "| 12,345 |", "no_positive 2", "cc-by-sa-3.0"):
        assert part in paq
    assert "mined (synthetic)" in own and "| all |" in own and "not stated" in own


def test_the_last_scores_are_those_of_the_last_weights_where_these_are_kept():
    card = model_card(Lineage("b", [facts(dev={**DEV, "kept": "last"})]))
    assert "0.70000 at step 30" in card


def test_a_later_stage_knows_the_stages_before_it(tmp_path):
    first = ArtefactWriter(Place(str(tmp_path / "encoder")), "model", "x", {}, "local")
    first.commit({}, {"base": "org/base-1b"})
    one = Lineage.after(tmp_path / "encoder", facts(name="pretrain"))
    second = ArtefactWriter(Place(str(tmp_path / "pretrain")), "model", "y", {}, "local")
    second.commit({}, {"base": one.base, "stages": one.stages})
    two = Lineage.after(tmp_path / "pretrain", facts(name="finetune"))
    assert two.base == "org/base-1b" and [stage["name"] for stage in two.stages] == ["pretrain", "finetune"]


def test_a_base_on_somebodys_disk_is_named_without_its_path(tmp_path):
    first = ArtefactWriter(Place(str(tmp_path / "encoder")), "model", "x", {}, "local")
    first.commit({}, {"base": "/home/somebody/models/my-llama"})
    assert Lineage.after(tmp_path / "encoder", facts()).base == "my-llama"
