"""Files and folders have the permissions that the umask says, whichever library wrote them."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedloom.config.merging import MergingConfig
from embedloom.core.storage import Place, apply_umask
from embedloom.encoder import gguf
from embedloom.encoder.export import save_model
from embedloom.encoder.model import Encoder
from embedloom.retrieval import index
from fakes_merging import merge, variant, writer


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Path and mode of what POSIX's rule (0666 or 0777 less the umask) does not give."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            found[str(path.relative_to(folder))] = oct(mode)
    return found


def test_a_saved_model(tiny_model, tmp_path, umask):
    encoder = Encoder.load(tiny_model)
    out = tmp_path / "model"
    save_model(encoder.backbone, encoder.tokenizer, encoder.contract, out)
    assert (out / "model.safetensors").is_file()
    assert wrong_modes(out, umask) == {}


def test_a_converted_gguf(tiny_model, tmp_path, umask, monkeypatch):
    monkeypatch.setattr(
        gguf, "convert", lambda source, out: shutil.copytree(tiny_model, out, dirs_exist_ok=True)
    )
    (tmp_path / "cache").mkdir()
    folder = gguf.convert_once(tmp_path / "any.gguf", tmp_path / "cache/converted")
    assert (folder / "model.safetensors").is_file()
    assert wrong_modes(tmp_path / "cache", umask) == {}


def test_a_merged_model(tiny_model, tmp_path, umask):
    candidates = {f"c{seed}": variant(tiny_model, tmp_path / f"c{seed}", seed) for seed in range(2)}
    merge(MergingConfig(), candidates, writer(tmp_path / "merged"))
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert wrong_modes(tmp_path / "merged", umask) == {}


def test_rows_reports_and_indexes(tmp_path, umask):
    import faiss

    place = Place(str(tmp_path / "artefact"))
    place.write_table("rows/part-000000.parquet", pa.table({"id": ["a"]}))
    place.write_bytes("report.html", b"<html>")
    place.write_json("manifest.json", {})
    flat = faiss.IndexFlatIP(4)
    flat.add(np.ones((1, 4), dtype=np.float32))
    index._write(flat, place)
    source = tmp_path / "made-elsewhere"
    source.write_bytes(b"whole")
    source.replace(place.local / "source")
    place.put_file(place.local / "source", "weights")
    assert len(place.files()) == 5
    assert wrong_modes(place.local, umask) == {}


def test_what_a_checkpoint_brings_along(tmp_path, umask):
    """A folder of ``mkdtemp`` with a file of ``mkstemp``, copied with its modes, as training copies a checkpoint."""
    source = Path(tempfile.mkdtemp(dir=tmp_path))
    descriptor, _ = tempfile.mkstemp(dir=source)
    os.close(descriptor)
    target = tmp_path / "target"
    shutil.copytree(source, target, dirs_exist_ok=True)
    assert len(wrong_modes(target, 0o022)) == 2  # the control: nobody but the owner may read it
    (target / "link").symlink_to(source)
    apply_umask(target)
    (target / "link").unlink()
    assert wrong_modes(target, umask) == {}
    assert stat.S_IMODE(source.stat().st_mode) == 0o700  # what a link points at is somebody else's
