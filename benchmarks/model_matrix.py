"""Which models are read as their own library reads them, and which bases become embedding models that who reads.

    python benchmarks/model_matrix.py [--vllm] [--only NAME ...] [--out docs/models.md]

Two tables, from tiny random models made here from config objects (the same that the tests use): layouts of
sentence-transformers folders against its own encode_query and encode_document, and families of bases, each prepared
bidirectional, with LoRA where packed or padded attention trains it, and read again by four readers. --vllm asks vLLM
too, which takes a minute a family; without it its column says "not run". Cosines are the lowest over the texts. Heads have
32 dimensions, as vLLM's attention on CPUs knows none of the tests' 8.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")

import fakes_bases as bases  # noqa: E402
import fakes_foreign as foreign  # noqa: E402
from embedloom.config.encoder import EncoderConfig  # noqa: E402
from embedloom.encoder.export import prepare_base  # noqa: E402
from embedloom.encoder.model import Encoder  # noqa: E402
from embedloom.encoder.parity import (  # noqa: E402
    check_export,
    embed_golden,
    reader_verdicts,
    save_golden,
)
from embedloom.encoder.registry import open_model  # noqa: E402
from embedloom.errors import EmbedloomError  # noqa: E402
from embedloom.retrieval.teachers import SentenceEncoder  # noqa: E402

Cells = tuple[str, ...]
_WIDTH, _HEAD = 128, 32


def layout_rows(scratch: Path, wanted: Callable[[str], bool]) -> Iterator[Cells]:
    """(layout, computed by, lowest cosine) of every layout and architecture that the tests know."""
    bert = foreign.make_transformer(scratch / "bert", limit=300)
    makers: dict[str, Callable[[Path], Path]] = {}
    for name, options in foreign.LIBRARY.items():
        makers[f"6.2: {name}"] = lambda out, o=options: foreign.save_library_model(out, bert, **o)
    for name, options in foreign.OLD.items():
        makers[f"2 to 5: {name}"] = lambda out, o=options: foreign.write_old_layout(out, bert, **o)
    for kind, changes in foreign.KINDS.items():
        makers[f"architecture: {kind}"] = lambda out, k=kind, c=changes: foreign.save_library_model(
            out, foreign.make_transformer(out.with_name(out.name + "-bare"), k, 512, **c)
        )
    makers["2 to 5: gtr-t5 (T5's encoder, Dense)"] = foreign.gtr_t5
    makers["Router: two towers"] = lambda out: foreign.routed_model(out, bert)
    makers["StaticEmbedding"] = foreign.static_model
    for number, (name, make) in enumerate(makers.items()):
        if wanted(name):
            yield (name, *_layout_cells(make(scratch / f"layout-{number}")))


def _layout_cells(folder: Path) -> Cells:
    reason = open_model(folder).beyond
    opened = (lambda path: SentenceEncoder(path, "float32")) if reason else foreign.open_ours
    by = "sentence-transformers (evaluation, mining); elsewhere refused" if reason else "our encoder"
    return by, f"{foreign.lowest_cosines(folder, opened):.6f}"


def base_rows(scratch: Path, ask_vllm: bool, wanted: Callable[[str], bool]) -> Iterator[Cells]:
    """(family, bidirectional, rows, LoRA, then a cell a reader) of every family that the tests know."""
    families = {**bases.FAMILIES, **bases.HYBRIDS}
    for name, changes in families.items():
        if wanted(name):
            yield (name, *_base_cells(bases.make_base(scratch / name, name, **_wide(changes)), ask_vllm))
    for kind in ("Bert", "XLMRoberta", "MPNet", "ModernBert"):
        if wanted(kind):
            yield (
                kind,
                *_base_cells(
                    foreign.make_transformer(scratch / kind, kind, **_wide(foreign.KINDS.get(kind, {}))),
                    ask_vllm,
                ),
            )
    for kind in bases.MULTIMODAL:
        if wanted(kind):
            bases.multimodal(scratch / kind, kind, hidden_size=_WIDTH, head_dim=_HEAD)
            yield (f"{kind} (text model inside)", *_base_cells(scratch / kind, ask_vllm))


def _wide(changes: dict[str, Any]) -> dict[str, Any]:
    """A family's settings with heads that vLLM knows on CPUs."""
    widths = {"hidden_size": _WIDTH, "head_dim": _HEAD, "word_embed_proj_dim": _WIDTH}
    return {**changes, "hidden_size": _WIDTH, **{key: widths[key] for key in widths if key in changes}}


def _base_cells(base: Path, ask_vllm: bool) -> Cells:
    out = base.with_name(base.name + "-model")
    out.mkdir()
    config = EncoderConfig(base=str(base), template="{text}", max_query_tokens=64, max_document_tokens=64)
    try:
        prepare_base(config, base, out)
    except EmbedloomError as error:
        causal = str(error).split("layers, ")[-1].split(" do not")[0]
        return (f"refused: layers {causal} stay causal", *["-"] * 6)
    encoder = Encoder.load(out, dtype="float32", device="cpu")
    save_golden(embed_golden(encoder), out)
    rows = "packed" if encoder.packed else "padded"
    measured = check_export(out)
    return ("yes", rows, _lora(out), *_reader_cells(out, measured, ask_vllm))


def _reader_cells(folder: Path, measured: dict[str, float], ask_vllm: bool) -> Cells:
    verdicts = {one.reader: one for one in reader_verdicts(folder, measured)}
    vllm = f"not run ({verdicts['vllm'].vectors})"
    if ask_vllm:
        try:
            vllm = f"{check_export(folder, ('vllm',))['vllm']:.6f}"
        except EmbedloomError as error:
            vllm = _disagreement(" ".join(str(error).split()))
    own, hub, library = (
        f"{measured[name]:.6f}" for name in ("embedloom", "transformers", "sentence-transformers")
    )
    return own, hub, library, vllm


def _disagreement(message: str) -> str:
    """What vLLM did instead, in a few words: the cosine and its cause, or why it cannot read the folder."""
    differs = re.search(r"lowest cosine (-?[0-9.]+) .*cause:? (.*)", message)
    if differs:
        return f"{differs[1]}: {differs[2].split(' (')[0]}"
    return f"cannot read it: {message.rsplit('cannot read this model: ', 1)[-1][:160]}".replace("|", "/")


def _lora(folder: Path) -> str:
    """Whether adapters on the attention's projections get a gradient through our forward, and merge to the same vectors."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    from embedloom.training.lora import linear_names

    encoder = Encoder.load(folder, dtype="float32", device="cpu", trainable=True)
    torch.manual_seed(0)
    settings = LoraConfig(
        r=2, target_modules=sorted(linear_names(encoder.backbone)), init_lora_weights=False,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in encoder.backbone.modules()),
    )  # fmt: skip
    adapted = get_peft_model(encoder.backbone, settings)
    ids = [[9, 8, 7, 6], [5, 4]]
    vectors = encoder.forward(ids)
    (vectors * torch.randn_like(vectors)).sum().backward()  # a plain sum is constant behind a LayerNorm
    moved = all(
        float(p.grad.abs().max()) > 0
        for n, p in adapted.named_parameters()
        if "lora_B" in n and p.grad is not None
    )
    before = encoder.embed_tokens(ids)
    encoder.backbone = adapted.merge_and_unload()
    difference = float(np.abs(before - encoder.embed_tokens(ids)).max())
    return "yes" if moved and difference < 1e-4 else f"no (merged vectors differ by {difference:.2g})"


def table(header: Cells, rows: list[Cells]) -> str:
    """Markdown."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def versions() -> str:
    """Of the packages that are compared, by the names that they are installed under (vLLM for CPUs has another)."""
    installed = packages_distributions()
    modules = ("torch", "transformers", "sentence_transformers", "vllm")
    return ", ".join(f"{installed[name][0]} {version(installed[name][0])}" for name in modules)


def document(layouts: list[Cells], families: list[Cells], command: str) -> str:
    """``docs/models.md``."""
    return f"""# Models that can be brought

Made on {date.today()} by `{command}` with {versions()} on CPU in float32, from tiny random models: the tables say that the
same numbers are computed, not how good a model is. The tests hold the same cases to 0.9999.

## Folders of sentence-transformers, read as it reads them

Lowest cosine over four texts, queries against its `encode_query` and documents against its `encode_document`; the longest
text is cut at the model's own limit. What our encoder cannot compute is scored through the library in `evaluate`, `gate`
and mining, and refused with the reason as a base, in `embed` and by the endpoint. Prompts other than `query` and
`document` (such as `passage`) are left out by the library's two functions, and so here; a note says it. Gemma 2 is computed
with the soft cap on attention scores that it was trained with; the library's default attention (sdpa) drops it.

{table(("layout", "computed by", "lowest cosine"), layouts)}

## Bases

Prepared by `encoder.attention: bidirectional`, limit 64 tokens, windows of 8 tokens where the family has them (they are
widened to the limit, so that every layer sees whole texts). Packed: texts lie behind one another without padding. LoRA:
adapters on every linear layer get gradients and merge to the same vectors. The readers' cells are the lowest cosine to
our own vectors over the golden texts. vLLM's is that of its CPU build; where the vectors are others, the cause stands beside
the cosine (`mask`: it attends causally), and where it was not run its cell gives what the rules of the export say.

{table(("base", "bidirectional", "rows", "LoRA", "ours", "transformers", "sentence-transformers", "vLLM"), families)}

The encoder of a T5 (`gtr-t5`, `sentence-t5`) is read as a foreign model; encoder-decoders are refused as bases. Code that
lies beside the weights (`auto_map`) is run only with `trust_remote_code` (of a teacher, `mining.rescoring`, `embedding`,
`serving`; `--trust-remote-code` of `embed`, `serve`, `deploy` and `gate`), and never as a base; `llama_bidirec`
(nvidia/llama-embed-nemotron-8b) needs none of it: it is read as Llama without causal mask.
"""


def main() -> None:
    """Print the document, or write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", action="store_true", help="ask vLLM too")
    parser.add_argument("--only", nargs="*", default=None, help="rows whose name holds one of these")
    parser.add_argument("--out", type=Path, default=None, help="write here instead of printing")
    options = parser.parse_args()

    def wanted(name: str) -> bool:
        return options.only is None or any(word in name for word in options.only)

    with tempfile.TemporaryDirectory(prefix="embedloom-models-") as folder:
        scratch = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            layouts = list(layout_rows(scratch, wanted))
            families = list(base_rows(scratch / "bases", options.vllm, wanted))
    command = "python benchmarks/model_matrix.py" + (" --vllm" if options.vllm else "")
    text = document(layouts, families, command)
    if options.out is None:
        print(text)
    else:
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
