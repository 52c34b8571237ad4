"""Files that are no whole GGUF are refused in one line, and leave nothing behind."""

import struct

import pytest

from embedloom.encoder.gguf import _begin_with_bos, _begins_texts, convert_once
from embedloom.errors import DataError
from fakes import byte_tokenizer


@pytest.mark.parametrize("content", [b"", b"no such magic" * 10, b"GGUF" + struct.pack("<IQQ", 3, 5, 7)])
def test_broken_files_are_named(tmp_path, content):
    """Empty, foreign, and cut short after a header that promises five tensors and seven keys."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.gguf: transformers cannot read this GGUF file: \S"):
        convert_once(path, tmp_path / "converted")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(("stated", "begun"), [(True, True), (False, False), (None, False)])
def test_texts_begin_with_bos_where_the_file_says_so(tmp_path, stated, begun):
    """transformers reads the token, and not that texts begin with it: Gemma 3 then wrote nonsense."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    if stated is not None:
        writer.add_add_bos_token(stated)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert _begins_texts(tmp_path / "model.gguf") == begun


def test_a_tokenizer_is_told_to_begin_with_bos_once():
    tokenizer = byte_tokenizer()
    bos, plain = tokenizer.bos_token_id, tokenizer("ab").input_ids
    assert plain[0] != bos
    for _ in range(2):
        _begin_with_bos(tokenizer)
        assert tokenizer("ab").input_ids == [bos, *plain]
    assert tokenizer("a", "b").input_ids == [bos, plain[0], bos, plain[1]]
