"""The mining stage through Ray with a tiny real teacher, against brute force on the vectors it stored."""

import json
import shutil

import numpy as np
import pyarrow.compute as pc
import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.config.mining import MiningConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.prompting import PromptContract
from embedloom.core.schemas import SCHEMAS
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError
from embedloom.mining.stage import build_examples, mine, teacher_sources
from embedloom.retrieval.vector_files import read_vectors
from fakes_mining import document_row, make_corpus, make_synthesis, pair_row, random_documents

CONFIG = {
    "top_k": 12,
    "selection": {"negatives": 3, "margin_ratio": 0.99},
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
    return make_corpus(folder / "corpus", documents, [*pairs, *STS], cuts=3), make_synthesis(
        folder / "synthesis", synthetic
    )


STS = [
    pair_row(
        f"sts{n}",
        f"left {n}",
        "nowhere",
        positive=f"right {n} {word}",
        task_type="sts",
        instruction="Same meaning",
    )
    for n, word in enumerate(["read", "write", "lock", "queue", "sort"])
]


def run(folder, artefacts, teacher, actors=1, config=None):
    """Mined candidates and the examples made of them."""
    config = config or MiningConfig(teachers=[str(teacher)], **CONFIG)
    pool = PoolConfig(min_actors=actors, max_actors=actors, cpus=1)
    writer = ArtefactWriter(Place(str(folder / "mining")), "mining", "config", {}, "local")
    mined = mine(config, artefacts[0], [artefacts[1]], teacher_sources(config), pool, writer)
    writer = ArtefactWriter(Place(str(folder / "examples")), "examples", "config", {}, "local")
    judge = teacher_sources(config)[0] if config.audit.judge else None
    return mined, build_examples(config, mined, artefacts[0], judge, pool, writer)


@pytest.fixture(scope="module")
def mined(ray_local, tiny_model, tmp_path_factory) -> tuple[Artefact, Artefact, tuple[Artefact, Artefact]]:
    folder = tmp_path_factory.mktemp("mining")
    artefacts = inputs(folder)
    return *run(folder / "out", artefacts, tiny_model), artefacts


def documents_of(artefacts):
    return {
        row["id"]: row["text"]
        for row in artefacts[0].place.read_tables("documents/train", "documents").to_pylist()
    }


@pytest.mark.ray
def test_examples_equal_brute_force_on_the_stored_vectors(mined):
    artefact, built, artefacts = mined
    texts = documents_of(artefacts)
    query_ids, queries = read_vectors(artefact.place, "teachers/0/queries")
    ids, vectors = read_vectors(artefact.place, "teachers/0/documents/corpus")
    order = np.argsort(ids)
    ids, vectors = [ids[row] for row in order], vectors[order]
    scores = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    candidates = {
        row["query_id"]: row for row in artefact.place.read_tables("candidates", "candidates").to_pylist()
    }
    examples = {row["id"]: row for row in built.place.read_tables("examples", "examples").to_pylist()}
    pairs = [
        *artefacts[0].place.read_tables("pairs/train", "pairs").to_pylist(),
        *artefacts[1].place.read_tables("pairs", "pairs").to_pylist(),
    ]
    searched = [
        pair for pair in pairs if pair["task_type"] != "sts" and pair["id"] not in ("stranger", "blank")
    ]
    assert (
        set(query_ids) == set(candidates) == {pair["id"] for pair in searched} | {pair["id"] for pair in STS}
    )
    checked = 0
    for pair in searched:
        number = query_ids.index(pair["id"])
        best = np.argsort(-scores[number], kind="stable")[:12]
        assert candidates[pair["id"]]["document_ids"] == [ids[row] for row in best]
        assert candidates[pair["id"]]["scores"] == scores[number][best].tolist()
        if pair["document_id"] not in texts:
            continue
        positive = float(scores[number][ids.index(pair["document_id"])])
        same = [p["document_id"] for p in pairs if p["query"] == pair["query"] and p["document_id"] in texts]
        known = {texts[identifier] for identifier in same}
        lowest = min(float(scores[number][ids.index(identifier)]) for identifier in same)
        limit = lowest - abs(lowest) * (1 - 0.99)
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
    artefact, _, _ = mined
    contract = PromptContract.load(tiny_model).model_copy(
        update={"max_query_tokens": 96, "max_document_tokens": 80}
    )
    encoder = Encoder.load(tiny_model, contract=contract)
    ids, vectors = read_vectors(artefact.place, "teachers/0/queries", contract.hash)
    row = ids.index("n05")
    query = artefact.place.read_tables("queries").filter(pc.field("id") == "n05").column("text")[0].as_py()
    expected = encoder.embed([query], "query", instruction="Find the text")[0]
    assert float(vectors[row] @ expected) > 0.999
    # texts that stand opposite each other both carry the instruction
    ids, vectors = read_vectors(artefact.place, "teachers/0/documents/public-sts", contract.hash)
    expected = encoder.embed(["right 0 read"], "document", "sts", "Same meaning")[0]
    bare = encoder.embed(["right 0 read"], "document")[0]
    similarity = vectors @ expected
    assert similarity.max() > 0.999 > float(bare @ expected)


@pytest.mark.ray
def test_special_rows(mined):
    artefact, built, _ = mined
    examples = {row["id"]: row for row in built.place.read_tables("examples", "examples").to_pylist()}
    rejects = {
        row["id"]: row["reason"]
        for place in (artefact.place, built.place)
        for row in place.read_tables("rejects", "rejects").to_pylist()
    }
    assert rejects["stranger"] == "positive_not_in_corpus"
    assert rejects["blank"] == "empty_query"
    label = examples["label"]
    assert (label["positive"], label["negatives"]) == ("joy", ["anger", "fear", "hope"])
    assert (label["query_instruction"], label["document_instruction"]) == ("Find the text", None)
    assert all(np.isfinite([label["positive_score"], *label["negative_scores"]]))
    inline = examples.get("inline")
    assert inline is not None or rejects["inline"] == "no_negative_left"
    assert inline is None or inline["positive"] == "a given text about sorting"
    sts = [row for row in examples.values() if row["task_type"] == "sts"]
    rights = {pair["positive"] for pair in STS}
    assert len(sts) + sum(identifier.startswith("sts") for identifier in rejects) == 5 and sts
    for row in sts:
        assert row["document_instruction"] == "Same meaning"
        assert set(row["negatives"]) <= rights - {row["positive"]}
    for row in examples.values():
        assert TWIN not in row["negatives"] or row["id"] != "twin"
        assert row["positive"] not in row["negatives"]
        assert 1 <= len(set(row["negatives"])) == len(row["negatives"]) == len(row["negative_scores"]) <= 3


@pytest.mark.ray
def test_counts_add_up(mined):
    artefact, built, artefacts = mined
    counts = built.counts
    examples = built.place.read_tables("examples", "examples")
    rejects = built.place.read_tables("rejects", "rejects")
    assert counts["rows"] == examples.num_rows == sum(counts["rows_by_origin"].values())
    assert artefact.counts["rows"] + sum(artefact.counts["rejects"].values()) == 47 + len(STS)
    assert counts["rows"] + sum(counts["rejects"].values()) == artefact.counts["rows"]
    assert sum(counts["rejects"].values()) == rejects.num_rows
    assert counts["short_negatives"] == sum(len(row) < 3 for row in examples.column("negatives").to_pylist())
    assert counts["mean_positive_score"] == pytest.approx(
        np.mean(examples.column("positive_score").to_pylist()), abs=1e-4
    )
    assert 0 < counts["false_negative_share"] < 1
    # byte tokens: the beginning-of-text token, the text, cut at 80
    texts = documents_of(artefacts).values()
    given = ["a given text about sorting", "joy", "anger", "fear", "hope", "dread"]
    unique = [*dict.fromkeys(texts), *given]
    assert artefact.counts["tokens_by_side"]["documents"] >= sum(min(80, 1 + len(text)) for text in unique)
    assert artefact.counts["tokens"] == sum(artefact.counts["tokens_by_side"].values())
    assert set(artefact.place.read_tables("candidates").column_names) == set(SCHEMAS["candidates"].columns)
    audit = built.manifest["details"]["audit"]["total"]
    table = built.place.read_tables("audit").to_pylist()
    mined_rows = [row for row in table if not row["given"]]
    assert audit["queries"] == len(table) and audit["given"] == len(table) - len(mined_rows)
    assert audit["removed"]["margin"]["count"] == sum(row["removed_by_margin"] for row in mined_rows) > 0
    gaps = [gap for row in mined_rows for gap in row["gaps"]]
    assert sum(audit["gaps"]["counts"]) + audit["gaps"]["below"] + audit["gaps"]["above"] == len(gaps)


@pytest.mark.ray
@pytest.mark.parametrize("actors", [2, 3, 7])
def test_shares_and_kills_change_no_file(mined, tiny_model, tmp_path, actors):
    """Other numbers of actors, and half the parts of every step gone and no manifest, as after ``kill -9``."""
    artefact, built, artefacts = mined
    first = artefact.place.local.parent
    second = tmp_path / "out"
    shutil.copytree(first, second)
    for one in (artefact, built):
        name = one.manifest["kind"]
        (second / name / "manifest.json").unlink()
        building = {"kind": name, "fingerprint": one.fingerprint}
        (second / name / "_building.json").write_text(json.dumps(building))
    lost = ["mining/queries.json", "mining/teachers/0/documents/corpus/part-000002.parquet"]
    lost += [
        f"{folder}/part-00000{n}.parquet"
        for folder in ("mining/candidates", "mining/positive_scores", "examples/examples", "examples/audit")
        for n in (0, 2)
    ]
    for name in lost:
        (second / name).unlink()
    again = run(second, artefacts, tiny_model, actors=actors)
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(second)) for path in second.rglob("*") if path.is_file())
    for name in names:
        if not name.endswith("manifest.json"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert (again[0].counts, again[1].counts) == (artefact.counts, built.counts)


@pytest.mark.ray
def test_other_rules_need_no_other_mining(mined, tiny_model, tmp_path):
    """Two teachers share the folders; another method and a judge read what is there."""
    artefact, built, artefacts = mined
    selection = {"method": "shift", "shift": 2, "negatives": 2, "min_negatives": 2}
    config = MiningConfig(
        teachers=[str(tiny_model)],
        audit={"judge": str(tiny_model), "sample": 10},
        **{**CONFIG, "selection": selection},
    )
    writer = ArtefactWriter(Place(str(tmp_path / "examples")), "examples", "other", {}, "local")
    judge = teacher_sources(config)[0]
    other = build_examples(config, artefact, artefacts[0], judge, PoolConfig(cpus=1), writer)
    candidates = {row["query_id"]: row for row in artefact.place.read_tables("candidates").to_pylist()}
    texts = documents_of(artefacts)
    for row in other.place.read_tables("examples", "examples").to_pylist():
        if row["task_type"] == "retrieval" and row["id"].startswith("s0"):
            ranked = [
                texts[name]
                for name in candidates[row["id"]]["document_ids"]
                if texts[name] != row["positive"]
            ]
            assert row["negatives"] == list(dict.fromkeys(ranked))[2:4]
    judged = other.manifest["details"]["audit"]["judged"]
    assert (
        judged["selected"]["rows"] == 10 and 0 <= judged["selected"]["low"] <= judged["selected"]["high"] <= 1
    )
    assert built.counts != other.counts


@pytest.mark.ray
def test_two_teachers(mined, tiny_model, tmp_path):
    """The same model twice under two limits: both keep their candidates, and blended lists draw on both."""
    _, _, artefacts = mined
    short = {"model": str(tiny_model) + "/", "max_query_tokens": 90, "max_document_tokens": 64}
    selection = {"negatives": 3, "margin_ratio": 0.99, "blend": "intra_sample"}
    config = MiningConfig(teachers=[str(tiny_model), short], **{**CONFIG, "selection": selection})
    both, examples = run(tmp_path, artefacts, tiny_model, config=config)
    table = both.place.read_tables("candidates", "candidates")
    assert table.num_rows == 2 * both.counts["rows"]
    assert len(set(table.column("contract_hash").to_pylist())) == 2
    assert examples.counts["rows"] > 0
    for row in examples.place.read_tables("examples", "examples").to_pylist():
        assert len(set(row["negatives"])) == len(row["negatives"]) <= 3


def test_a_teachers_limits_are_checked_and_named(tiny_model):
    config = MiningConfig(teachers=[str(tiny_model)], **{**CONFIG, "max_query_tokens": 4096})
    with pytest.raises(
        ConfigError, match=r"mining\.teachers\.0: .*max_query_tokens: 4096 is above the 1024 positions"
    ):
        teacher_sources(config)
    changed = MiningConfig(teachers=[str(tiny_model)], **CONFIG, instructions={"retrieval": "Look it up"})
    contract = teacher_sources(changed)[0].contract
    assert contract.instruction_for("retrieval") == "Look it up"
    assert (contract.max_query_tokens, contract.max_document_tokens) == (96, 80)
