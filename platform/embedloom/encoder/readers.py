"""Which programs give the trained vectors of a model folder: measured where a reader was asked, else by its rules.

The rules of vLLM (0.32) and text-embeddings-inference (TEI) are read from their sources. vLLM is run where
``training.parity`` names it; TEI, written in Rust, never was. ``docs/models.md`` tells for each cell which it is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from embedloom.encoder.architecture import is_decoder, read_config
from embedloom.instructions import PromptContract

READERS = ("embedloom", "transformers", "sentence-transformers", "vllm", "tei")
# Decoders whose attention vLLM opens for config.is_causal false; its own and transformers' code of others stay causal.
_VLLM_BIDIRECTIONAL = {"llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma3_text"}
_VLLM_ENCODERS = {"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert"}
_TEI_ENCODERS = {
    "bert", "distilbert", "roberta", "xlm-roberta", "camembert", "mpnet", "nomic_bert", "modernbert",
}  # fmt: skip
_TEI_DECODERS = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text"}
_PORTABLE_POOLINGS = ("mean", "cls", "last_token")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a reader makes of a model folder."""

    reader: str
    vectors: Literal["same", "expected the same", "other", "unknown"]
    why: str

    def as_json(self) -> dict[str, str]:
        """For manifests."""
        return asdict(self)


def reader_verdicts(folder: Path, measured: Mapping[str, float]) -> list[Verdict]:
    """One verdict a reader.

    Args:
        folder: a model folder with its contract.
        measured: lowest cosine to the trainer's vectors by reader, of those that were asked and passed.
    """
    contract, config = PromptContract.load(folder), read_config(folder)
    flags = json.loads((folder / "config.json").read_text())
    rules = {
        "vllm": _vllm(config, contract),
        "tei": _tei(config, contract, flags),
    }
    found = []
    for reader in READERS:
        if reader in measured:
            found.append(Verdict(reader, "same", f"measured, lowest cosine {measured[reader]:.6f}"))
        elif reader in rules:
            found.append(rules[reader])
        else:
            found.append(Verdict(reader, "expected the same", "not measured; it reads the same files"))
    return found


def _vllm(config: Any, contract: PromptContract) -> Verdict:
    kind = config.model_type
    if contract.pooling not in _PORTABLE_POOLINGS:
        return Verdict("vllm", "other", f"it has no pooling {contract.pooling}")
    if not is_decoder(config):
        if kind in _VLLM_ENCODERS:
            return Verdict("vllm", "expected the same", f"by rule: it has {kind}")
        return Verdict("vllm", "unknown", f"by rule: it has no {kind} of its own and may refuse it")
    if contract.attention == "causal":
        return Verdict("vllm", "expected the same", "by rule: causal attention is its default")
    if kind in _VLLM_BIDIRECTIONAL:
        return Verdict(
            "vllm", "expected the same", f"by rule: its {kind} follows the config to see later tokens"
        )
    return Verdict("vllm", "other", f"by rule: its {kind} stays causal")


def _tei(config: Any, contract: PromptContract, flags: Mapping[str, Any]) -> Verdict:
    kind = config.model_type
    if contract.pooling not in _PORTABLE_POOLINGS:
        return Verdict("tei", "other", f"it has no pooling {contract.pooling}")
    if kind not in _TEI_ENCODERS | _TEI_DECODERS:
        return Verdict("tei", "other", f"by rule: it does not know {kind} and refuses it")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return Verdict("tei", "other", f"by rule: it reads no rope scaling ({rope['rope_type']})")
    open_attention = kind in _TEI_DECODERS and contract.attention == "bidirectional"
    if open_attention and not flags.get("use_bidirectional_attention"):
        return Verdict("tei", "other", f"by rule: its {kind} stays causal")
    return Verdict("tei", "expected the same", f"by rule: it has {kind}; not run")


def reader_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """The section of a model card: which readers give the model's vectors."""
    return [
        "## Readers",
        "",
        "Which programs give the vectors of this folder's model.",
        "",
        "| reader | vectors | how it is known |",
        "|---|---|---|",
        *(f"| {verdict.reader} | {verdict.vectors} | {verdict.why} |" for verdict in verdicts),
    ]
