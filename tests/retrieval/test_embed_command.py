"""`embedloom embed` through Ray with a tiny real model: sharing, resuming, delta runs, stored types, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.config.cluster import PoolConfig, load_cluster
from embedloom.config.embedding import EmbeddingConfig, LexicalConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.prompting import PromptContract
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import open_model
from embedloom.encoder.tokenizer import InstructionTooLong
from embedloom.errors import ConfigError, DataError, UserError
from embedloom.pipeline.model_commands import embed_texts
from embedloom.retrieval.corpora import embed_artefact
from embedloom.retrieval.lexical import index_texts, load_lexical
from embedloom.retrieval.vector_files import read_vectors
from fakes_evaluation import document, pair
from fakes_foreign import OLD, make_transformer, write_old_layout

CLUSTER = Path(__file__).parents[2] / "cluster" / "cluster.yaml"
TEXTS = [f"text number {n % 40} of the corpus" for n in range(50)]  # the last ten repeat the first ten


def write_lines(path, texts, first=0):
    rows = ({"id": f"d{first + n}", "text": text} for n, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def embed(source, out, model, **section) -> Artefact:
    config = EmbeddingConfig(corpus=str(source), model=str(model), **{"shard_rows": 8, **section})
    assert embed_texts(config, str(out), load_cluster(CLUSTER), "local", dry_run=False) == str(out)
    return Artefact.open(Place(str(out)), "vectors")


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }


@pytest.mark.ray
def test_words_are_indexed_beside_vectors_that_are_kept(ray_local, tiny_model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", TEXTS)
    embed(source, tmp_path / "out", tiny_model)
    done = embed(source, tmp_path / "out", tiny_model, lexical={"language": None})
    assert (done.counts["embedded"], done.counts["reused"]) == (0, 50)
    index = load_lexical(done.place)
    assert done.manifest["details"]["lexical"] == index.facts == {
        "rows": 50, "terms": 45, "words": 300, "postings": 300, "language": None, "k1": 1.5, "b": 0.75,
    }  # fmt: skip
    assert index.search("number 7", 3)[0].tolist()[:2] == [7, 47]
    np.testing.assert_array_equal(
        index.scores("corpus 12"), index_texts(TEXTS, LexicalConfig(language=None)).scores("corpus 12")
    )
    with pytest.raises(ConfigError, match=r"embedding\.lexical\.language: 'zho'"):
        embed(source, tmp_path / "other", tiny_model, lexical={"language": "zho"})


@pytest.mark.ray
def test_vectors_are_the_encoders_and_equal_texts_cost_once(ray_local, tiny_model, tmp_path):
    done = embed(
        write_lines(tmp_path / "in.jsonl", TEXTS), tmp_path / "out", tiny_model, index={"kind": "flat"}
    )
    ids, vectors = read_vectors(done.place, "vectors", PromptContract.load(tiny_model).hash)
    assert ids == [f"d{n}" for n in range(50)]
    encoder = Encoder.load(tiny_model, dtype="float32")
    np.testing.assert_allclose(vectors, encoder.embed(TEXTS, "document"), atol=1e-5)
    assert (done.counts["embedded"], done.counts["shared"]) == (40, 10)
    assert vectors[40:].tobytes() == vectors[:10].tobytes()
    assert done.counts["tokens"] == sum(len(ids) for ids in encoder.tokenize(TEXTS[:40], "document"))
    assert done.manifest["details"]["index"]["recall_at_10"] == 1.0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "documents", "documents.json", "index.faiss", "index.json", "index_ids.parquet", "ledger.parquet", "manifest.json", "rows", "vectors",
    ]  # fmt: skip


@pytest.mark.ray
def test_an_interrupted_build_embeds_only_what_is_missing(ray_local, tiny_model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", TEXTS)
    whole = contents(embed(source, tmp_path / "whole", tiny_model).place.local)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    manifest = json.loads((cut / "manifest.json").read_text())
    (cut / "manifest.json").unlink()
    (cut / "_building.json").write_text(
        json.dumps({"kind": "vectors", "fingerprint": manifest["fingerprint"]})
    )
    (cut / "vectors" / "part-000001.parquet").unlink()
    (cut / "vectors" / "_tmp-1-part-000001.parquet").write_bytes(b"half")
    kept = {p.name: p.stat().st_mtime_ns for p in (cut / "vectors").glob("part-*")}
    embed(source, cut, tiny_model)
    assert contents(cut) == whole
    assert {n: (cut / "vectors" / n).stat().st_mtime_ns for n in kept} == kept


@pytest.mark.ray
def test_a_delta_run_embeds_only_new_texts_and_keeps_the_rest_bit_for_bit(ray_local, tiny_model, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    before = dict(
        zip(*read_vectors(embed(write_lines(source, TEXTS), out, tiny_model).place, "vectors"), strict=True)
    )
    changed = ["changed", *TEXTS[1:30], "new at the end"]  # d0 changed, d31 to d49 gone, d30 another text
    done = embed(write_lines(source, changed), out, tiny_model)
    assert {k: done.counts[k] for k in ("rows", "embedded", "reused", "shared", "removed")} == {
        "rows": 31, "embedded": 2, "reused": 29, "shared": 0, "removed": 19,
    }  # fmt: skip
    after = dict(zip(*read_vectors(done.place, "vectors"), strict=True))
    assert list(after) == [f"d{n}" for n in range(31)]
    assert all(after[f"d{n}"].tobytes() == before[f"d{n}"].tobytes() for n in range(1, 30))
    fresh = dict(
        zip(*read_vectors(embed(source, tmp_path / "fresh", tiny_model).place, "vectors"), strict=True)
    )
    np.testing.assert_allclose(np.stack(list(after.values())), np.stack(list(fresh.values())), atol=1e-6)
    assert not (tmp_path / "out.previous").exists()
    # From another folder, named; then of another recipe, which must not be mixed in.
    named = embed(source, tmp_path / "named", tiny_model, previous=str(out))
    assert named.counts["reused"] == 31
    with pytest.raises(DataError, match=r"previous: .*: dtype is 'float32' there, 'int8' here"):
        embed(source, tmp_path / "mixed", tiny_model, previous=str(out), dtype="int8")
    with pytest.raises(ConfigError, match="is the folder that is built"):
        embed(source, out, tiny_model, previous=str(out), dtype="int8")


@pytest.mark.ray
def test_vectors_computed_in_bfloat16_as_on_gpus_are_not_mixed_with_others(
    ray_local, tiny_model, tmp_path, capsys
):
    source, out = write_lines(tmp_path / "in.jsonl", TEXTS[:12]), tmp_path / "out"
    on_cpu = embed(source, out, tiny_model)
    assert on_cpu.manifest["details"]["recipe"]["compute_dtype"] == "float32"
    on_gpu = embed(source, out, tiny_model, compute_dtype=EmbeddingConfig().computed(1).compute_dtype)
    assert on_gpu.manifest["details"]["recipe"]["compute_dtype"] == "bfloat16"
    assert (on_gpu.counts["embedded"], on_gpu.counts["reused"]) == (12, 0)
    assert "compute_dtype is 'float32' there, 'bfloat16' here" in capsys.readouterr().err
    _, vectors = read_vectors(on_gpu.place, "vectors")
    in_half = Encoder.load(tiny_model, dtype="bfloat16").embed(TEXTS[:12], "document")
    np.testing.assert_allclose(vectors, in_half, atol=5e-3)
    exact = Encoder.load(tiny_model, dtype="float32").embed(TEXTS[:12], "document")
    assert not np.allclose(vectors, exact, atol=1e-5)


@pytest.mark.ray
@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
def test_stored_types_through_the_command(ray_local, tiny_model, tmp_path, dtype):
    source = write_lines(tmp_path / "in.jsonl", TEXTS[:12])
    done = embed(source, tmp_path / "out", tiny_model, dtype=dtype, dimensions=16, allow_truncation=True)
    _, vectors = read_vectors(done.place, "vectors")
    whole = Encoder.load(tiny_model, dtype="float32").embed(TEXTS[:12], "document")[:, :16]
    cosines = (vectors * whole).sum(axis=1) / np.linalg.norm(whole, axis=1) / np.linalg.norm(vectors, axis=1)
    assert cosines.min() > (0.5 if dtype == "binary" else 0.999)
    schema, _ = done.place.parquet_footer("vectors/part-000000.parquet")
    assert (schema.metadata[b"dtype"], schema.metadata[b"dimension"]) == (dtype.encode(), b"16")


def test_bad_input_is_refused_before_anything_starts(tiny_model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", TEXTS)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="does not exist or holds no such file"):
        embed(tmp_path / "nowhere", out, tiny_model)
    with pytest.raises(DataError, match=r"--model: './nowhere' does not exist"):
        embed(source, out, "./nowhere")
    assert not out.exists()


@pytest.mark.ray
def test_what_does_not_fit_the_model_is_refused(ray_local, tiny_model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(ConfigError, match="the model does not say it was trained for any"):
        embed(source, tmp_path / "a", tiny_model, dimensions=16)
    with pytest.raises(ConfigError, match="64 is above the 32 dimensions of the model"):
        embed(source, tmp_path / "b", tiny_model, dimensions=64, allow_truncation=True)
    trained = tmp_path / "trained"
    shutil.copytree(tiny_model, trained)
    PromptContract.load(tiny_model).model_copy(update={"matryoshka_dimensions": (8, 16)}).save(trained)
    with pytest.raises(ConfigError, match=r"embedding.dimensions: 12; allowed: 8, 16"):
        embed(source, tmp_path / "c", trained, dimensions=12)
    _, vectors = read_vectors(embed(source, tmp_path / "d", trained, dimensions=8).place, "vectors")
    assert vectors.shape == (50, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.jsonl"], "--model: needed"),
        (["in.jsonl", "--model", "m"], "--out: needed"),
        (["run.yaml", "--dtype", "int8"], "use --set embedding.dtype=int8"),
        (["in.jsonl", "--model", "m", "--out", "o", "--dtype", "int4"], "dtype: "),
        (
            ["in.jsonl", "--model", "m", "--out", "o", "--set", "shard_row=3"],
            "nearest valid key is 'shard_rows'",
        ),
    ],
)
def test_command_line_mistakes_are_named(arguments, message):
    result = CliRunner().invoke(app, ["embed", *arguments, "--cluster", str(CLUSTER)])
    assert isinstance(result.exception, UserError) and result.exception.exit_code == 2
    assert message in str(result.exception)


def test_dry_run_writes_nothing_and_ends_with_the_path(tiny_model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", TEXTS)
    arguments = [
        "embed",
        str(source),
        "--model",
        str(tiny_model),
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
    ]
    result = CliRunner().invoke(app, [*arguments, "--cluster", str(CLUSTER)])
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == str(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_prompt_of_a_model_whose_transformer_lies_in_a_folder_of_its_own_is_measured(tmp_path):
    bert = make_transformer(tmp_path / "bert", limit=300)
    folder = write_old_layout(
        tmp_path / "m", bert, **OLD["0_Transformer"], prompts={"prompts": {"query": "query " * 35}}
    )
    config = EmbeddingConfig(corpus="nowhere", model=str(folder), side="query")
    out = ArtefactWriter(Place(str(tmp_path / "out")), "vectors", "config", {}, "local")
    with pytest.raises(
        InstructionTooLong, match=r"the instruction takes 37 tokens .* leaves 3 of the limit of 40"
    ):
        embed_artefact(config, "nowhere", open_model(folder), PoolConfig(), out)


@pytest.mark.ray
def test_a_runs_dev_queries_tune_the_weight_of_hybrid_searches(ray_local, tiny_model, tmp_path):
    texts = [f"text number {n} of shelf {n % 5}" for n in range(30)]
    place = Place(str(tmp_path / "corpus"))
    writer = ArtefactWriter(place, "corpus", "c", {}, "local")
    documents = [document(f"d{n}", text) for n, text in enumerate(texts)]
    pairs = [pair(f"p{n}", f"number {n}", f"doc-d{n}") for n in range(25)]
    place.write_table("documents/train/part-000000.parquet", table_from_rows("documents", documents))
    place.write_table("pairs/dev/part-000000.parquet", table_from_rows("pairs", pairs))
    writer.commit({"rows": 30})
    done = embed(place.uri, tmp_path / "out", tiny_model, lexical={})
    facts = load_lexical(done.place).facts
    assert done.manifest["details"]["lexical"] == facts and facts["tuned_on"]["queries"] == 25
    # A word that one text alone has finds it; a tiny model of random weights finds nothing.
    assert facts["tuned_on"]["lexical"] == facts["tuned_on"]["ndcg_at_10"] == 1.0 > facts["tuned_on"]["dense"]
    assert facts["weight"] < 1
