"""Distillation: the losses against sentence-transformers' own, and scores from every source to the row they belong to."""

import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from embedloom.config.training import TrainingSource
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.training.data import ExampleStore, preparation_counts, prepare_sources
from embedloom.training.losses import Objective, TeacherScores, VectorGroups, kl_divergence, margin_mse
from fakes_training import training_config

NONE = math.nan
LN2 = math.log(2)


def vectors(rows=6, negatives=3, seed=0):
    """Unit vectors of queries [rows, 8] and documents [rows, 1 + negatives, 8], and a teacher's cosines."""
    rng = np.random.default_rng(seed)

    def unit(*shape):
        drawn = rng.normal(size=shape)
        return torch.tensor(drawn / np.linalg.norm(drawn, axis=-1, keepdims=True))

    scores = torch.tensor(rng.uniform(0.2, 0.9, size=(rows, 1 + negatives)))
    return unit(rows, 8), unit(rows, 1 + negatives, 8), scores


def groups_of(queries, documents, teacher):
    keys = torch.arange(documents.shape[0] * documents.shape[1]).view(documents.shape[:2])
    return VectorGroups(queries, documents, torch.arange(len(queries)), 100 + keys, None, teacher)


def distilled(queries, documents, scores, **section):
    """What the objective of a config says of these vectors beyond the contrastive loss, whose factor is 0."""
    config = training_config(distillation={"contrastive_weight": 0, **section})
    own = config.distillation.of_source("any", config.temperature)
    rows = len(queries)
    teacher = TeacherScores(
        scores / own.teacher_temperature,
        torch.full((rows,), own.temperature, dtype=torch.float64),
        torch.full((rows,), own.weight, dtype=torch.float64),
    )
    groups = groups_of(queries, documents, teacher)
    return Objective.of(config, 8, normalize=True)(groups, groups, 0)


@pytest.mark.parametrize("temperatures", [(0.02, 0.02), (0.05, 0.2), (1.0, 1.0)])
def test_kl_is_sentence_transformers_less_its_squared_temperature(temperatures):
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    queries, documents, scores = vectors()
    student, teacher = temperatures
    peer = DistillKLDivLoss(None, student_temperature=student, teacher_temperature=teacher)
    expected = peer.compute_loss_from_embeddings([queries, *documents.unbind(1)], scores) / student**2
    found = distilled(queries, documents, scores, temperature=student, teacher_temperature=teacher)
    assert float(found.mean()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("negatives", [1, 3])
def test_margin_mse_is_sentence_transformers(negatives):
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss

    queries, documents, scores = vectors(negatives=negatives)
    expected = MarginMSELoss(None).compute_loss_from_embeddings([queries, *documents.unbind(1)], scores)
    found = distilled(queries, documents, scores, loss="margin_mse", weight=3.0)
    assert float(found.mean()) == pytest.approx(3 * float(expected), rel=1e-6)


def test_both_losses_by_hand():
    # Teacher 2/3, 1/3; model 1/2, 1/2.
    scores = torch.tensor([[LN2, 0.0]])
    even = torch.zeros(1, 2)
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert kl_divergence(even, scores).tolist() == pytest.approx([expected], rel=1e-6)
    # Margins of the model .5 and .1, of the teacher .2 and .3: (.09 + .04) / 2.
    found = margin_mse(torch.tensor([[0.6, 0.1, 0.5]]), torch.tensor([[0.9, 0.7, 0.6]]))
    assert found.tolist() == pytest.approx([0.065], rel=1e-5)


@pytest.mark.parametrize("loss", [kl_divergence, margin_mse])
def test_documents_without_a_score_are_as_if_they_were_not_there(loss):
    similarities = torch.tensor([[0.9, 0.3, 0.7, 0.2]], dtype=torch.float64, requires_grad=True)
    found = loss(similarities, torch.tensor([[0.8, NONE, 0.5, NONE]], dtype=torch.float64))
    short = loss(similarities[:, [0, 2]], torch.tensor([[0.8, 0.5]], dtype=torch.float64))
    assert found.tolist() == pytest.approx(short.tolist(), rel=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), similarities)
    assert gradient[0, 1] == gradient[0, 3] == 0 and gradient[0, 0] != 0


@pytest.mark.parametrize("loss", [kl_divergence, margin_mse])
@pytest.mark.parametrize("scores", [[NONE] * 3, [0.4, NONE, NONE]])
def test_a_row_with_nothing_to_compare_has_no_loss_and_no_gradient(loss, scores):
    similarities = torch.tensor([[0.9, 0.3, 0.7]], requires_grad=True)
    found = loss(similarities, torch.tensor([scores]))
    (gradient,) = torch.autograd.grad(found.sum(), similarities)
    assert found.tolist() == [0.0] and gradient.tolist() == [[0.0, 0.0, 0.0]]


def test_a_model_that_scores_as_its_teacher_has_nothing_left_to_learn():
    queries, documents, _ = vectors()
    own = torch.einsum("bd,bkd->bk", queries, documents)
    for loss in ("kl", "margin_mse"):
        assert distilled(queries, documents, own, loss=loss).tolist() == pytest.approx([0] * 6, abs=1e-12)


def test_weight_and_temperature_of_a_source_count_beside_the_contrastive_loss():
    queries, documents, scores = vectors(rows=2)
    config = training_config(
        loss="gemini",
        temperature=0.1,
        mix={"public": 1, "synthetic": 1},
        distillation={"weight": 2, "sources": {"synthetic": {"weight": 0.5, "temperature": 0.3}}},
    )
    section = config.distillation
    first, second = (section.of_source(name, config.temperature) for name in ("public", "synthetic"))
    assert (first.weight, first.temperature, first.teacher_temperature) == (2, 0.1, 0.1)
    assert (second.weight, second.temperature, second.teacher_temperature) == (0.5, 0.3, 0.3)
    temperatures = torch.tensor([0.1, 0.3], dtype=torch.float64)
    teacher = TeacherScores(scores / temperatures[:, None], temperatures, torch.tensor([2.0, 0.5]))
    groups = groups_of(queries, documents, teacher)
    plain = Objective.of(training_config(loss="gemini", temperature=0.1), 8, normalize=True)(
        groups, groups, 0
    )
    found = Objective.of(config, 8, normalize=True)(groups, groups, 0) - plain
    cosines = torch.einsum("bd,bkd->bk", queries, documents)
    parts = [kl_divergence((cosines / t)[None, n], (scores / t)[None, n]) for n, t in ((0, 0.1), (1, 0.3))]
    assert found.tolist() == pytest.approx([2 * float(parts[0]), 0.5 * float(parts[1])], rel=1e-6)


# From sources to rows.


def example(number, scores, **changes):
    negatives = [f"wrong {number} {k}" for k in range(len(scores) - 1)]
    return {
        "id": f"e{number}", "query": f"q {number}", "query_instruction": "Find", "positive": f"right {number}",
        "positive_score": scores[0], "negatives": negatives, "negative_scores": scores[1:],
        "document_instruction": None, "task_type": "retrieval", "dataset": "public", **changes,
    }  # fmt: skip


def taught(tmp_path, model, source, negatives=3, **section):
    """Teachings of a source's rows by id, and the counts of its preparation."""
    config = training_config(distillation=section)
    data = Place(str(tmp_path / "data"))
    prepared = prepare_sources("t", config, negatives, [source], None, model, data)
    folders = {name: index["folder"] for name, index in prepared.items()}
    teaching = {source.name: config.distillation.of_source(source.name, config.temperature)}
    store = ExampleStore(data, folders, negatives, teaching)
    groups = store.groups(range(sum(store.sizes.values())))
    return {group.id.split("/")[1]: group.teaching for group in groups}, preparation_counts(prepared)


def own_examples(tmp_path, rows):
    place = Place(str(tmp_path / "own"))
    place.write_table("examples/part-000000.parquet", table_from_rows("examples", rows))
    return TrainingSource(name="own", format="examples", path=place.uri)


def jsonl(tmp_path, rows, format):
    path = tmp_path / f"{format}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainingSource(name="own", format=format, path=str(path))


def scores_of(teaching):
    return [None if math.isnan(score) else round(score, 5) for score in teaching.scores]


def test_scores_of_mined_examples_stay_with_their_documents(tiny_model, tmp_path):
    rows = [
        example(0, [0.9, 0.5, 0.4, 0.3, 0.2]),  # more negatives than wanted
        example(1, [0.8, 0.6]),  # fewer: what repeats counts once
        # One is the positive itself and one the query: both are taken out, with their scores.
        example(2, [0.7, 0.61, 0.62, 0.63], negatives=["Right 2", "kept 2", "Q 2"]),
    ]
    found, counts = taught(tmp_path, tiny_model, own_examples(tmp_path, rows), temperature=0.5)
    assert {name: scores_of(one) for name, one in found.items()} == {
        "e0": [1.8, 1.0, 0.8, 0.6], "e1": [1.6, 1.2, None, None], "e2": [1.4, 1.24, None, None],
    }  # fmt: skip
    assert {(one.temperature, one.weight) for one in found.values()} == {(0.5, 1.0)}
    assert "unscored" not in counts and counts["cleaned"] == {
        "negative_is_positive": 1,
        "negative_is_query": 1,
    }


def test_a_negative_that_another_row_knows_to_be_right_goes_with_its_score(tiny_model, tmp_path):
    rows = [
        example(0, [0.9, 0.5, 0.4], query="one", negatives=["also right", "wrong"]),
        example(1, [0.8, 0.3], query="one", positive="also right"),
    ]
    found, _ = taught(tmp_path, tiny_model, own_examples(tmp_path, rows), negatives=2, temperature=1.0)
    assert scores_of(found["e0"]) == [0.9, 0.4, None]


def test_scores_of_flagembedding_lines(tiny_model, tmp_path):
    rows = [
        {"id": "a", "query": "q", "pos": ["p", "p2"], "neg": ["n", " ", "m"], "pos_scores": [9, 8], "neg_scores": [1, 5, 2]},
        {"id": "b", "query": "r", "pos": ["s"], "neg": ["n"], "pos_scores": [7.5], "neg_scores": [None]},
    ]  # fmt: skip
    source = jsonl(tmp_path, rows, "flagembedding")
    with pytest.raises(
        DataError,
        match=r"source 'own': row 'b' has no teacher's scores .* training.distillation.unscored: skip",
    ):
        taught(tmp_path, tiny_model, source, temperature=1.0)
    found, counts = taught(tmp_path, tiny_model, source, temperature=1.0, unscored="skip")
    assert scores_of(found["a"]) == [9.0, 1.0, 2.0, None] and scores_of(found["b"])[1:] == [None] * 3
    assert counts["unscored"] == 1


def test_scores_and_margins_of_sentence_transformers_rows(tiny_model, tmp_path):
    rows = [
        {
            "id": "a",
            "anchor": "q",
            "positive": "p",
            "negative_1": "n",
            "negative_2": "m",
            "scores": [5, 3, 1],
        },
        {"id": "b", "anchor": "r", "positive": "p", "negative": "n", "label": 2.5},  # margins
        {"id": "c", "anchor": "s", "positive": "p", "negative_1": "n", "negative_2": "m", "label": [2, 4]},
        {"id": "d", "anchor": "t", "positive": "p", "negative": "n", "label": [1, 2, 3]},  # fits nothing
        {"id": "e", "anchor": "u", "positive": "p", "negative": "n", "label": "close"},
    ]
    source = jsonl(tmp_path, rows, "sentence_transformers")
    found, counts = taught(
        tmp_path, tiny_model, source, negatives=2, loss="margin_mse", teacher_temperature=2, unscored="skip"
    )
    assert scores_of(found["a"]) == [2.5, 1.5, 0.5]
    assert scores_of(found["b"]) == [0.0, -1.25, None] and scores_of(found["c"]) == [0.0, -1.0, -2.0]
    assert counts["unscored"] == 2
    assert found["a"].temperature == 1.0  # margins are compared as they are


def test_where_the_part_is_off_for_a_source_its_scores_are_not_asked_for(tiny_model, tmp_path):
    source = jsonl(tmp_path, [{"query": "q", "pos": ["p"], "neg": ["n"]}], "flagembedding")
    stage = {
        "name": "s",
        "negatives": 1,
        "global_batch": 2,
        "learning_rate": 1e-3,
        "sources": [source.model_dump()],
    }
    config = training_config(stages=[stage], distillation={"sources": {"own": {"weight": 0}}})
    data = Place(str(tmp_path / "data"))
    prepared = prepare_sources("t", config, 1, [source], None, tiny_model, data)
    plain = prepare_sources("t", training_config(), 1, [source], None, tiny_model, data)
    assert prepared == plain  # the very files of a run without distillation
    teaching = {"own": config.distillation.of_source("own")}
    store = ExampleStore(data, {"own": prepared["own"]["folder"]}, 1, teaching)
    (group,) = store.groups([0])
    assert group.teaching.weight == 0 and all(map(math.isnan, group.teaching.scores))


def stage_with(**source):
    own = {"name": "s", "negatives": 1, "global_batch": 2, "learning_rate": 1e-3}
    return {**own, "sources": [{"name": "x", "path": "here", **source}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [stage_with(format="beir")], "distillation": {}}, r"sources.x: format beir has no teacher's scores"),
        ({"distillation": {"sources": {"publick": {}}}}, r"'publick' is no source of a stage; allowed: public, synthetic"),
        ({"distillation": {"contrastive_weight": 0, "unscored": "skip"}}, r"contrastive_weight is 0 and unscored is skip"),
        ({"distillation": {"contrastive_weight": 0, "weight": 0}}, r"contrastive_weight is 0 and weight is 0"),
        ({"distillation": {"temperature": 0}}, r"greater than 0"),
        (
            {
                "stages": [{"name": "s", "negatives": 0, "global_batch": 2, "learning_rate": 1e-3}],
                "loss": "gecko", "distillation": {},
            },
            r"stages.s.negatives is 0, but distillation",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_distilled_is_refused_at_start(changes, message):
    with pytest.raises(ValidationError, match=message):
        training_config(**changes)


def test_a_source_without_scores_may_be_left_out_by_name_or_by_rule():
    stages = [stage_with(format="beir")]
    for section in ({"sources": {"x": {"weight": 0}}}, {"unscored": "skip"}):
        assert training_config(stages=stages, distillation=section).distillation is not None


def test_a_run_turns_it_on_or_off_for_itself():
    config = training_config(
        distillation={"weight": 2},
        candidates=[
            {"name": "a", "seed": 0}, {"name": "b", "seed": 0, "distillation": {"loss": "margin_mse"}},
            {"name": "c", "seed": 0, "distillation": {"weight": 0}},
        ],
    )  # fmt: skip
    found = [config.of_run(run).distillation for run in config.runs]
    assert [(one.loss, one.weight) for one in found] == [("kl", 2), ("margin_mse", 1), ("kl", 0)]
    assert "distillation" not in training_config().model_dump(mode="json")  # fingerprints stay
