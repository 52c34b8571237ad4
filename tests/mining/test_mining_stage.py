"""The mining stage through Ray with a tiny real teacher, against brute force on the vectors it stored."""

import json
import shutil

import numpy as np
import pytest

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.config.data import MiningConfig
from embedloom.config.resources import PoolConfig
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError
from embedloom.instructions import PromptContract
from embedloom.mining.stage import mine, teacher_contract
from embedloom.records import SCHEMAS
from embedloom.retrieval.embed import read_vectors
from embedloom.storage import Place
from fakes_mining import document_row, make_corpus, make_synthesis, pair_row, random_documents

CONFIG = {
    "top_k": 12,
    "negatives": 3,
    "margin_ratio": 0.99,
    "max_query_tokens": 96,
    "max_document_tokens": 80,
    "shard_rows": 16,
}
TWIN = "queue lock thread twin"


def inputs(folder):
    """60 documents in 3 files, 30 natural and 10 synthetic pairs, and one row of each special case."""
    documents = [*random_documents(58), document_row("twin-a", TWIN), document_row("twin-b", TWIN)]
    pairs = [
        pair_row(f"n{n:02d}", " ".join(documents[n]["text"].split()[:3]), documents[n]["id"])
        for n in range(30)
    ]
    pairs += [
        pair_row("twin", "queue lock", "twin-b"),
        pair_row("shared-1", "socket", "d0001"),
        pair_row("shared-2", "socket", "d0002"),
        pair_row("stranger", "a query", "nowhere"),
        pair_row("blank", " ", "d0003"),
        pair_row("inline", "sort the column", "nowhere", positive="a given text about sorting"),
        pair_row("label", "what a fine day", "nowhere", positive="joy", negatives=["anger", "joy", "fear", "hope", "dread"], task_type="classification"),
    ]  # fmt: skip
    synthetic = [
        pair_row(
            f"s{n:02d}",
            f"synthetic {documents[40 + n]['text'][:20]}",
            documents[40 + n]["id"],
            origin="synthetic",
        )
        for n in range(10)
    ]
    return make_corpus(folder / "corpus", documents, pairs, cuts=3), make_synthesis(
        folder / "synthesis", synthetic
    )


def run(folder, artefacts, teacher, actors=1):
    config = MiningConfig(teacher="tiny", **CONFIG)
    writer = ArtefactWriter(Place(str(folder)), "mining", "config", {}, "local")
    pool = PoolConfig(min_actors=actors, max_actors=actors, cpus=1)
    return mine(config, artefacts[0], [artefacts[1]], teacher, pool, writer)


@pytest.fixture(scope="module")
def mined(ray_local, tiny_model, tmp_path_factory) -> tuple[Artefact, tuple[Artefact, Artefact]]:
    folder = tmp_path_factory.mktemp("mining")
    artefacts = inputs(folder)
    return run(folder / "out", artefacts, tiny_model), artefacts


def documents_of(artefacts):
    return {
        row["id"]: row["text"]
        for row in artefacts[0].place.read_tables("documents/train", "documents").to_pylist()
    }


@pytest.mark.ray
def test_examples_equal_brute_force_on_the_stored_vectors(mined):
    artefact, artefacts = mined
    texts = documents_of(artefacts)
    query_ids, queries = read_vectors(artefact.place, "query_vectors")
    ids, vectors = read_vectors(artefact.place, "document_vectors")
    order = np.argsort(ids)
    ids, vectors = [ids[row] for row in order], vectors[order]
    scores = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    candidates = {
        row["query_id"]: row for row in artefact.place.read_tables("candidates", "candidates").to_pylist()
    }
    examples = {row["id"]: row for row in artefact.place.read_tables("examples", "examples").to_pylist()}
    pairs = [
        *artefacts[0].place.read_tables("pairs/train", "pairs").to_pylist(),
        *artefacts[1].place.read_tables("pairs", "pairs").to_pylist(),
    ]
    assert query_ids == [pair["id"] for pair in pairs] == list(candidates)
    checked = 0
    for number, pair in enumerate(pairs):
        best = np.argsort(-scores[number], kind="stable")[:12]
        assert candidates[pair["id"]]["document_ids"] == [ids[row] for row in best]
        assert candidates[pair["id"]]["scores"] == scores[number][best].tolist()
        if pair["document_id"] not in texts or not pair["query"].strip():
            continue
        positive = float(scores[number][ids.index(pair["document_id"])])
        known = {
            texts[other["document_id"]]
            for other in pairs
            if other["query"] == pair["query"] and other["document_id"] in texts
        }
        limit = positive - abs(positive) * (1 - 0.99)
        kept = list(
            dict.fromkeys(
                texts[ids[row]]
                for row in best
                if texts[ids[row]] not in known and scores[number][row] < limit
            )
        )[:3]
        example = examples.get(pair["id"])
        assert (example["negatives"] if example else []) == kept
        if example:
            assert example["positive_score"] == np.float32(positive)
            assert all(score < limit for score in example["negative_scores"])
            assert (example["query"], example["positive"]) == (pair["query"], texts[pair["document_id"]])
            assert (example["query_instruction"], example["document_instruction"]) == ("Find the text", None)
            checked += 1
    assert checked >= 15


@pytest.mark.ray
def test_vectors_are_the_teachers(mined, tiny_model):
    artefact, _ = mined
    contract = teacher_contract(MiningConfig(teacher="tiny", **CONFIG), tiny_model)
    encoder = Encoder.load(tiny_model, contract=contract)
    ids, vectors = read_vectors(artefact.place, "query_vectors", contract.hash)
    row = ids.index("n05")
    query = artefact.place.read_tables("queries").column("text")[row].as_py()
    expected = encoder.embed([query], "query", instruction="Find the text")[0]
    assert float(vectors[row] @ expected) > 0.999


@pytest.mark.ray
def test_special_rows(mined):
    artefact, _ = mined
    examples = {row["id"]: row for row in artefact.place.read_tables("examples", "examples").to_pylist()}
    rejects = {
        row["id"]: (row["reason"], row["detail"])
        for row in artefact.place.read_tables("rejects", "rejects").to_pylist()
    }
    assert rejects["stranger"] == ("positive_not_in_corpus", "nowhere")
    assert rejects["blank"] == ("empty_query", "d0003")
    label = examples["label"]
    assert (label["positive"], label["negatives"]) == ("joy", ["anger", "fear", "hope"])
    assert label["document_instruction"] == label["query_instruction"] == "Find the text"
    assert all(np.isfinite([label["positive_score"], *label["negative_scores"]]))
    inline = examples.get("inline")
    assert inline is not None or rejects["inline"][0] == "no_negative_under_margin"
    assert inline is None or inline["positive"] == "a given text about sorting"
    for row in examples.values():
        assert TWIN not in row["negatives"] or row["id"] != "twin"
        assert row["positive"] not in row["negatives"]
        assert 1 <= len(set(row["negatives"])) == len(row["negatives"]) == len(row["negative_scores"]) <= 3


@pytest.mark.ray
def test_counts_add_up(mined):
    artefact, _ = mined
    counts = artefact.counts
    examples = artefact.place.read_tables("examples", "examples")
    rejects = artefact.place.read_tables("rejects", "rejects")
    assert counts["rows"] == examples.num_rows == sum(counts["rows_by_origin"].values())
    assert counts["rows"] + sum(counts["rejects"].values()) == 47
    assert sum(counts["rejects"].values()) == rejects.num_rows
    assert counts["short_negatives"] == sum(len(row) < 3 for row in examples.column("negatives").to_pylist())
    assert counts["mean_positive_score"] == pytest.approx(
        np.mean(examples.column("positive_score").to_pylist()), abs=1e-4
    )
    assert 0 < counts["false_negative_share"] < 1
    # byte tokens: the beginning-of-text token, the text, cut at 80
    texts = documents_of(mined[1]).values()
    given = ["a given text about sorting", "joy", "anger", "fear", "hope", "dread"]
    unique = [*dict.fromkeys(texts), *given]
    assert counts["tokens_by_side"]["documents"] >= sum(min(80, 1 + len(text)) for text in unique)
    assert counts["tokens"] == sum(counts["tokens_by_side"].values())
    assert set(artefact.place.read_tables("candidates").column_names) == set(SCHEMAS["candidates"].columns)


@pytest.mark.ray
def test_two_actors_after_a_kill_end_with_the_same_files(mined, tiny_model, tmp_path):
    """Half the parts of every step gone and no manifest, as after ``kill -9``."""
    artefact, artefacts = mined
    first = artefact.place.local
    second = tmp_path / "out"
    shutil.copytree(first, second)
    (second / "manifest.json").unlink()
    (second / "_building.json").write_text(
        json.dumps({"kind": "mining", "fingerprint": artefact.fingerprint})
    )
    lost = ["queries.json", "document_vectors/part-000002.parquet"]
    lost += [
        f"{folder}/part-00000{n}.parquet"
        for folder in ("candidates", "examples", "audit", "rejects")
        for n in (0, 2)
    ]
    for name in lost:
        (second / name).unlink()
    again = run(second, artefacts, tiny_model, actors=2)
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(second)) for path in second.rglob("*") if path.is_file())
    for name in names:
        if name != "manifest.json":
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert again.counts == artefact.counts


def test_teacher_contract_takes_the_limits_of_the_config(tiny_model):
    own = PromptContract.load(tiny_model)
    contract = teacher_contract(MiningConfig(teacher="tiny", **CONFIG), tiny_model)
    assert (contract.max_query_tokens, contract.max_document_tokens) == (96, 80)
    assert contract.instructions == own.instructions
    changed = teacher_contract(
        MiningConfig(teacher="tiny", **CONFIG, instructions={"retrieval": "Look it up"}), tiny_model
    )
    assert changed.instruction_for("retrieval") == "Look it up"
    assert changed.instruction_for("sts") == own.instruction_for("sts")
    with pytest.raises(
        ConfigError, match=r"mining\.max_query_tokens: 4096 is above the 1024 positions of 'tiny'"
    ):
        teacher_contract(MiningConfig(teacher="tiny", **{**CONFIG, "max_query_tokens": 4096}), tiny_model)
