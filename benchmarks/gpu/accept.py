"""Acceptance kit: proves embedloom's GPU paths on the GPU of this machine, part by part, by the product's own functions.

    python accept.py --out RESULTS [--only env,kernel,...] [--tiny]
    python accept.py --pack FOLDER [--python 3.12]

Each part runs in a process of its own with a time limit, so running out of memory is a result and not the end. It
leaves ``RESULTS/PART.json`` and ``PART.log``; ``summary.json`` and ``summary.md`` hold one table over all parts that lie
in RESULTS. Nothing is downloaded: models have random weights and a vocabulary of numbered words.

A part is

    passed    everything is right, and every aim is reached
    REFUSED   everything is right, but an aim (speed, memory) is missed
    FAILED    something is wrong, crashed or out of time
    not run   something that it needs is not there; the reason names it

``--tiny`` runs everything on the CPU with toy models, to try the kit itself; aims are then not judged. ``--pack`` writes a
folder with this file, the package and the few wheels that a bare PyTorch image lacks, to be carried to a GPU machine.
"""

import argparse
import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
# Packed: the package and its wheels lie beside this file. In the repository: two folders up.
IS_PACKED = (HERE / "embedloom").is_dir()
PACKAGE_FOLDER = HERE if IS_PACKED else HERE.parents[1] / "platform"
IMPORTED_FROM = [str(PACKAGE_FOLDER), *([str(HERE / "site")] if IS_PACKED else [])]
sys.path[:0] = IMPORTED_FROM

# What a PyTorch image with transformers and pyarrow lacks. All but pydantic-core are pure Python.
WHEELS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "hjson", "deepspeed")
PACKED_FILE = "packed.json"

EMBED_SHARE = 0.55  # of the measured bfloat16 ceiling, at 110M, 1B and 8B
TRAIN_SHARE = 0.45  # likewise, on real tokens
SEARCH_SHARE = 0.50  # likewise, with the documents on the device
MEMORY_ERROR = 0.10  # between the peak and its arithmetic
KERNEL_ERROR = 0.02  # of bfloat16 against float64, relative to the largest value
CLIENTS = 64
TINY_PATIENCE = 8  # times the limit on a CPU, which may be busy


# --- What a part finds out, and what becomes of it. ----------------------------------------------------------------


class NotHere(Exception):
    """Something that a part needs is missing on this machine; no failure of the product."""


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        name: of what, in words.
        value: what was found, as JSON has it.
        kind: ``must`` (wrong if not ok), ``aim`` (missed if not ok) or ``seen`` (reported only).
        limit: what ``must`` and ``aim`` ask for.
        ok: whether it holds; None: not judged.
    """

    name: str
    value: Any
    kind: str = "seen"
    limit: str | None = None
    ok: bool | None = None


def judge(rows: Sequence[Row], error: str = "", absent: str = "") -> tuple[str, list[str]]:
    """State of a part and its reasons; see the head of this file for the states."""
    if absent:
        return "not run", [absent]
    wrong = [f"{row.name}: {row.value}, needed {row.limit}" for row in rows if row.ok is False]
    if error:
        return "FAILED", [error, *wrong]
    if not rows:
        return "FAILED", ["it found nothing out"]
    if any(row.kind == "must" and not row.ok for row in rows):
        return "FAILED", wrong
    return ("REFUSED" if wrong else "passed"), wrong


@dataclass
class Report:
    """Rows of one part, written as they come: a part that is ended leaves what it had found."""

    file: Path
    judges_aims: bool
    rows: list[Row] = field(default_factory=list)

    def seen(self, name: str, value: Any) -> None:
        """Report a value that nothing is asked of."""
        self._add(Row(name, _plain(value)))

    def must(self, name: str, value: Any, ok: bool, limit: str) -> None:
        """Report a value that is right or wrong."""
        self._add(Row(name, _plain(value), "must", limit, bool(ok)))

    def aim(self, name: str, value: float, least: float | None = None, most: float | None = None) -> None:
        """Report a value that should reach ``least``, or stay within ``most``."""
        bounds = [f">= {least:g}"] if least is not None else []
        bounds += [f"<= {most:g}"] if most is not None else []
        ok = (least is None or value >= least) and (most is None or value <= most)
        self._add(
            Row(name, _plain(value), "aim", " and ".join(bounds), bool(ok) if self.judges_aims else None)
        )

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{row.name}: {row.value}", flush=True)
        self.file.write_text(json.dumps([vars(row) for row in self.rows]))


def _plain(value: Any) -> Any:
    """As JSON holds it; numbers to five digits, NaN and infinity as text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else str(number)


@dataclass(frozen=True)
class Kit:
    """Where a part runs."""

    device: str
    tiny: bool
    scratch: Path

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what nobody holds, and count the peak of memory anew."""
        gc.collect()
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()
        self.count_peak_anew()

    def count_peak_anew(self) -> None:
        """Forget the most memory that was held so far; of a CPU's process that cannot be forgotten."""
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def clock(self, work: Callable[[], Any], least_seconds: float = 1.0, warm: int = 2) -> float:
        """Seconds of one call: the mean over so many that they take about ``least_seconds``, at least two."""
        for _ in range(warm):
            work()
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        wanted = 0.02 if self.tiny else least_seconds
        calls = max(2, math.ceil(wanted / (time.perf_counter() - started)))
        started = time.perf_counter()
        for _ in range(calls):  # the device does not wait for Python between them
            work()
        self.wait()
        return (time.perf_counter() - started) / calls

    @functools.cached_property
    def ceiling(self) -> float:
        """FLOP/s of a large bfloat16 product on this device, which all shares are of: mean of a tenth of a second."""
        import torch

        size = 256 if self.tiny else 8192
        left, right = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        best = min(self.clock(lambda: left @ right, 0.1) for _ in range(3))
        return 2 * size**3 / best


# --- Models and texts, made here. ------------------------------------------------------------------------------------


def shape_of(name: str) -> Any:
    """Config of a model: ``8b-N`` are N layers of Llama-3.1-8B, ``1b`` is Llama-3.2-1B, ``110m`` BERT-base."""
    from transformers import BertConfig, LlamaConfig

    encoders = {"minilm": (384, 1536, 6), "110m": (768, 3072, 12)}
    if name in encoders:
        hidden, inner, layers = encoders[name]
        return BertConfig(
            vocab_size=30522, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    sizes = {"1b": (2048, 8192, 16, 32, 8, 128256)}
    kind, _, layers_of = name.partition("-")
    if kind == "tiny":
        sizes[name] = (64, 128, int(layers_of or 2), 4, 2, 512)
    if kind == "8b":
        sizes[name] = (4096, 14336, int(layers_of or 32), 32, 8, 128256)
    hidden, inner, layers, heads, kv_heads, words = sizes[name]
    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-5, rope_theta=500000.0,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config.is_causal = False
    config.use_cache = False
    return config


def make_backbone(name: str, device: str, dtype: Any, seed: int = 0) -> Any:
    """A model with random weights, made on the device."""
    import torch
    from transformers import AutoModel

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModel.from_config(shape_of(name), dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def word_tokenizer(words: int) -> Any:
    """A word, ``w17``, is a token, 17; a text starts with BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )


def contract() -> Any:
    """Mean pooling of up to 512 tokens, no instruction."""
    from embedloom.core.prompting import PLAIN_TEMPLATE, PromptContract

    return PromptContract(template=PLAIN_TEMPLATE)


def encoder_of(backbone: Any, tokenizer: Any = None) -> Any:
    """The product's encoder around a model, computing in the model's type."""
    from embedloom.encoder.model import Encoder

    dtype = next(backbone.parameters()).dtype
    return Encoder(backbone, tokenizer or SimpleNamespace(pad_token_id=0), contract(), dtype)


def write_model(kit: Kit, name: str) -> Path:
    """A model folder as the product writes it, in bfloat16."""
    import torch

    from embedloom.encoder.export import save_model

    folder = kit.scratch / f"model-{name}"
    if not folder.is_dir():
        folder.mkdir()
        backbone = make_backbone(name, kit.device, torch.bfloat16)
        save_model(backbone, word_tokenizer(backbone.config.vocab_size), contract(), folder)
        del backbone
        kit.free()
    return folder


def lengths_of(kind: str, tokens: int, rng: Any) -> list[int]:
    """Lengths of texts of so many tokens in all: ``full`` are 512 each, ``natural`` 4 to 512, about 100 in the mean."""
    if kind == "full":
        return [512] * max(1, tokens // 512)
    found: list[int] = []
    while sum(found) < tokens:
        found.append(int(min(512, max(4, rng.lognormal(4.3, 0.9)))))
    return found


def ids_of(lengths: Sequence[int], words: int, rng: Any) -> list[list[int]]:
    """Random token ids of texts of these lengths."""
    return [rng.integers(3, words, length).tolist() for length in lengths]


def text_of(ids: Sequence[int]) -> str:
    """The text that ``word_tokenizer`` makes these ids of, after its BOS."""
    return " ".join(f"w{number}" for number in ids)


def flops_of(backbone: Any, lengths: Sequence[int], passes: int) -> float:
    """FLOPs of texts: per pass 2 a weight and token, 4 l h n² of attention; embeddings are looked up, not multiplied.

    Args:
        backbone: whole, not taken apart by ZeRO-3; may be without memory.
        lengths: tokens of each text.
        passes: 1 forward, 3 a training step (a backward costs two); recomputation is not counted.
    """
    config = backbone.config
    idle = [module for module in backbone.modules() if type(module).__name__ == "Embedding"]
    idle += [backbone.pooler] if config.model_type == "bert" else []  # which mean pooling does not ask
    weights = sum(weight.numel() for weight in backbone.parameters())
    weights -= sum(weight.numel() for module in idle for weight in module.parameters())
    attention = 4.0 * config.num_hidden_layers * config.hidden_size * sum(n * n for n in lengths)
    return passes * (2.0 * weights * sum(lengths) + attention)


def lowest_cosine(one: Any, other: Any) -> float:
    """Lowest cosine of corresponding rows, in float64."""
    import numpy as np

    left, right = (np.asarray(side, dtype=np.float64) for side in (one, other))
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / norms).min())


def use_older_varlen() -> str:
    """Let the product's attention run on a torch before 2.13, whose kernel may lack arguments; says whether it had to.

    Where ``enable_gqa`` is missing, key and value heads are repeated, which is what it would compute; speeds are then
    those of more memory traffic.
    """
    from torch.nn.attention import varlen

    plain = varlen.varlen_attn
    known = set(inspect.signature(plain).parameters)
    if {"scale", "window_size", "enable_gqa"} <= known:
        return "as the product calls it"

    def shim(
        q: Any, k: Any, v: Any, *where: Any, scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if enable_gqa and "enable_gqa" not in known:
            k, v = (side.repeat_interleave(q.shape[1] // side.shape[1], dim=1) for side in (k, v))
        extra: dict[str, Any] = {"enable_gqa": enable_gqa} if "enable_gqa" in known else {}
        extra |= (
            {"window_size": window_size} if "window_size" in known else {"is_causal": window_size == (-1, 0)}
        )
        if "scale" in known:
            extra["scale"] = scale
        elif scale is not None:
            q = q * (scale * math.sqrt(q.shape[-1]))  # the kernel's own is 1 / sqrt(d)
        return plain(q, k, v, *where, **extra)

    varlen.varlen_attn = shim
    return f"through a shim, as this torch has {sorted(known)}"


# --- Parts that need neither Ray nor a second GPU. -----------------------------------------------------------------


def part_env(kit: Kit, report: Report) -> None:
    """Versions, and what the device does at best: the ceilings that all shares are of."""
    import torch

    for name in ("torch", "transformers", "numpy", "pyarrow", "deepspeed", "pydantic"):
        report.seen(name, importlib.metadata.version(name))
    import deepspeed

    name = deepspeed.get_accelerator().device_name()
    report.must("device that DeepSpeed takes", name, name == kit.device, kit.device)
    report.seen("attention kernel", use_older_varlen())
    report.seen("bf16 FLOP/s ceiling", kit.ceiling)
    size = 256 if kit.tiny else 8192
    left, right = (torch.randn(size, size, device=kit.device) for _ in range(2))
    report.seen("fp32 FLOP/s ceiling", 2 * size**3 / kit.clock(lambda: left @ right, 0.2))
    copied = torch.empty((1 if kit.tiny else 1024) * 2**20, device=kit.device)
    target = torch.empty_like(copied)
    report.seen(
        "bytes/s of a copy on the device", 8 * copied.numel() / kit.clock(lambda: target.copy_(copied), 0.2)
    )
    if kit.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        report.seen("memory in GiB", properties.total_memory / 2**30)
        report.seen("CUDA, driver", [torch.version.cuda, driver_version()])
        from embedloom.training.metrics import peak_flops

        peak = peak_flops(torch.device("cuda"), torch.bfloat16)
        report.must(
            "bf16 peak known to the product", peak, peak is not None, "a number, or no run states its MFU"
        )


def driver_version() -> str:
    """Of the NVIDIA driver, as nvidia-smi states it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


HEADS = {
    "8b": (32, 8, 128),
    "1b": (32, 8, 64),
    "110m": (12, 12, 64),
    "minilm": (12, 12, 32),
    "smollm2": (9, 3, 64),
}


def part_kernel(kit: Kit, report: Report) -> None:
    """The attention kernel against float64: forward without and with gradients, and the gradients."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    report.seen("attention kernel", use_older_varlen())
    for name, (heads, kv_heads, width) in HEADS.items():
        for kind, causal in (("full", False), ("natural", False), ("natural", True)):
            lengths = sorted(lengths_of(kind, 700 if kit.tiny else 16384, rng), reverse=True)
            case = f"{name}, {kind} lengths{', causal' if causal else ''}"
            torch.manual_seed(0)
            sides = [
                torch.randn(
                    1, count, sum(lengths), width, device=kit.device, dtype=torch.bfloat16, requires_grad=True
                )
                for count in (heads, kv_heads, kv_heads)
            ]
            check_kernel(kit, report, case, sides, lengths, causal)


def check_kernel(
    kit: Kit, report: Report, case: str, sides: list[Any], lengths: list[int], causal: bool
) -> None:
    """One case: how far the product's attention is from float64, and how fast it is beside padded attention."""
    import torch

    # Through the module, as the registered function is looked up there.
    from embedloom.encoder import attention

    groups = sides[0].shape[1] // sides[1].shape[1]
    module = SimpleNamespace(num_key_value_groups=groups, training=False, is_causal=causal)
    layout = attention.PackedLayout(lengths, causal, sides[0].device)

    def attend() -> Any:
        return attention.packed_attention(module, *sides, None, packed=layout)[0]

    out = attend()
    gradient = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, sides, gradient)]
    with torch.no_grad():
        found.append(attend())
        seconds = kit.clock(attend, 0.1)
    exact, exact_gradients = exact_attention(sides, lengths, causal, gradient)
    errors = [
        float((own.double() - right).abs().max() / right.abs().max())
        for own, right in zip(found, [exact, *exact_gradients, exact], strict=True)
    ]
    worst = max(errors) if all(map(math.isfinite, errors)) else math.nan
    report.must(f"error, {case}", worst, worst < KERNEL_ERROR, f"< {KERNEL_ERROR} of float64's largest value")
    flops = 4 * sum(n * n for n in lengths) * sides[0].shape[1] * sides[0].shape[3] / (2 if causal else 1)
    report.seen(f"share of the ceiling, {case}", flops / seconds / kit.ceiling)
    report.seen(
        f"times as fast as padded sdpa, {case}", padded_seconds(kit, sides, lengths, causal) / seconds
    )


def exact_attention(
    sides: list[Any], lengths: list[int], causal: bool, gradient: Any
) -> tuple[Any, tuple[Any, ...]]:
    """Attention text by text in float64, and its gradients: softmax(q k / sqrt(d)) v, written out."""
    import torch

    wide = [side.detach().double().requires_grad_() for side in sides]
    parts, start = [], 0
    for length in lengths:
        query, key, value = (side[0, :, start : start + length] for side in wide)
        key, value = (side.repeat_interleave(query.shape[0] // side.shape[0], dim=0) for side in (key, value))
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[2])
        if causal:
            later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        parts.append((scores.softmax(dim=-1) @ value).transpose(0, 1))
        start += length
    exact = torch.cat(parts).unsqueeze(0)
    return exact.detach(), torch.autograd.grad(exact, wide, gradient.double())


def padded_seconds(kit: Kit, sides: list[Any], lengths: list[int], causal: bool) -> float:
    """Seconds of torch's attention on the same texts, each padded to the longest."""
    import torch

    query, key, value = (
        torch.randn(
            len(lengths), side.shape[1], max(lengths), side.shape[3], device=side.device, dtype=side.dtype
        )
        for side in sides
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        return kit.clock(lambda: attend(query, key, value, is_causal=causal, enable_gqa=True), 0.1)


def part_parity(kit: Kit, report: Report) -> None:
    """The same weights in float32 on the CPU, in float32 and in bfloat16 on the device, at depth; and same bits twice."""
    import numpy as np
    import torch

    from embedloom.encoder.parity import MIN_COSINE

    use_older_varlen()
    rng = np.random.default_rng(1)
    # The 8B in float32 takes 30 GB on the device, and minutes on the CPU: there the device's own float32, which the
    # smaller ones have proven, is what bfloat16 is held against.
    for name in ("tiny", "tiny-30") if kit.tiny else ("tiny", "tiny-30", "1b", "8b"):
        by_cpu = name != "8b"
        backbone = make_backbone(name, "cpu" if by_cpu else kit.device, torch.float32)
        ids = ids_of(
            lengths_of("natural", 2000 if "tiny" in name else 6000, rng), backbone.config.vocab_size, rng
        )
        expected = encoder_of(backbone).embed_tokens(ids, 4096)
        for dtype in ("float32", "bfloat16") if by_cpu else ("bfloat16",):
            on_device = encoder_of(
                converted(backbone, kit.device, getattr(torch, dtype), in_place=not by_cpu)
            )
            found = on_device.embed_tokens(ids, 4096)
            cosine = lowest_cosine(found, expected)
            case = f"{name} in {dtype}"
            report.must(f"cosine, {case}", cosine, cosine >= MIN_COSINE[dtype], f">= {MIN_COSINE[dtype]}")
            again = on_device.embed_tokens(ids, 4096)
            report.must(
                f"same bits twice, {case}", bool((again == found).all()), (again == found).all(), "same"
            )
            alone = np.concatenate([on_device.embed_tokens([one], 4096) for one in ids[:8]])
            cosine = lowest_cosine(alone, found[:8])
            report.must(
                f"cosine alone to in company, {case}",
                cosine,
                cosine >= MIN_COSINE[dtype],
                f">= {MIN_COSINE[dtype]}",
            )
            del on_device
            kit.free()
        del backbone
        kit.free()


def converted(backbone: Any, device: str, dtype: Any, in_place: bool) -> Any:
    """A model on another device in another type; rotary frequencies stay float32, as ``from_pretrained`` keeps them."""
    import copy

    own = backbone if in_place else copy.deepcopy(backbone)
    own.set_attn_implementation("sdpa")  # as it was before the first encoder packed it
    for weight in own.parameters():
        weight.data = weight.data.to(device, dtype)
    for buffer in own.buffers():
        buffer.data = buffer.data.to(device)
    return own


def part_embed(kit: Kit, report: Report) -> None:
    """Tokens a second and share of the ceiling by model, lengths and batch; and what one forward asks of the device."""
    import numpy as np
    import torch

    report.seen("attention kernel", use_older_varlen())
    report.seen("bf16 FLOP/s ceiling", kit.ceiling)
    rng = np.random.default_rng(2)
    for name in ("tiny",) if kit.tiny else ("minilm", "110m", "1b", "8b"):
        encoder = encoder_of(make_backbone(name, kit.device, torch.bfloat16))
        words = encoder.backbone.config.vocab_size
        for kind in ("full", "natural"):
            for batch in (512,) if kit.tiny else (4096, 16384, 65536):
                # Several batches a call, as the product overlaps what surrounds them.
                lengths = lengths_of(
                    kind, batch * 2 if name in ("tiny", "8b") else max(4 * batch, 65536), rng
                )
                ids = ids_of(lengths, words, rng)
                seconds = kit.clock(functools.partial(encoder.embed_tokens, ids, batch), 0.5, 1)
                case = f"{name}, {kind} lengths, batches of {batch}"
                report.seen(f"tokens/s, {case}", sum(lengths) / seconds)
                share = flops_of(encoder.backbone, lengths, 1) / seconds / kit.ceiling
                if (batch == 65536 and name != "minilm") or kit.tiny:
                    report.aim(f"share of the ceiling, {case}", share, least=EMBED_SHARE)
                else:
                    report.seen(f"share of the ceiling, {case}", share)
        if kit.on_gpu:
            profile_forward(report, name, encoder, ids[:8])
        del encoder
        kit.free()


def profile_forward(report: Report, name: str, encoder: Any, ids: list[list[int]]) -> None:
    """Launches, copies and waits of one forward, and which kernel attends."""
    from torch.profiler import ProfilerActivity, profile

    encoder.embed_tokens(ids, 4096)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        encoder.embed_tokens(ids, 4096)
    calls = {event.key: event.count for event in trace.key_averages()}
    report.seen(
        f"calls of one forward, {name}", {k: v for k, v in calls.items() if k.startswith(("cuda", "Memcpy"))}
    )
    flash = [key for key in calls if "flash" in key.lower()]
    report.must(f"attention kernel, {name}", flash[:3], bool(flash), "a flash kernel")


def part_peer(kit: Kit, report: Report) -> None:
    """Embedding texts beside sentence-transformers on the same device: same folder, type and texts, its best batch size."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise NotHere("sentence-transformers is not installed here")
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer

    from embedloom.encoder.model import Encoder

    use_older_varlen()
    rng = np.random.default_rng(6)
    report.seen("sentence-transformers", importlib.metadata.version("sentence-transformers"))
    for name in ("tiny",) if kit.tiny else ("110m", "1b"):
        folder = write_model(kit, name)
        encoder = Encoder.load(folder, dtype="bfloat16", device=kit.device)
        peer = SentenceTransformer(
            str(folder),
            device=kit.device,
            model_kwargs={"dtype": torch.bfloat16, "attn_implementation": "sdpa"},
        )
        for kind in ("full", "natural"):
            lengths = lengths_of(kind, 1024 if kit.tiny else 2**19, rng)
            # One less: the tokenizer adds BOS.
            texts = [
                text_of(ids)
                for ids in ids_of([n - 1 for n in lengths], encoder.backbone.config.vocab_size, rng)
            ]
            compare_with_peer(kit, report, f"{name}, {kind} lengths", encoder, peer, texts)
        del encoder, peer
        kit.free()


def compare_with_peer(kit: Kit, report: Report, case: str, encoder: Any, peer: Any, texts: list[str]) -> None:
    """Rates of both sides on the same texts, tokenising included."""
    tokens = sum(map(len, encoder.tokenize(texts, "document")))
    ours = tokens / kit.clock(lambda: encoder.embed(texts, "document", max_batch_tokens=65536), 1.0, 1)
    rates = {
        size: tokens / kit.clock(lambda size=size: peer.encode(texts, batch_size=size), 0.5, 1)
        for size in ((8,) if kit.tiny else (32, 128, 512))
    }
    report.seen(f"tokens/s, {case}", ours)
    report.seen(f"tokens/s of the peer by batch size, {case}", rates)
    sample = texts[:64]
    cosine = lowest_cosine(encoder.embed(sample, "document"), peer.encode(sample, batch_size=8))
    report.must(f"cosine to the peer, {case}", cosine, cosine >= 0.99, ">= 0.99")
    report.aim(f"times the peer's rate, {case}", ours / max(rates.values()), least=1.0)


def part_search(kit: Kit, report: Report) -> None:
    """Exact top k on the device: the very bits of numpy's float64, and its share of the ceiling."""
    import numpy as np
    import torch

    from embedloom.retrieval import search

    for rows, width, asked in (
        ((20_000, 64, 200),) if kit.tiny else ((10_000_000, 384, 4096), (1_000_000, 4096, 4096))
    ):
        generator = torch.Generator(device=kit.device).manual_seed(0)
        made = torch.empty(rows, width, device=kit.device).normal_(generator=generator)
        documents = (made / made.norm(dim=1, keepdim=True)).cpu().numpy()
        del made
        kit.free()
        rng = np.random.default_rng(3)
        noise = 0.3 / math.sqrt(width) * rng.standard_normal((asked, width), dtype=np.float32)
        queries = documents[rng.integers(0, rows, asked)] + noise
        case = f"{rows:,} x {width}"
        started = time.perf_counter()
        best = search.top_k(queries, documents, 50)
        report.seen(f"seconds of top_k with its copies to the device, {case}", time.perf_counter() - started)
        right = exact_top_k(queries[:50], documents, 50)
        same = (right[0] == best.positions[:50]).all() and (right[1] == best.scores[:50]).all()
        report.must(f"positions and scores of 50 queries, {case}", bool(same), same, "the bits of float64")
        seconds, rescoring = resident_search(queries, documents)
        report.seen(f"queries/s with documents on the device, {case}", asked / seconds)
        report.seen(f"share of the time that rescores, {case}", rescoring)
        share = 2.0 * asked * rows * width / seconds / kit.ceiling
        report.aim(f"share of the ceiling, {case}", share, least=SEARCH_SHARE)
        del documents, best
        kit.free()


def exact_top_k(queries: Any, documents: Any, k: int) -> tuple[Any, Any]:
    """Positions and float32 scores by numpy: float32 nominates four times as many, float64 decides, ties by position."""
    import numpy as np

    rough = queries @ documents.T
    near = np.stack([np.argpartition(-row, 4 * k)[: 4 * k] for row in rough])
    products = documents[near].astype(np.float64) * queries[:, None].astype(np.float64)
    scores = products.sum(axis=2).astype(np.float32)
    order = np.lexsort((near, -scores), axis=-1)[:, :k]
    return np.take_along_axis(near, order, 1), np.take_along_axis(scores, order, 1)


def resident_search(queries: Any, documents: Any) -> tuple[float, float]:
    """Seconds of a search whose documents are on the device already, and the share in which pairs are rescored."""
    import numpy as np

    from embedloom.retrieval import search

    step = 2**18
    cuts = [slice(first, min(first + step, len(documents))) for first in range(0, len(documents), step)]
    blocks = [search.DocumentBlock(documents[cut], np.arange(cut.start, cut.stop)) for cut in cuts]
    spent, plain = [0.0], search.row_scores

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        found = plain(*arguments)
        spent[0] += time.perf_counter() - started
        return found

    def work() -> None:
        best = search.no_results(len(queries))
        for block in blocks:
            best = block.search(queries, 50, best)

    search.row_scores = timed
    try:
        work()
        spent[0] = 0.0
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    finally:
        search.row_scores = plain
    return seconds, spent[0] / seconds


def part_serve(kit: Kit, report: Report) -> None:
    """The serving core, without Ray and HTTP: requests a second and latency of 64 clients, and right answers."""
    import asyncio

    import torch

    report.seen("attention kernel", use_older_varlen())
    for name in ("tiny",) if kit.tiny else ("110m", "1b", "8b"):
        backbone = make_backbone(name, kit.device, torch.bfloat16)
        encoder = encoder_of(backbone, word_tokenizer(backbone.config.vocab_size))
        for batch in (4096, 16384):
            asyncio.run(serve_clients(kit, report, f"{name}, batches of {batch}", encoder, batch))
        del backbone, encoder
        kit.free()


async def serve_clients(kit: Kit, report: Report, case: str, encoder: Any, batch: int) -> None:
    """Clients that each send a short text as soon as the last one is answered."""
    import asyncio

    import numpy as np

    from embedloom.serving.messages import EncodeJob, EncodeResult, Part
    from embedloom.serving.service import BatchSettings, EncoderService

    service = EncoderService(encoder, BatchSettings(max_batch_tokens=batch, batch_wait_seconds=0.005))
    rng, times, refused = np.random.default_rng(4), [], []
    pairs: list[tuple[str, Any]] = []

    async def client(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            text = text_of(rng.integers(3, encoder.backbone.config.vocab_size, int(rng.integers(8, 64))))
            started = time.perf_counter()
            answer = await service.encode(EncodeJob((Part("query", texts=[text]),)))
            times.append(time.perf_counter() - started)
            if not isinstance(answer, EncodeResult):
                refused.append(answer.message)
            elif len(pairs) < 64:
                pairs.append((text, answer.vectors[0]))

    await client(0.2 if kit.tiny else 1.0)
    times.clear()
    started = time.perf_counter()
    await asyncio.gather(*(client(0.5 if kit.tiny else 5.0) for _ in range(CLIENTS)))
    seconds = time.perf_counter() - started
    await service.close()
    report.must(f"refused requests, {case}", refused[:1], not refused, "none")
    alone = np.concatenate([encoder.embed([text], "query") for text, _ in pairs])
    cosine = lowest_cosine(alone, [vector for _, vector in pairs])
    report.must(f"cosine of answers to the encoder alone, {case}", cosine, cosine >= 0.99, ">= 0.99")
    report.seen(f"requests/s of {CLIENTS} clients, {case}", len(times) / seconds)
    report.seen(f"p50 and p99 in ms, {case}", [1e3 * float(np.quantile(times, q)) for q in (0.5, 0.99)])


# --- Training: the product's own step over prepared data, in a process group of this process alone. ------------------


@contextlib.contextmanager
def process_group(kit: Kit, rank: int = 0, ranks: int = 1) -> Iterator[None]:
    """The group of workers that Ray Train would set up."""
    import torch.distributed as dist

    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29591",
        LOCAL_RANK=str(rank),
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
    )
    store = dist.FileStore(str(kit.scratch / f"group-{ranks}"), ranks)
    dist.init_process_group("nccl" if kit.on_gpu else "gloo", store=store, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def write_pairs(file: Path, rows: int, negatives: int, words: int, lengths: Sequence[int]) -> None:
    """Learnable examples as JSON lines: a topic has words of its own for queries and others for documents.

    A model that knows nothing cannot tell the positive from the negatives, which are other topics' documents.
    """
    import numpy as np

    rng = np.random.default_rng(5)
    topics, each = 16, (words - 3) // 32
    of_topic = (3 + rng.permutation(32 * each)).reshape(2, topics, each)[:, :, :32]
    turn = iter(np.resize(np.asarray(lengths), rows * (2 + negatives)))

    def text(side: int, topic: int) -> str:
        own = of_topic[side, topic % topics]
        return text_of(own[rng.integers(0, len(own), int(next(turn)) - 1)])  # BOS is the one more

    with file.open("w") as stream:
        for topic in rng.integers(0, topics, rows):
            row = {"anchor": text(0, topic), "positive": text(1, topic)}
            row |= {f"negative_{number}": text(1, topic + number) for number in range(1, 1 + negatives)}
            stream.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Run:
    """One training: which model, on what, and how."""

    model: str
    queries: int  # a step
    lengths: tuple[int, ...]  # of the texts, in turn
    negatives: int = 1
    zero_stage: int = 2
    recompute: bool = False
    micro_batch_tokens: int = 16384
    steps: int = 40
    learning_rate: float = 1e-4
    temperature: float = 0.02  # the recipe's
    reduction: str | None = (
        None  # of gradients over several ranks: step, micro_batch; None: the product's choice
    )

    @property
    def rows(self) -> int:
        """Of its data: four steps without a row twice."""
        return 4 * self.queries

    @property
    def step_lengths(self) -> list[int]:
        """Tokens of the texts of four steps."""
        texts = self.rows * (2 + self.negatives)
        return [self.lengths[number % len(self.lengths)] for number in range(texts)]

    @property
    def identity(self) -> str:
        """Of its data; the same in every process."""
        content = json.dumps([self.model, self.rows, self.negatives, self.lengths])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """For rows."""
        kind = f"{self.lengths[0]} tokens" if len(set(self.lengths)) == 1 else "natural lengths"
        return f"{self.model}, ZeRO-{self.zero_stage}, {kind}, {self.negatives} negatives" + (
            ", recomputing" if self.recompute else ""
        )


# Some micro-batches a step; a toy needs a high rate, and a temperature at which its loss is smooth.
TINY_RUN = Run("tiny", 16, (24,), micro_batch_tokens=256, steps=20, learning_rate=5e-3, temperature=0.1)


def loop_of(kit: Kit, run: Run) -> Any:
    """The product's config of a worker; model and token ids are written where they are not there yet."""
    from embedloom.config.cluster import TrainingGroup
    from embedloom.config.training import TrainingConfig, TrainingSource, TrainingStage
    from embedloom.core.storage import Place
    from embedloom.training.data import prepare_sources
    from embedloom.training.loop import LoopConfig

    model = write_model(kit, run.model)
    file = kit.scratch / f"pairs-{run.identity}.jsonl"
    if not file.is_file():
        write_pairs(file, run.rows, run.negatives, shape_of(run.model).vocab_size, run.lengths)
    source = TrainingSource(name="s", format="sentence_transformers", path=str(file))
    stage = TrainingStage(
        name="t", negatives=run.negatives, global_batch=run.queries, learning_rate=run.learning_rate,
        max_steps=run.steps, warmup_steps=2, sources=(source,),
    )  # fmt: skip
    training = TrainingConfig(
        runs=[{"name": "a", "seed": 0}], stages=[stage], trackers=(), zero_stage=run.zero_stage,
        gradient_checkpointing=run.recompute, micro_batch_tokens=run.micro_batch_tokens, temperature=run.temperature,
    )  # fmt: skip
    data = Place(str(kit.scratch / "data"))
    prepared = prepare_sources("accept", training, run.negatives, (source,), None, model, data)
    return LoopConfig(
        label="accept", training=training, stage=stage, sources=(source,), seed=0, learning_rate_scale=1.0,
        dtype="bfloat16", start_model=model, data=data,
        folders={name: index["folder"] for name, index in prepared.items()}, logs=Place(str(kit.scratch)),
        threads=1, group=TrainingGroup(bf16_weights=True, gradient_reduction=run.reduction),  # as on a GPU, on the CPU too
    )  # fmt: skip


@contextlib.contextmanager
def trainer_of(kit: Kit, run: Run, rank: int = 0, ranks: int = 1) -> Iterator[Any]:
    """A trainer whose memory is given back afterwards."""
    from embedloom.training.loop import StageTrainer

    trainer = StageTrainer(loop_of(kit, run), rank, ranks)
    try:
        yield trainer
    finally:
        trainer.engine.destroy()
        del trainer
        kit.free()


def part_train(kit: Kit, report: Report) -> None:
    """The product's step with its real loss: share of the ceiling on real tokens, and that it learns, by ZeRO stage."""
    import numpy as np

    report.seen("attention kernel", use_older_varlen())
    report.seen("bf16 FLOP/s ceiling", kit.ceiling)
    first: tuple[list[float], list[float]] | None = (
        None  # of the first run: what every ZeRO stage must repeat
    )
    with process_group(kit):
        for run in train_runs(kit, np.random.default_rng(7)):
            with trainer_of(kit, run) as trainer:
                records = [trainer.train_step()[0] for _ in range(12 if kit.tiny else 25)]
            losses = [record.loss for record in records]
            report.seen(f"losses, {run.name}", losses)
            norms = [record.grad_norm for record in records]
            report.seen(f"gradient norms, {run.name}", norms)
            late, early = statistics.median(losses[-4:]), losses[0]
            report.must(
                f"loss at the end, {run.name}", late, late < 0.7 * early, f"< 0.7 of {early:.4g} at the start"
            )
            if (run.negatives, len(set(run.lengths))) == (1, 1):
                first = first or (losses[:3], norms[:3])
                report_same(report, f"first losses off those of ZeRO-1, {run.name}", losses[:3], first[0])
                # AdamW would hide a wrong scale from the losses.
                report_same(
                    report, f"first gradient norms off those of ZeRO-1, {run.name}", norms[:3], first[1]
                )
            report_step(kit, report, run, records[3:])


def report_step(kit: Kit, report: Report, run: Run, records: list[Any]) -> None:
    """Speed and memory of a run's steps; the FLOPs are those of its lengths, the tokens those that it counted."""
    seconds = statistics.median(record.seconds for record in records)
    tokens = statistics.mean(record.tokens for record in records)
    report.seen(f"real tokens/s, {run.name}", tokens / seconds)
    flops = flops_of(make_backbone(run.model, "meta", None), run.step_lengths, 3) / 4
    share = flops / seconds / kit.ceiling
    if run.recompute:
        report.seen(f"share of the ceiling, recomputation not counted, {run.name}", share)
    else:
        report.aim(f"share of the ceiling, {run.name}", share, least=TRAIN_SHARE)
    report.seen(f"peak in MiB, {run.name}", records[-1].memory_mib)


def train_runs(kit: Kit, rng: Any) -> list[Run]:
    """What is trained."""
    if kit.tiny:
        return [replace(TINY_RUN, zero_stage=stage) for stage in (1, 2, 3)]
    return [
        *(Run("1b", 32, (512,), zero_stage=stage) for stage in (1, 2, 3)),
        Run("1b", 128, tuple(lengths_of("natural", 200_000, rng))),
        Run("1b", 32, (512,), negatives=4, recompute=True),
    ]


def part_memory(kit: Kit, report: Report) -> None:
    """Peak memory of N layers of the 8B by micro-batch, against the arithmetic; and what it says of 32 layers on 64 GPUs."""
    report.seen("attention kernel", use_older_varlen())
    cases = [
        (4, 8192, True),
        (4, 32768, True),
        (8, 8192, True),
        (8, 16384, True),
        (8, 32768, True),
        (8, 49152, True),
    ]
    cases += [(8, 6144, False), (4, 6144, False)]
    measured = []
    with process_group(kit):
        for layers, tokens, recompute in [(2, 240, True), (2, 240, False)] if kit.tiny else cases:
            run = Run(
                "tiny" if kit.tiny else f"8b-{layers}", 2 if kit.tiny else tokens // 512 // 3,
                (40,) if kit.tiny else (512,), recompute=recompute, micro_batch_tokens=10**9, steps=10,
            )  # fmt: skip
            measured.append(measure_memory(kit, report, run))
    for name, tokens in [("tiny", 512)] if kit.tiny else [("8b-8", 16384), ("8b-8", 65536), ("1b", 65536)]:
        measure_inference(kit, report, name, tokens)
    if not kit.tiny:
        forecast(report, measured, loop_of(kit, Run("8b-8", 8, (512,), recompute=True)))


def measure_memory(kit: Kit, report: Report, run: Run) -> tuple[int, int, int, float, bool]:
    """Layers, tokens, weights, peak in bytes and whether it recomputes, of one run of three steps."""
    kit.free()
    left_over = allocated(kit)
    with trainer_of(kit, run) as trainer:
        records = [trainer.train_step()[0]]
        kit.count_peak_anew()  # loading and the making of states have peaks of their own
        records += [trainer.train_step()[0] for _ in range(2)]
    backbone = make_backbone(run.model, "meta", None)
    weights = sum(weight.numel() for weight in backbone.parameters())
    tokens, layers = records[-1].tokens, backbone.config.num_hidden_layers
    peak = records[-1].memory_mib * 2.0**20 - left_over
    case = f"{layers} layers, {tokens} tokens{', recomputing' if run.recompute else ''}"
    losses = [record.loss for record in records]
    report.must(f"losses, {case}", losses, all(map(math.isfinite, losses)), "numbers")
    report.seen(f"peak in GiB, {case}", peak / 2**30)
    report.seen(f"peak in GiB up to the first step, {case}", records[0].memory_mib / 2**10)
    report.seen(f"seconds a step, {case}", records[-1].seconds)
    share = peak / planned_bytes(loop_of(kit, run), backbone, tokens)
    report.aim(f"peak by the plan's arithmetic, {case}", share, 1 - MEMORY_ERROR, 1 + MEMORY_ERROR)
    return layers, tokens, weights, peak, run.recompute


def allocated(kit: Kit) -> int:
    """Bytes that tensors hold on the device."""
    import torch

    return torch.cuda.memory_allocated() if kit.on_gpu else 0


def planned_bytes(loop: Any, backbone: Any, tokens: int, workers: int = 1) -> float:
    """What tensors should take on each GPU for a micro-batch of so many tokens, by the product's own arithmetic.

    Without CUDA's context, which no tensor holds.
    """
    from embedloom.core.memory import training_memory
    from embedloom.training import model

    trainer = model.trainer_of(loop.training, loop.stage, loop.group, backbone, True, workers)
    memory = training_memory(model.shape_of(backbone), trainer, tokens)
    return memory.total - memory.fixed["CUDA and NCCL"]


def forecast(report: Report, measured: Sequence[tuple[int, int, int, float, bool]], loop: Any) -> None:
    """Peak of all 32 layers on 64 ranks of ZeRO-2, by a fit of what lies beyond weights, gradients and states."""
    import numpy as np

    kept = [
        (layers, tokens, weights, peak) for layers, tokens, weights, peak, recompute in measured if recompute
    ]
    terms = [[1.0, layers * tokens / 1e6, tokens / 1e4, weights / 1e9] for layers, tokens, weights, _ in kept]
    beyond = [(peak - 18 * weights) / 2**30 for _, _, weights, peak in kept]
    fit, *_ = np.linalg.lstsq(np.array(terms), np.array(beyond), rcond=None)
    report.seen("GiB: constant, by 1e6 layers x tokens, by 1e4 tokens, by 1e9 weights", fit.tolist())
    whole = make_backbone("8b", "meta", None)
    weights = sum(weight.numel() for weight in whole.parameters())
    for tokens in (16384, 49152):
        # What grows with the weights is made at the step, of a rank's 64th.
        more = fit[0] + fit[1] * 32 * tokens / 1e6 + fit[2] * tokens / 1e4 + fit[3] * weights / 1e9 / 64
        total = more + weights * (2 + 16 / 64) / 2**30
        case = f"32 layers on 64 GPUs, {tokens} tokens a rank"
        report.seen(f"GiB by the plan's arithmetic, {case}", planned_bytes(loop, whole, tokens, 64) / 2**30)
        report.aim(
            f"GiB forecast from the fit, {case}", total, most=69.0
        )  # of an A100's 80 GB, with 3 for CUDA and NCCL


def measure_inference(kit: Kit, report: Report, name: str, tokens: int) -> None:
    """Peak of embedding one batch of so many tokens, against the plan's arithmetic."""
    import numpy as np
    import torch

    from embedloom.core.memory import inference_memory
    from embedloom.training.model import shape_of as shape_of_memory

    kit.free()
    left_over = allocated(kit)
    encoder = encoder_of(make_backbone(name, kit.device, torch.bfloat16))
    ids = ids_of(
        lengths_of("full", tokens, np.random.default_rng(10)),
        encoder.backbone.config.vocab_size,
        np.random.default_rng(11),
    )
    kit.free()
    encoder.embed_tokens(ids, tokens)
    if kit.on_gpu:
        peak = torch.cuda.max_memory_allocated() - left_over
        memory = inference_memory(shape_of_memory(encoder.backbone), "bfloat16", tokens)
        case = f"embedding {tokens} tokens with {name}"
        report.seen(f"peak in GiB, {case}", peak / 2**30)
        share = peak / (memory.total - memory.fixed["CUDA"])
        report.aim(f"peak by the plan's arithmetic, {case}", share, 1 - MEMORY_ERROR, 1 + MEMORY_ERROR)
    del encoder
    kit.free()


def part_resume(kit: Kit, report: Report) -> None:
    """A checkpoint read by a fresh engine goes on with the losses of a run that was never interrupted."""
    from embedloom.training.checkpoints import save_checkpoint

    use_older_varlen()
    with process_group(kit):
        for zero_stage in (2, 3):
            run = TINY_RUN if kit.tiny else Run("8b-2", 8, (128,), micro_batch_tokens=512, steps=10)
            run = replace(run, zero_stage=zero_stage)
            with trainer_of(kit, run) as whole:
                expected = [whole.train_step()[0].loss for _ in range(4)]
            with tempfile.TemporaryDirectory(dir=kit.scratch) as folder:
                with trainer_of(kit, run) as first:
                    records = [first.train_step()[0] for _ in range(2)]
                    save_checkpoint(first.engine, Path(folder), first._state(), records)
                with trainer_of(kit, run) as second:
                    second.resume(Path(folder))
                    later = [second.train_step()[0].loss for _ in range(2)]
            off = max(abs(own - right) / abs(right) for own, right in zip(later, expected[2:], strict=True))
            report.seen(f"losses, undisturbed and resumed, ZeRO-{zero_stage}", [expected, later])
            report.must(f"losses off, ZeRO-{zero_stage}", off, off < 0.01, "< 0.01 relative")


# --- Several GPUs of one machine. ----------------------------------------------------------------------------------


# When gradients are reduced, and whether beside the backward pass.
MODES = {
    "once a step": ("step", False),
    "each micro-batch": ("micro_batch", False),
    "each micro-batch, overlapped": ("micro_batch", True),
}


def part_ranks(kit: Kit, report: Report) -> None:
    """Two ranks: speed of a reduction, and ZeRO-2 with and without overlap against one rank."""
    import torch

    if kit.on_gpu and torch.cuda.device_count() < 2:
        raise NotHere(f"{torch.cuda.device_count()} GPU here, two are needed: NCCL refuses two ranks on one")
    run = Run("1b", 64, (512,), steps=10)
    if kit.tiny:
        run = TINY_RUN
    loop_of(kit, run)  # model and token ids, before there are two to write them
    alone, both = (_spawned(kit, run, count) for count in (1, 2))
    report.seen("bytes/s of an all-reduce over two ranks, by bytes", both["reduce"])
    for mode in MODES:
        one, two = alone[mode], both[mode]
        report.seen(f"losses of one and two ranks, {mode}", [one["losses"], two["losses"]])
        report_same(report, f"losses of two ranks off those of one, {mode}", two["losses"], one["losses"])
        # AdamW would hide a wrong scale from the losses.
        report_same(
            report, f"gradient norms of two ranks off those of one, {mode}", two["norms"], one["norms"]
        )
        report.seen(f"seconds a step of one and two ranks, {mode}", [one["seconds"], two["seconds"]])


def report_same(report: Report, name: str, found: Sequence[float], right: Sequence[float]) -> None:
    """Curves of the same steps, computed in another order: largest difference by the largest value."""
    largest = max(map(abs, right))
    off = max(abs(own - other) / largest for own, other in zip(found, right, strict=True))
    report.must(name, off, off < 0.02, "< 0.02 of the largest")


def _spawned(kit: Kit, run: Run, ranks: int) -> dict[str, Any]:
    """What rank 0 of a group found."""
    from torch import multiprocessing

    out = kit.scratch / f"ranks-{ranks}.json"
    multiprocessing.spawn(_rank, args=(kit, run, ranks, out), nprocs=ranks)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _rank(rank: int, kit: Kit, run: Run, ranks: int, out: Path) -> None:
    """One process of the group."""
    import torch

    use_older_varlen()
    if kit.on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    with process_group(kit, rank, ranks):
        found: dict[str, Any] = {"reduce": reduce_rates(kit, ranks)}
        for mode, (reduction, overlap) in MODES.items():
            own = replace(run, reduction=reduction)
            with overlapping(overlap), trainer_of(kit, own, rank, ranks) as trainer:
                records = [trainer.train_step()[0] for _ in range(4)]
            found[mode] = {
                "losses": [record.loss for record in records],
                "norms": [record.grad_norm for record in records],
                "seconds": statistics.median(record.seconds for record in records[2:]),
            }
        if rank == 0:
            out.write_text(json.dumps(found))


def reduce_rates(kit: Kit, ranks: int) -> dict[str, float]:
    """Bus bytes a second of sums over all ranks, by size: 2 (n - 1) / n of the bytes pass each link."""
    import torch
    import torch.distributed as dist

    rates = {}
    for size in (2**16,) if kit.tiny else (2**20, 2**25, 2**30):
        numbers = torch.ones(size // 4, device=kit.device)
        for _ in range(2):
            dist.all_reduce(numbers)
        kit.wait()
        started = time.perf_counter()
        for _ in range(5):
            dist.all_reduce(numbers)
        kit.wait()
        rates[str(size)] = 2 * (ranks - 1) / ranks * size * 5 / (time.perf_counter() - started)
    return rates


@contextlib.contextmanager
def overlapping(overlap: bool) -> Iterator[None]:
    """Reduce gradients beside the backward pass, or after it, whatever the product's own setting."""
    from embedloom.training import loop

    plain = loop.deepspeed_settings

    def settings(*arguments: Any, **named: Any) -> dict[str, Any]:
        found = plain(*arguments, **named)
        return {**found, "zero_optimization": {**found["zero_optimization"], "overlap_comm": overlap}}

    loop.deepspeed_settings = settings
    try:
        yield
    finally:
        loop.deepspeed_settings = plain


# --- With Ray. -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_here(kit: Kit) -> Iterator[None]:
    """A private Ray with this machine's GPU, as the product starts it."""
    if importlib.util.find_spec("ray") is None:
        raise NotHere("Ray is not installed here")
    from embedloom.cluster.session import ray_session
    from embedloom.config.cluster import AuthConfig, Profile

    os.environ.setdefault("PYTHONPATH", os.pathsep.join(IMPORTED_FROM))
    profile = Profile(logical_cpus=8, gpus=1 if kit.on_gpu else 0, object_store_mib=200 if kit.tiny else 4096)
    with ray_session(profile, AuthConfig(token_path=str(kit.scratch / "token"))):
        yield


def part_ray_train(kit: Kit, report: Report) -> None:
    """Ray Train with one worker on the GPU, dtype auto, through the product's stage: export, parity, a kill, resume."""
    with ray_here(kit):
        calm = _train_by_ray(kit, "calm")
        killed: list[int] = []
        storage = kit.scratch / "killed" / "_train"
        killer = threading.Thread(target=kill_a_worker, args=(storage, killed), daemon=True)
        killer.start()
        struck = _train_by_ray(kit, "killed")
        killer.join(5)
    report.seen("lowest cosines of the export's readers", calm.manifest["details"]["parity"])
    report.must("workers killed", len(killed), len(killed) == 1, "1, after a checkpoint")
    curves = [
        [json.loads(line)["loss"] for line in (own.place.local / "metrics.jsonl").read_text().splitlines()]
        for own in (calm, struck)
    ]
    report.seen("losses, undisturbed and killed", curves)
    off = max(abs(a - b) / abs(b) for a, b in zip(*curves, strict=True))
    report.must("losses off after the resume", off, off < 0.01, "< 0.01 relative, same number of steps")


def _train_by_ray(kit: Kit, name: str) -> Any:
    """One stage of the product on Ray Train; the finished artefact."""
    from embedloom.config.cluster import TrainingGroup
    from embedloom.config.training import TrainingConfig
    from embedloom.core.artefacts import ArtefactWriter
    from embedloom.core.storage import Place
    from embedloom.training.stage import train_stage

    shape, length = ("tiny", 24) if kit.tiny else ("1b", 256)
    model, pairs = write_model(kit, shape), kit.scratch / "ray.jsonl"
    write_pairs(pairs, 64, 1, shape_of(shape).vocab_size, (length,))
    source = {"name": "s", "format": "sentence_transformers", "path": str(pairs)}
    stage = {
        "name": "t",
        "negatives": 1,
        "global_batch": 8,
        "learning_rate": 1e-4,
        "max_steps": 12,
        "sources": [source],
    }
    config = TrainingConfig.model_validate(
        {
            "runs": [{"name": "a", "seed": 0}], "stages": [stage], "trackers": [], "zero_stage": 2,
            "checkpoint_every_steps": 2, "parity": ["embedloom", "transformers"],
        }
    )  # fmt: skip
    group = TrainingGroup(workers=1, cpus=1, gpus=1 if kit.on_gpu else 0, threads=1, bf16_weights=True)
    out = ArtefactWriter(Place(str(kit.scratch / name)), "model", "accept", {}, "local")
    return train_stage(config, config.stages[0], config.candidates[0], model, None, group, "auto", out)


def kill_a_worker(storage: Path, killed: list[int]) -> None:
    """Wait for the first checkpoint, then end one process of the worker group at once."""
    import psutil

    end = time.monotonic() + 600
    while time.monotonic() < end and not killed:
        if list(storage.glob("run/step-*/metrics.jsonl")):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        break
        time.sleep(0.05)


def part_ray_pool(kit: Kit, report: Report) -> None:
    """A pool of one actor on the GPU embeds a table, as the product's stages do: right vectors, and the GPU's busy share."""
    import numpy as np

    from embedloom.config.cluster import PoolConfig
    from embedloom.core.storage import Place
    from embedloom.encoder.model import Encoder

    shape = "tiny" if kit.tiny else "110m"
    folder = write_model(kit, shape)
    texts = write_texts(kit, 300 if kit.tiny else 100_000, shape_of(shape).vocab_size)
    with ray_here(kit):
        from embedloom.compute.shards import run_sharded
        from embedloom.retrieval.embed import EmbeddingWorker, TextColumns
        from embedloom.retrieval.embedder import EncoderSource

        out = Place(str(kit.scratch / "vectors"))
        arguments = {
            "source": EncoderSource(shape, folder, dtype="bfloat16"), "side": "document", "done_folder": "vectors",
            "vector_dtype": "float32", "columns": TextColumns(texts=("text",)),
        }  # fmt: skip
        with gpu_use(kit) as use:
            started = time.perf_counter()
            parts = run_sharded(
                stage="accept", source=Place(str(kit.scratch / "texts")), source_folder="texts", output=out,
                done_folder="vectors", shard_rows=100 if kit.tiny else 4096, worker=EmbeddingWorker,
                worker_arguments=arguments, pool=PoolConfig(cpus=1, gpus=1 if kit.on_gpu else 0),
            )  # fmt: skip
            seconds = time.perf_counter() - started
    table = out.read_table(f"vectors/{Path(parts[0]).name}")
    vectors = np.stack([np.asarray(row) for row in table.column("vector").to_pylist()])
    encoder = Encoder.load(folder, dtype="bfloat16", device=kit.device)
    cosine = lowest_cosine(vectors[:64], encoder.embed(texts[:64], "document"))
    report.must("cosine to the encoder alone", cosine, cosine >= 0.99, ">= 0.99")
    report.seen("texts/s, with the start of the actor", len(texts) / seconds)
    if use:
        busy = [percent for percent in use if percent > 0]  # without the start, in which nothing runs
        report.seen("seconds/5 in which the GPU ran nothing", len(use) - len(busy))
        report.aim(
            "share of the time that the GPU is busy once it has begun",
            statistics.mean(busy or [0]) / 100,
            least=0.8,
        )


def write_texts(kit: Kit, count: int, words: int) -> list[str]:
    """A table of texts of natural lengths below ``scratch/texts``."""
    import numpy as np
    import pyarrow as pa

    from embedloom.core.storage import Place

    rng = np.random.default_rng(8)
    lengths = lengths_of("natural", 100 * count, rng)
    lengths = (lengths * (1 + count // len(lengths)))[:count]
    texts = [text_of(ids) for ids in ids_of([n - 1 for n in lengths], words, rng)]
    table = pa.table({"id": [f"{number:07d}" for number in range(count)], "text": texts})
    Place(str(kit.scratch / "texts")).write_table("texts/part-000000.parquet", table)
    return texts


@contextlib.contextmanager
def gpu_use(kit: Kit) -> Iterator[list[float]]:
    """Per cent of the time in which a kernel ran, five times a second; nothing without a GPU."""
    found: list[float] = []
    if not kit.on_gpu:
        yield found
        return
    command = [
        "nvidia-smi",
        "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits",
        "-lms",
        "200",
        "-i",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sampler:
        try:
            yield found
        finally:
            sampler.terminate()
            found += [float(line) for line in (sampler.stdout or []) if line.strip().isdigit()]


def part_ray_share(kit: Kit, report: Report) -> None:
    """Two actors on half a GPU each give the vectors of one; an actor without a GPU sees none."""
    import numpy as np

    shape = "tiny" if kit.tiny else "110m"
    folder = write_model(kit, shape)
    rng = np.random.default_rng(9)
    ids = ids_of(lengths_of("natural", 2000 if kit.tiny else 400_000, rng), shape_of(shape).vocab_size, rng)
    with ray_here(kit):
        import ray

        class Half:
            """An encoder in an actor."""

            def __init__(self) -> None:
                from embedloom.encoder.model import Encoder

                self._encoder = Encoder.load(folder, dtype="bfloat16")

            def embed(self, ids: list[list[int]]) -> tuple[Any, float, str]:
                """Vectors, seconds, and where."""
                started = time.perf_counter()
                vectors = self._encoder.embed_tokens(ids, 65536)
                return vectors, time.perf_counter() - started, str(self._encoder.device)

        actor = ray.remote(num_cpus=1, num_gpus=0.5 if kit.on_gpu else 0)(Half)
        pair = [actor.remote() for _ in range(2)]
        ray.get([one.embed.remote(ids[:8]) for one in pair])
        alone = ray.get(pair[0].embed.remote(ids))
        both = ray.get([one.embed.remote(ids) for one in pair])
        sees = ray.get(ray.remote(num_cpus=1)(_sees_a_gpu).remote())
    cosine = min(lowest_cosine(vectors, alone[0]) for vectors, _, _ in both)
    report.must("cosine of two actors on half a GPU to one alone", cosine, cosine >= 0.99, ">= 0.99")
    report.must("where the actors compute", both[0][2], both[0][2].startswith(kit.device), kit.device)
    report.seen("seconds of one alone, and of both at once", [alone[1], *(seconds for _, seconds, _ in both)])
    report.must("torch.cuda.is_available() in an actor without a GPU", sees, not sees, "False")


def _sees_a_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


# --- Running the parts. --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part and the seconds that it may take on a GPU."""

    seconds: int
    run: Callable[[Kit, Report], None]


# In goes of at most ten minutes: env,kernel,parity,embed; train,memory; search,serve,resume,peer; ranks and Ray's.
PARTS = {
    "env": Part(60, part_env),
    "kernel": Part(120, part_kernel),
    "parity": Part(180, part_parity),
    "embed": Part(210, part_embed),
    "train": Part(290, part_train),
    "memory": Part(290, part_memory),
    "search": Part(240, part_search),
    "serve": Part(100, part_serve),
    "resume": Part(120, part_resume),
    "peer": Part(130, part_peer),
    "ranks": Part(240, part_ranks),
    "ray_train": Part(300, part_ray_train),
    "ray_pool": Part(200, part_ray_pool),
    "ray_share": Part(100, part_ray_share),
}
ROWS_FILE, ABSENT_FILE = "rows.json", "absent.txt"


def work_on(part: str, tiny: bool, scratch: Path) -> None:
    """The process of one part: its rows, or what is not there, go into ``scratch``."""
    # Before torch or DeepSpeed are imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not tiny:
        (scratch / ABSENT_FILE).write_text("torch sees no CUDA device; --tiny tries the kit on the CPU")
        return
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"
    if tiny:
        torch.set_num_threads(1)
    report = Report(scratch / ROWS_FILE, judges_aims=on_gpu)
    try:
        PARTS[part].run(Kit("cuda" if on_gpu else "cpu", tiny, scratch), report)
    except NotHere as reason:
        (scratch / ABSENT_FILE).write_text(str(reason))


def run_part(part: str, tiny: bool, out: Path) -> dict[str, Any]:
    """Run one part in a process of its own, judge it and write its file."""
    limit = PARTS[part].seconds * (TINY_PATIENCE if tiny else 1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="embedloom-accept-") as folder:
        scratch = Path(folder)
        command = [sys.executable, __file__, "--part", part, "--out", folder, *(["--tiny"] if tiny else [])]
        error = _ended(command, out / f"{part}.log", limit)
        rows_file, absent_file = scratch / ROWS_FILE, scratch / ABSENT_FILE
        rows = [Row(**row) for row in json.loads(rows_file.read_text())] if rows_file.is_file() else []
        absent = absent_file.read_text() if absent_file.is_file() and not error else ""
    state, reasons = judge(rows, error, absent)
    found = {
        "part": part, "state": state, "reasons": reasons, "seconds": round(time.monotonic() - started, 1),
        "limit_seconds": limit, "tiny": tiny, **where_and_when(), "rows": [vars(row) for row in rows],
    }  # fmt: skip
    (out / f"{part}.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def _ended(command: list[str], log: Path, limit: float) -> str:
    """Run a command and all it starts to its end, or end it; why it failed, or nothing."""
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # What it left behind too: ranks, or Ray's processes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code is None:
        return f"over its limit of {limit:g} s; see {log.name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "" if code == 0 else f"exit {code}: {lines[-1][:300] if lines else 'no output'}; see {log.name}"


@functools.cache
def where_and_when() -> dict[str, Any]:
    """Machine, versions and commit; the date of this call of the kit."""
    packed = HERE / PACKED_FILE
    commit = json.loads(packed.read_text())["commit"] if packed.is_file() else commit_here()
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        names = []
    versions = {}
    for name in ("torch", "transformers", "deepspeed", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit,
        "gpus": [name.strip() for name in names if name.strip()], "cpus": os.cpu_count(),
        "python": platform.python_version(), "versions": versions,
    }  # fmt: skip


def commit_here() -> str:
    """The commit of the repository, with a plus where files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def summarise(out: Path) -> str:
    """One table over all parts whose files lie in ``out``, as Markdown; written with ``summary.json``."""
    files = [out / f"{part}.json" for part in PARTS]
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    keys = ("state", "reasons", "seconds", "tiny", "date", "commit", "gpus")
    (out / "summary.json").write_text(
        json.dumps({one["part"]: {key: one[key] for key in keys} for one in found}, indent=1) + "\n"
    )
    lines = ["| part | state | s | what was asked | found | needed |", "|---|---|---|---|---|---|"]
    for one in found:
        asked = [row for row in one["rows"] if row["kind"] != "seen"]
        first = f"| {one['part']} | {one['state']} | {one['seconds']} |"
        if not asked:
            lines.append(f"{first} {'; '.join(one['reasons'])} | | |")
        for row in asked:
            mark = {True: "", False: " **missed**", None: " (not judged)"}[row["ok"]]
            lines.append(f"{first} {row['name']} | {row['value']}{mark} | {row['limit']} |")
            first = "| | | |"
    text = "\n".join(lines) + "\n"
    (out / "summary.md").write_text(text)
    return text


def pack(folder: Path, python: str) -> None:
    """Write a folder that holds all a PyTorch image lacks: this file, the package, and ``WHEELS`` for that Python."""
    if folder.exists():
        raise SystemExit(f"--pack: {folder} is there already; allowed: a new folder")
    folder.mkdir(parents=True)
    shutil.copy(__file__, folder / "accept.py")
    left_out = shutil.ignore_patterns("__pycache__", "*.c", "*.h")
    shutil.copytree(PACKAGE_FOLDER / "embedloom", folder / "embedloom", ignore=left_out)
    site = folder / "site"
    site.mkdir()
    versions = {}
    for name in WHEELS:
        distribution = importlib.metadata.distribution(name)
        versions[name] = distribution.version
        is_pure = "Root-Is-Purelib: true" in (distribution.read_text("WHEEL") or "")
        if is_pure or python == ".".join(platform.python_version_tuple()[:2]):
            _copy_installed(distribution, site)
        else:
            _fetch_wheel(f"{name}=={distribution.version}", python, site)
    content = {
        "commit": commit_here(),
        "date": where_and_when()["date"],
        "python": python,
        "wheels": versions,
    }
    (folder / PACKED_FILE).write_text(json.dumps(content, indent=1) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.0f} MB for Python {python}; there: python3 accept.py --out results")


def _copy_installed(distribution: importlib.metadata.Distribution, site: Path) -> None:
    for file in distribution.files or ():
        if ".." in file.parts or "__pycache__" in file.parts:  # programs beside the packages, compiled files
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(distribution.locate_file(file)), target)


def _fetch_wheel(requirement: str, python: str, site: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--target", str(site), "--python-version", python, "--implementation", "cp"]
    command += ["--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64", requirement]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"--pack: pip found no wheel of {requirement} for Python {python}")


def chosen(names: str) -> list[str]:
    """The parts that ``--only`` names, in the kit's order."""
    asked = names.split(",")
    if unknown := [name for name in asked if name not in PARTS]:
        raise SystemExit(f"--only: {unknown[0]!r} is no part; allowed: {','.join(PARTS)}")
    return [name for name in PARTS if name in asked]


def main() -> int:
    """Exit 0 if nothing FAILED and nothing was REFUSED, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="results, kept beside earlier ones")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help="parts, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="toy models on the CPU, to try the kit")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="write what a GPU machine needs, and end")
    parser.add_argument(
        "--python", default=".".join(platform.python_version_tuple()[:2]), help="there, with --pack"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pack is not None:
        pack(options.pack.resolve(), options.python)
        return 0
    if options.out is None:
        parser.error("--out is needed, or --pack")
    if options.part is not None:
        work_on(options.part, options.tiny, options.out)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    states = []
    for part in chosen(options.only):
        found = run_part(part, options.tiny, options.out)
        states.append(found["state"])
        print(f"{part}: {found['state']} in {found['seconds']} s {'; '.join(found['reasons'])}", flush=True)
    print(summarise(options.out))
    return int(any(state in ("FAILED", "REFUSED") for state in states))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:
        # The cause last, where the log is read.
        traceback.print_exc()
        sys.exit(1)
