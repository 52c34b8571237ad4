"""Adapters sit at every linear layer of a base, GPT-2's too, and an export of them computes the same."""

import pytest
import torch

from embedloom.config.training import LoraConfig
from embedloom.encoder.backbone import load_backbone
from embedloom.training.lora import add_adapters, has_adapters, linear_names, merged_backbone
from fakes_bases import FAMILIES, make_base


@pytest.mark.parametrize(
    ("family", "names", "a_layer"),
    [
        ("GPT2", {"c_attn", "c_proj", "c_fc"}, 4),
        ("Llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 7),
    ],
)
def test_adapters_are_trained_and_merged_in_every_linear_layer(family, names, a_layer, tmp_path):
    base = make_base(tmp_path / "base", family, **FAMILIES[family])
    backbone = load_backbone(base, "bidirectional", torch.float32)
    assert linear_names(backbone) == names
    ids = torch.tensor([[5, 9, 7, 30]])
    with torch.no_grad():
        before = backbone(input_ids=ids).last_hidden_state
    add_adapters(backbone, LoraConfig(rank=2))
    assert has_adapters(backbone)
    raised = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert len([name for name in raised if "lora_B" in name]) == a_layer * 4
    assert all(".lora_" in name for name in raised)
    with torch.no_grad():
        torch.testing.assert_close(backbone(input_ids=ids).last_hidden_state, before)  # B starts at zero
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        changed = backbone(input_ids=ids).last_hidden_state
    merged_backbone(backbone).save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        merged = load_backbone(tmp_path / "merged", "bidirectional", torch.float32)(
            input_ids=ids
        ).last_hidden_state
    assert (changed - before).abs().max() > 0.01
    torch.testing.assert_close(merged, changed, atol=1e-4, rtol=1e-4)
