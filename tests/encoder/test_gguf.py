"""Files that are no whole GGUF are refused in one line, and leave nothing behind."""

import struct

import pytest

from embedloom.encoder.gguf import convert_once
from embedloom.errors import DataError


@pytest.mark.parametrize("content", [b"", b"no such magic" * 10, b"GGUF" + struct.pack("<IQQ", 3, 5, 7)])
def test_broken_files_are_named(tmp_path, content):
    """Empty, foreign, and cut short after a header that promises five tensors and seven keys."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.gguf: transformers cannot read this GGUF file: \S"):
        convert_once(path, tmp_path / "converted")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]
