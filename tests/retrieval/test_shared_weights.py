"""Weights in the object store instead of in every actor."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedloom.config.cluster import PoolConfig
from embedloom.core.storage import Place
from embedloom.encoder.backbone import DTypeName, load_backbone, placed, shared_backbone
from embedloom.encoder.model import Encoder
from embedloom.retrieval.embed import TextColumns, embed_corpus
from embedloom.retrieval.embedder import EncoderSource, SharedEncoderSource, read_stored, share_weights
from embedloom.retrieval.vector_files import read_vectors


def test_a_single_actor_loads_the_folder_itself():
    source = EncoderSource("name", Path("nowhere"))
    for pool in (PoolConfig(), PoolConfig(gpus=1)):
        assert share_weights(source, pool) is source


def stored_as(model: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The model with its weights in another type."""
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reader_of_stored_weights_reads_no_file_of_them_and_gives_the_same_vectors(
    tiny_model: Path, tmp_path: Path, stored: torch.dtype, dtype: DTypeName
):
    folder = stored_as(tiny_model, tmp_path / "model", stored)
    texts = ["open a file", "größer", "a longer text about columns of a table"]
    expected = Encoder.load(folder, dtype=dtype, device="cpu").embed(texts, "document")
    weights = read_stored(folder, None)
    assert weights.nbytes == pytest.approx(
        sum(path.stat().st_size for path in folder.glob("*.safetensors")), rel=0.2
    )
    for array in weights.arrays.values():
        array.flags.writeable = False  # as Ray maps them
    for path in folder.glob("*.safetensors"):
        path.unlink()
    found = Encoder.load(folder, dtype=dtype, device="cpu", weights=weights).embed(texts, "document")
    np.testing.assert_array_equal(found, expected)


def test_on_a_device_parameters_are_cast_and_buffers_are_not(tiny_model: Path):
    weights = read_stored(tiny_model, None)
    own = load_backbone(tiny_model, "bidirectional", torch.bfloat16)
    shared = placed(
        shared_backbone(tiny_model, "bidirectional", weights), torch.bfloat16, torch.device("cpu")
    )
    expected = {**dict(own.named_parameters()), **dict(own.named_buffers())}
    found = {**dict(shared.named_parameters()), **dict(shared.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.ray
def test_actors_over_shared_weights_give_the_vectors_of_a_loaded_encoder(
    ray_local, tiny_model: Path, tmp_path: Path
):
    source = EncoderSource("tiny", tiny_model, dtype="float32")
    pool = PoolConfig(min_actors=2, max_actors=2)
    shared = share_weights(source, pool)
    assert isinstance(shared, SharedEncoderSource)
    texts = [f"text number {number % 9} of some length" for number in range(24)]
    expected = Encoder.load(tiny_model, threads=1, dtype="float32").embed(texts, "document")
    # One shard a call, so that batches, and with them the order of sums, are those of the one call above.
    here, _ = shared.open().embed(texts, "document", ["retrieval"] * 24, [None] * 24)
    np.testing.assert_array_equal(here, expected)

    place = Place(str(tmp_path))
    ids = [f"t{number:02d}" for number in range(24)]
    place.write_table("texts/part-000000.parquet", pa.table({"id": ids, "text": texts}))
    embed_corpus(
        stage="embed", source=place, source_folder="texts", output=place, done_folder="vectors", model=source,
        side="document", pool=pool, shard_rows=6, columns=TextColumns(texts=("text",)),
    )  # fmt: skip
    found, vectors = read_vectors(place, "vectors")
    assert found == ids
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
