"""A sentence-transformers model whose transformer is computed by code that lies beside its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fakes_foreign import SIZES, word_tokenizer, write, write_old_layout

CODE = """
import os
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

if "OWN_CODE_RAN" in os.environ:
    open(os.environ["OWN_CODE_RAN"], "a").close()

class OwnConfig(PretrainedConfig):
    model_type = "own_model"

    def __init__(self, vocab_size=77, hidden_size=32, twist=1.0, **kwargs):
        self.vocab_size, self.hidden_size, self.twist = vocab_size, hidden_size, twist
        super().__init__(**kwargs)

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = self.embeddings(input_ids)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return BaseModelOutput(last_hidden_state=torch.tanh(self.mix(states + self.config.twist * mean)))
"""
MODULE = """
import torch

class Flipped(torch.nn.Module):
    def forward(self, features, **kwargs):
        features["sentence_embedding"] = features["sentence_embedding"].flip(-1)
        return features

    def save(self, output_path, *args, **kwargs):
        pass

    @classmethod
    def load(cls, *args, **kwargs):
        return cls()
"""


def own_code_model(folder: Path, **settings: Any) -> Path:
    """Mean over the states of ``OwnModel``, with a prompt for queries and a limit of 40 tokens."""
    bare = folder.with_name(folder.name + "-bare")
    bare.mkdir()
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    sizes = {
        "vocab_size": SIZES["vocab_size"],
        "hidden_size": 32,
        "max_position_embeddings": 512,
        "twist": 0.7,
    }
    described = {
        "model_type": "own_model",
        "architectures": ["OwnModel"],
        "auto_map": auto_map,
        **sizes,
        **settings,
    }
    write(bare / "config.json", described)
    (bare / "modeling_own.py").write_text(CODE)
    torch.manual_seed(5)
    weights = {
        "embeddings.weight": torch.randn(sizes["vocab_size"], 32), "mix.weight": torch.randn(32, 32) / 4,
        "mix.bias": torch.randn(32),
    }  # fmt: skip
    save_file(weights, bare / "model.safetensors", {"format": "pt"})
    word_tokenizer().save_pretrained(bare)
    prompts = {"prompts": {"query": "query : ", "document": ""}, "default_prompt_name": None}
    mean = {"pooling_mode_mean_tokens": True}
    return write_old_layout(folder, bare, mean, settings={"max_seq_length": 40}, prompts=prompts)


def with_own_module(folder: Path) -> Path:
    """The same with a module class of its own behind the pooling."""
    modules = json.loads((folder / "modules.json").read_text())
    write(
        folder / "modules.json",
        [*modules, {"idx": 2, "name": "2", "path": "2_Flipped", "type": "own_module.Flipped"}],
    )
    (folder / "2_Flipped").mkdir()
    (folder / "own_module.py").write_text(MODULE)
    return folder
