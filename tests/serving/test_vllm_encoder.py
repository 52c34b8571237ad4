"""vLLM's pooling runner behind the endpoint's contract."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from embedloom.config.encoder import EncoderConfig
from embedloom.encoder.export import prepare_base
from fakes import byte_tokenizer

# In a process of its own: vLLM reads its threads from the environment when it is imported.
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from embedloom.encoder.model import Encoder
from embedloom.serving.vllm_encoder import VLLMEncoder

folder = Path(sys.argv[1])
ids = [[1, 5, 9, 200], [1, 7], list(range(3, 60))]
expected = Encoder.load(folder, dtype="float32").embed_tokens(ids)
encoder = VLLMEncoder(folder, 1, "float32", 0.0)
encoder.check()
found = encoder.embed_tokens(ids)
assert found.shape == expected.shape and found.dtype == np.float32
print("lowest", (found * expected).sum(axis=1).min())
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_gives_our_vectors(tmp_path: Path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    llama, folder = tmp_path / "llama", tmp_path / "encoder"
    LlamaForCausalLM(config).save_pretrained(llama)
    byte_tokenizer().save_pretrained(llama)
    folder.mkdir()
    prepare_base(EncoderConfig(base="tiny", max_query_tokens=96, max_document_tokens=64), llama, folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert float(run.stdout.split("lowest ")[1]) >= 0.9999
