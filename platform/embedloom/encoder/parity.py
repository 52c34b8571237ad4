"""Whether a saved model gives the trained vectors in every program that reads it: measured on golden texts, else by rules."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.initialization import no_init_weights

from embedloom.config.training import PARITY_READERS
from embedloom.core.progress import note
from embedloom.core.prompting import POOLINGS, PromptContract, Side
from embedloom.encoder.backbone import attention_kernel, is_decoder, read_config
from embedloom.encoder.model import Encoder, Vectors, pool
from embedloom.encoder.vllm_reader import read_with_vllm
from embedloom.errors import StageError

# Which programs give the trained vectors of a model folder: measured where a reader was asked, else by its rules.
#
# The rules of vLLM (0.32) and text-embeddings-inference (TEI) are read from their sources. vLLM is run where
# ``training.parity`` names it; TEI, written in Rust, never was. ``docs/models.md`` tells for each cell which it is.


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
        "vllm": _vllm_verdict(config, contract),
        "tei": _tei_verdict(config, contract, flags),
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


def _vllm_verdict(config: Any, contract: PromptContract) -> Verdict:
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


def _tei_verdict(config: Any, contract: PromptContract, flags: Mapping[str, Any]) -> Verdict:
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


# Whether a saved model is the trained one in every reader: golden vectors, and a diagnosis where they differ.
#
# The trainer embeds a few fixed texts with the weights it holds, cast to float32 once. After export, our own encoder,
# transformers and sentence-transformers read the folder and embed the same texts in float32; a reader that is off would
# serve another model. What bfloat16 does to the vectors is another question: it grows with the layers (a correct 30-layer
# SmolLM2 trained in bfloat16 comes to cosine 0.9987), so it is measured, reported and warned about, but fails no run.


GOLDEN_FILE = "_golden.json"
# Lowest cosine allowed between golden vectors and a reader's or replica's, by the coarser of the two compute types.
# Float32 against float32 differs by 1e-6; another pooling, mask or weight is below 0.99 on some golden text.
MIN_COSINE = {"float32": 0.9999, "bfloat16": 0.99}
# Text, side and task; None: the contract's default, what a request gets that says nothing but its side.
GOLDEN_TEXTS: tuple[tuple[str, Side, str | None], ...] = (
    ("How do I merge two sorted lists?", "query", None),
    ("Merge them by comparing their first elements again and again.", "document", None),
    ("größer, 日本語, émigré, Ω", "query", "sts"),
    ("I want my money back", "query", "classification"),
    ("refund", "document", "classification"),
    ("a", "document", "retrieval"),
    ("Paris is the capital of France. " * 40, "document", "retrieval"),
)

Embedded = tuple[list[list[int]], Vectors]  # token ids and vectors of the golden texts


def golden_texts(contract: PromptContract) -> list[str]:
    """The golden texts as the contract formats them."""
    return [contract.format(text, side, task_type) for text, side, task_type in GOLDEN_TEXTS]


def embed_golden(encoder: Encoder) -> Embedded:
    """Token ids and vectors of the golden texts in the encoder's dtype; under ZeRO-3, all workers must call it together."""
    # Readers are compared by them, so it does not matter what the limit leaves of a text.
    ids = [encoder.tokenize_probe(text, side, task_type) for text, side, task_type in GOLDEN_TEXTS]
    training = encoder.backbone.training
    encoder.backbone.eval()
    with torch.no_grad():
        # One by one: what a text's neighbours do to it is another question.
        vectors = torch.cat([encoder.forward([own]) for own in ids]).float().cpu().numpy()
    encoder.backbone.train(training)
    return ids, vectors


def exact_golden(encoder: Encoder, backbone: Any) -> Embedded:
    """Token ids and vectors of the golden texts by a float32 copy of the backbone on CPU: 4 bytes a weight of host memory.

    Args:
        encoder: gives tokenizer and contract.
        backbone: plain weights in memory (adapters merged, ZeRO-3 parts gathered), of any dtype on any device.
    """
    with no_init_weights():  # every parameter is replaced below; at 8B drawing them takes minutes
        config = copy.deepcopy(backbone.config)
        config._attn_implementation = attention_kernel(
            config
        )  # not the packed one, which the encoder registers
        twin = type(backbone)(config).float()
    weights = {
        name: tensor.detach().to("cpu", torch.float32) for name, tensor in backbone.state_dict().items()
    }
    twin.load_state_dict(weights, assign=True)
    return embed_golden(Encoder(twin.eval(), encoder.tokenizer, encoder.contract, torch.float32))


def save_golden(
    golden: Embedded, folder: Path, trained: Embedded | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write golden vectors beside the weights.

    Args:
        golden: computed in float32.
        folder: of the model.
        trained: what the trainer computes in ``dtype``; how far it is from ``golden`` is written too.
        dtype: that the trainer computes in.
    """
    content: dict[str, Any] = {"dtype": "float32", "ids": golden[0], "vectors": golden[1].tolist()}
    if trained is not None:
        content["trained"] = {
            "dtype": str(dtype).removeprefix("torch."),
            "cosine": round(lowest_cosine(golden[1], trained[1]), 7),
        }
    (folder / GOLDEN_FILE).write_text(json.dumps(content) + "\n")


def check_export(folder: Path, readers: Sequence[str] = PARITY_READERS) -> dict[str, float]:
    """Lowest cosine between the trainer's golden vectors and those of each reader of the folder.

    Args:
        folder: a model folder with golden vectors.
        readers: which to ask, by the names of ``training.parity``.

    Returns:
        By reader; under ``trainer (bfloat16)``, or whatever it computes in, the trainer's own lowest cosine to its
        weights in float32, where the folder holds it.

    Raises:
        StageError: a reader is below the limit, or a trainer in float32 does not compute what its weights say; the
            message says by how much and, where it can be told, why.
    """
    content = json.loads((folder / GOLDEN_FILE).read_text())
    expected: Embedded = content["ids"], np.asarray(content["vectors"], dtype=np.float32)
    limit = MIN_COSINE[content["dtype"]]
    found: dict[str, float] = {}
    for name in readers:
        seen = _READERS[name](folder)
        found[name] = lowest_cosine(seen[1], expected[1])
        if not found[name] >= limit or seen[0] != expected[0]:
            raise StageError(
                f"{folder}: {name} reads another model than was trained: lowest cosine {found[name]:.6f} over {len(expected[0])} "
                f"golden texts, allowed {limit} or more; {_cause(folder, seen, expected, limit)}"
            )
    return {name: round(cosine, 7) for name, cosine in found.items()} | _trainer_noise(folder, content)


def _trainer_noise(folder: Path, content: dict[str, Any]) -> dict[str, float]:
    """How far the trainer's own arithmetic is from its weights in float32: a warning, as it is what was trained with."""
    trained = content.get("trained")
    if trained is None:
        return {}
    dtype, cosine = trained["dtype"], trained["cosine"]
    if dtype == "float32" and not cosine >= MIN_COSINE["float32"]:
        raise StageError(
            f"{folder}: the trainer computes in float32 what its own weights do not give: lowest cosine {cosine:.6f}, "
            f"allowed {MIN_COSINE['float32']} or more; cause: the weights that were gathered are not those trained"
        )
    if not cosine >= MIN_COSINE["bfloat16"]:
        note("parity", f"warning: {folder.name}: {dtype} is {cosine:.4f} (lowest cosine of the golden texts) from the same "
             "weights in float32; serve it with compute_dtype: float32, or expect other scores")  # fmt: skip
    return {f"trainer ({dtype})": cosine}


def lowest_cosine(one: Vectors, other: Vectors) -> float:
    """Lowest cosine of corresponding rows."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / norms).min())


def _own(folder: Path, **changes: Any) -> Embedded:
    contract = PromptContract.load(folder).model_copy(update=changes)
    return embed_golden(Encoder.load(folder, dtype="float32", device="cpu", contract=contract))


def _transformers(folder: Path) -> Embedded:
    from transformers import AutoModel, AutoTokenizer

    contract = PromptContract.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids, vectors = [], []
    for text, (_, side, _) in zip(golden_texts(contract), GOLDEN_TEXTS, strict=True):
        batch = tokenizer([text], truncation=True, max_length=contract.max_tokens(side), return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        ids.append(batch["input_ids"][0].tolist())
        vectors.append(pool(hidden, batch["attention_mask"], contract.pooling)[0].numpy())
    return ids, np.stack(vectors)


def _sentence_transformers(folder: Path) -> Embedded:
    from sentence_transformers import SentenceTransformer

    contract = PromptContract.load(folder)
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    ids, vectors = [], []
    for text, (raw, side, task) in zip(golden_texts(contract), GOLDEN_TEXTS, strict=True):
        # One length for both sides is all this format can say; a shorter side is the caller's to cut.
        model.max_seq_length = contract.max_tokens(side)
        # By the folder's own prompts, as its users do; a template that goes on after the text is beyond them.
        by_name = task is None and contract.template.endswith("{text}")
        prompt = (model.prompts.get(side) or "") if by_name else ""
        own = raw if by_name else text
        ids.append(model.preprocess([prompt + own])["input_ids"][0].tolist())
        vectors.append(model.encode([own], prompt=prompt, convert_to_numpy=True)[0])
    return ids, np.stack(vectors).astype(np.float32)


def _read_by_vllm(folder: Path) -> Embedded:
    contract = PromptContract.load(folder)
    limits = [contract.max_tokens(side) for _, side, _ in GOLDEN_TEXTS]
    ids, vectors = read_with_vllm(folder.absolute(), golden_texts(contract), limits)
    return ids, np.asarray(vectors, dtype=np.float32)


_READERS: dict[str, Callable[[Path], Embedded]] = {
    "embedloom": _own,
    "transformers": _transformers,
    "sentence-transformers": _sentence_transformers,
    "vllm": _read_by_vllm,
}


def _cause(folder: Path, seen: Embedded, expected: Embedded, limit: float) -> str:
    """What would explain the reader's vectors, found by making our own encoder wrong in the same way."""
    for own, other in zip(seen[0], expected[0], strict=True):
        if own != other:
            size = min(len(own), len(other)) - 1  # the longer one may have been cut
            if other[1 : 1 + size] == own[:size] or own[1 : 1 + size] == other[:size]:
                return "cause: BOS (the two sides start differently)"
            if other[:-1] == own or own[:-1] == other:
                return "cause: EOS (the two sides end differently)"
            return f"cause: template or tokenizer (token ids start {own[:8]}, the trainer's {other[:8]})"
    if lowest_cosine(_own(folder)[1], seen[1]) >= limit:
        return "cause: weights (all readers of the folder would agree, so it was saved with other ones)"
    contract = PromptContract.load(folder)
    trials: dict[str, Callable[[], Embedded]] = {
        f"pooling (it pools by {mode}, trained was {contract.pooling})": partial(_own, folder, pooling=mode)
        for mode in POOLINGS
        if mode != contract.pooling
    }
    if is_decoder(Encoder.load(folder, dtype="float32", device="cpu").backbone.config):
        flipped = "causal" if contract.attention == "bidirectional" else "bidirectional"
        trials[f"mask (it attends {flipped}ly, trained was {contract.attention})"] = partial(
            _own, folder, attention=flipped
        )
        trials["rope (it turns without the scaling or base of the config)"] = partial(_plain_rope, folder)
    for name, trial in trials.items():
        if lowest_cosine(trial()[1], seen[1]) >= limit:
            return f"cause: {name}"
    return "cause unknown: token ids agree, and neither weights, pooling, mask nor rope explain it"


def _plain_rope(folder: Path) -> Embedded:
    encoder = Encoder.load(folder, dtype="float32", device="cpu")
    rotary = getattr(encoder.backbone, "rotary_emb", None)
    if rotary is not None:
        steps = torch.arange(rotary.inv_freq.shape[0], dtype=torch.float32) / rotary.inv_freq.shape[0]
        rotary.inv_freq.copy_(10_000.0**-steps)
    return embed_golden(encoder)
