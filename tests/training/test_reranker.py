"""Training of a reranker: its losses against sentence-transformers' own on the same texts, and a run on two workers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from embedloom.config.cluster import TrainingGroup
from embedloom.config.reranker import RerankerConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.encoder.pairs import PairEncoder, prepare_reranker
from embedloom.errors import ConfigError
from embedloom.training.data import Group, Teaching
from embedloom.training.gradients import PairModule, vector_groups
from embedloom.training.learner import RerankerLearner
from embedloom.training.losses import Objective, VectorGroups, binary_cross_entropy
from embedloom.training.metrics import METRICS_FILE
from embedloom.training.reranker import train_reranker
from fakes_mining import make_tiny_cross_encoder

NONE = float("nan")
ROWS = [
    ("how do I sort a list", "sorted() gives a new list", ["a list is mutable", "sort cards by suit"]),
    ("wie sortiere ich", "sorted() liefert eine neue Liste", ["eine Liste " * 9, "Karten"]),
    ("並べ替え", "sorted() は新しいリスト", ["リスト", "カード " * 5]),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("reranker")
    model = make_tiny_cross_encoder(root / "model")
    path = model / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    # Without dropout the library's steps can be compared with ours.
    config = json.loads((model / "config.json").read_text())
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config | dropout))
    (root / "base").mkdir()
    prepare_reranker(model, 64, 0, root / "base")
    return root / "base"


def config_of(base="base", **changes):
    settings = {"base": str(base), "max_tokens": 64, "negatives": 2, "global_batch": 4, "learning_rate": 1e-3}
    return RerankerConfig.model_validate({**settings, **changes})


def groups_of(encoder, rows, scores=None, temperature=1.0):
    found = []
    for number, (query, positive, negatives) in enumerate(rows):
        ids = encoder.tokenizer([query, positive, *negatives])["input_ids"]
        teaching = None if scores is None else Teaching(scores[number], temperature, 1.0)
        found.append(Group(str(number), ids[0], ids[1:], teaching=teaching))
    return found


def loss_of(encoder, config, scores=None, temperature=1.0):
    groups = groups_of(encoder, ROWS, scores, temperature)
    batch = vector_groups(groups, *PairModule(encoder)(groups))
    objective = Objective.of_reranker(config.loss, config.training({"public": 1}))
    return objective(batch, batch, 0)


def library(base):
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(base), device="cpu", model_kwargs={"dtype": torch.float32})


def columns():
    queries, positives, negatives = zip(*ROWS, strict=True)
    return [list(queries), list(positives), *map(list, zip(*negatives, strict=True))]


def same_gradients(ours, peer, name="classifier.weight"):
    own = dict(ours.model.named_parameters())[name].grad
    torch.testing.assert_close(own, dict(peer.model.named_parameters())[name].grad, atol=1e-5, rtol=1e-4)


def test_binary_cross_entropy_is_sentence_transformers(base):
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    peer, encoder = library(base), PairEncoder.open(base, dtype="float32", device="cpu", trainable=True)
    asked, positives, *others = columns()
    documents, labels = positives + [text for own in others for text in own], [1.0] * 3 + [0.0] * 6
    expected = BinaryCrossEntropyLoss(peer)([asked * 3, documents], torch.tensor(labels))
    found = loss_of(encoder, config_of(loss="bce")).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward(), found.backward()
    same_gradients(encoder, peer)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_listwise_infonce_is_sentence_transformers_without_documents_of_others(base, temperature):
    from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss

    peer, encoder = library(base), PairEncoder.open(base, dtype="float32", device="cpu", trainable=True)
    loss = MultipleNegativesRankingLoss(peer, scale=1 / temperature, activation_fn=torch.nn.Identity())
    asked, *documents = (
        columns()
    )  # its forward without the documents of other queries, at least one of which it wants
    expected = loss.calculate_loss(
        [loss.call_model_with_columns(asked, own) for own in documents], len(asked)
    )
    found = loss_of(encoder, config_of(loss="infonce", temperature=temperature)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward(), found.backward()
    same_gradients(encoder, peer)


def test_margins_of_a_teacher_are_sentence_transformers(base):
    from sentence_transformers.cross_encoder.losses import MarginMSELoss

    peer, encoder = library(base), PairEncoder.open(base, dtype="float32", device="cpu", trainable=True)
    scores = [[0.9, 0.2, 0.4], [0.8, 0.7, 0.1], [0.6, 0.5, 0.3]]
    expected = MarginMSELoss(peer, activation_fn=torch.nn.Identity())(columns(), torch.tensor(scores))
    section = {"loss": "margin_mse", "contrastive_weight": 0}
    found = loss_of(encoder, config_of(distillation=section), scores).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward(), found.backward()
    same_gradients(encoder, peer)


def test_kl_to_a_teacher_is_by_hand(base):
    encoder = PairEncoder.open(base, dtype="float32", device="cpu")
    scores = [[2.0, 0.0, NONE], [1.0, 1.0, 1.0], [3.0, NONE, -1.0]]
    found = loss_of(encoder, config_of(distillation={"contrastive_weight": 0}), scores, temperature=2.0)
    for row, own, loss in zip(ROWS, scores, found, strict=True):
        logits = encoder.score([row[0]] * 3, [row[1], *row[2]]) / 2.0
        known = [at for at in range(3) if own[at] == own[at]]
        teacher, model = (np.exp(np.asarray(x)[known]) for x in (own, logits))
        teacher, model = teacher / teacher.sum(), model / model.sum()
        assert float(loss.detach()) == pytest.approx(
            float((teacher * np.log(teacher / model)).sum()), abs=1e-5
        )


def test_a_negative_that_another_row_knows_to_be_right_is_no_pair_of_bce():
    logits = torch.tensor([[[1.0], [2.0], [-1.0]]])
    keys = torch.tensor([[1, 2, 3]])
    plain = VectorGroups(torch.ones(1, 1), logits, torch.tensor([9]), keys)
    known = VectorGroups(torch.ones(1, 1), logits, torch.tensor([9]), keys, torch.tensor([[1, 2]]))
    right, wrong, other = np.log1p(np.exp(-1.0)), np.log1p(np.exp(2.0)), np.log1p(np.exp(-1.0))
    assert binary_cross_entropy(plain, plain, 0, 1.0).tolist() == pytest.approx([(right + wrong + other) / 3])
    assert binary_cross_entropy(known, known, 0, 1.0).tolist() == pytest.approx([(right + other) / 2])


def test_a_batch_is_shared_out_by_the_tokens_of_its_pairs(base):
    encoder = PairEncoder.open(base, dtype="float32", device="cpu", trainable=True)
    config = config_of()
    training = config.training({"public": 1})
    learner = RerankerLearner(encoder, config, training, training.stages[0])
    (group,) = groups_of(encoder, [("abc", "x" * 10, ["y" * 4, "z" * 300])])
    # [CLS] abc [SEP] document [SEP], a token a byte, at most 64
    assert learner.lengths(group.lengths) == [16, 10, 64]
    learner.module([group])
    assert encoder.tokens.real == 16 + 10 + 64


def test_what_does_not_fit_is_refused_with_the_key():
    with pytest.raises(ValidationError, match=r"contrastive_weight is 0 and weight is 0"):
        config_of(distillation={"contrastive_weight": 0, "weight": 0})
    with pytest.raises(
        ValidationError, match=r"stages\.reranker\.sources\.nemo: format nemo_json has no teacher's scores"
    ):
        config_of(distillation={}, sources=[{"name": "nemo", "format": "nemo_json", "path": "x.json"}])
    with pytest.raises(ValidationError, match="unknown origin 'other' in mix"):
        config_of(mix={"other": 1})


WORDS = {"red": "rot", "green": "grün", "blue": "blau", "grey": "grau", "pink": "rosa", "gold": "golden"}


def make_mining(folder: Path, rows: int = 48) -> Artefact:
    """Questions in two languages, each with two right answers in rows of their own, and negatives of another colour."""
    writer = ArtefactWriter(Place(str(folder)), "mining", "test", {}, "local")
    examples = []
    for number in range(rows):
        word, german = list(WORDS.items())[number % len(WORDS)]
        others = [other for other in WORDS if other != word]
        query = f"colour {word}" if number % 2 else f"farbe {german}"
        answers = [f"this is {word}", f"das ist {german}"]
        examples.append(
            {
                "id": f"row-{number:03d}", "query": query, "query_instruction": "Find the colour",
                "positive": answers[(number // 12) % 2], "positive_score": 0.9,
                "negatives": [f"this is {other}" for other in others[: 1 + number % 3]],
                "negative_scores": [0.3] * (1 + number % 3), "document_instruction": None,
                "task_type": "retrieval", "dataset": "public" if number % 4 else "synthetic",
            }
        )  # fmt: skip
    writer.place.write_table("examples/part-000000.parquet", table_from_rows("examples", examples))
    return writer.commit({"rows": rows})


def run(folder: Path, mining: Artefact, base: Path, workers: int = 2, **changes) -> Artefact:
    config = config_of(
        base, max_steps=20, warmup_steps=2, micro_batch_tokens=256, checkpoint_every_steps=8, **changes
    )
    writer = ArtefactWriter(Place(str(folder)), "reranker", "test", {}, "local")
    group = TrainingGroup(workers=workers, cpus=1, threads=1)
    mix = {"public": 0.75, "synthetic": 0.25}
    return train_reranker(
        config, mix, base, mining, group, "float32", writer, Place(str(folder.parent / "prepared"))
    )


def test_a_batch_too_small_for_the_workers_is_refused_before_any_starts(base, tmp_path):
    mining = make_mining(tmp_path / "mining")
    with pytest.raises(
        ConfigError, match=r"reranker\.global_batch: 4 queries cannot be shared out to 5 workers"
    ):
        run(tmp_path / "model", mining, base, workers=5)


@pytest.mark.ray
@pytest.mark.parametrize("section", [{"loss": "bce"}, {"distillation": {"temperature": 1.0, "weight": 0.5}}])
def test_two_workers_train_a_reranker_that_other_readers_read(ray_local, base, tmp_path, section):
    mining = make_mining(tmp_path / "mining")
    artefact = run(tmp_path / "model", mining, base, **section)
    folder = artefact.place.local
    lines = (folder / METRICS_FILE).read_text().splitlines()
    curve = [json.loads(line)["loss"] for line in lines]
    assert len(curve) == 20 and np.mean(curve[-4:]) < np.mean(curve[:4])
    assert artefact.counts["rows"] == 80 and artefact.counts["repeated_negatives"] > 0
    details = artefact.manifest["details"]
    assert max(details["parity"].values()) < 1e-4 and details["peak_memory_mib"] > 0
    pairs = [
        ("colour red", "this is red"),
        ("farbe rot", "das ist rot"),
        ("colour red", "this is blue " * 30),
    ]
    expected = library(folder).predict(pairs, activation_fn=torch.nn.Identity())
    encoder = PairEncoder.open(folder, dtype="float32", device="cpu")
    np.testing.assert_allclose(encoder.score(*zip(*pairs, strict=True)), expected, atol=1e-4)
    before = PairEncoder.open(base, dtype="float32", device="cpu").score(*zip(*pairs, strict=True))
    assert not np.allclose(before, expected, atol=1e-2)
    assert "pipeline_tag: text-ranking" in (folder / "README.md").read_text()
    assert not artefact.place.exists("_train")
