"""Which readers give a model's vectors: what was measured is said so, the rest by each reader's rules."""

import pytest

from embedloom.encoder.parity import READERS, reader_lines, reader_verdicts
from fakes_bases import FAMILIES, make_base, prepare


@pytest.mark.parametrize(
    ("family", "attention", "vllm", "tei"),
    [
        ("Llama", "bidirectional", "expected the same", "expected the same"),
        ("Qwen3", "bidirectional", "expected the same", "expected the same"),
        ("Gemma3Text", "bidirectional", "expected the same", "expected the same"),
        ("SmolLM3", "bidirectional", "other", "other"),
        ("SmolLM3", "causal", "expected the same", "other"),
        ("Gemma2", "bidirectional", "other", "other"),
    ],
)
def test_readers_that_were_not_asked_are_judged_by_their_rules(family, attention, vllm, tei, tmp_path):
    folder = prepare(
        make_base(tmp_path / "base", family, **FAMILIES[family]), tmp_path / "model", attention=attention
    )
    verdicts = reader_verdicts(folder, {"embedloom": 1.0, "transformers": 0.9999999})
    assert tuple(verdict.reader for verdict in verdicts) == READERS
    found = {verdict.reader: verdict.vectors for verdict in verdicts}
    assert (found["embedloom"], found["transformers"]) == ("same", "same")
    assert found["sentence-transformers"] == "expected the same"
    assert (found["vllm"], found["tei"]) == (vllm, tei)
    assert "| embedloom | same | measured, lowest cosine 1.000000 |" in reader_lines(verdicts)


def test_rope_scaling_is_what_tei_does_not_read(tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    folder = prepare(make_base(tmp_path / "base", "Llama", rope_parameters=scaled), tmp_path / "model")
    tei = reader_verdicts(folder, {})[-1]
    assert (tei.vectors, "no rope scaling (linear)" in tei.why) == ("other", True)


def test_a_measured_vllm_overrides_its_rule(tmp_path):
    folder = prepare(make_base(tmp_path / "base", "SmolLM3"), tmp_path / "model")
    assert {one.reader: one.vectors for one in reader_verdicts(folder, {"vllm": 0.99995})}["vllm"] == "same"
