"""vLLM's pooling runner reads an export as the model that was trained, or the export is stopped."""

import importlib.util
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from embedloom.config.encoder import EncoderConfig
from embedloom.encoder.export import prepare_base
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import check_export, embed_golden, save_golden
from embedloom.encoder.vllm_reader import read_with_vllm
from embedloom.errors import StageError
from fakes import byte_tokenizer


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A tiny Llama with heads of 32, the smallest that vLLM's CPU attention takes."""
    llama, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(llama)
    byte_tokenizer().save_pretrained(llama)
    # Sides of different lengths: the longest golden text is cut at the document's.
    prepare_base(EncoderConfig(base="tiny", max_query_tokens=96, max_document_tokens=64), llama, folder)
    save_golden(embed_golden(Encoder.load(folder, dtype="float32")), folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_reads_the_trained_model(export):
    found = check_export(export, ["embedloom", "vllm"])
    assert set(found) == {"embedloom", "vllm"} and min(found.values()) > 0.9999


def test_a_vllm_that_dies_stops_the_export_and_says_so(export, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StageError, match="vllm cannot read this model: no message"):
        read_with_vllm(export, ["a"], [8])
