"""Model folders as others write them: tiny random encoders in the layouts of sentence-transformers 2 to 6."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = [
    "the",
    "a",
    "of",
    "cats",
    "dogs",
    "sort",
    "list",
    "merge",
    "two",
    "sorted",
    "lists",
    "query",
    "passage",
    "search",
    ":",
    "how",
    "do",
    "i",
    "read",
    "big",
    "small",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # RoBERTa's order: padding is 1
SIZES = dict(
    vocab_size=len(SPECIAL) + 26 * 2 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=514, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    initializer_range=0.3,
)  # fmt: skip


def word_tokenizer(limit: int = 10**30, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """Words, and letters of both cases for what is none; case matters."""
    letters = [chr(start + i) for start in (ord("a"), ord("A")) for i in range(26)]
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL, *letters, *(w for w in WORDS if w not in letters)])
    }
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix=""))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = [*(["<s>"] if bos else []), "$A", *(["</s>"] if eos else [])]
    backend.post_processor = TemplateProcessing(
        single=" ".join(pieces), special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", model_max_length=limit,
    )  # fmt: skip


def make_transformer(
    folder: Path, kind: str = "Bert", limit: int = 10**30, seed: int = 0, **changes: Any
) -> Path:
    """Save a tiny random model of a class of transformers (``Bert``, ``MPNet``, ``XLMRoberta``, ``Qwen3``, ...)."""
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{kind}Config")
    # The library's own defaults for what a small model has to say otherwise.
    config = config_class(**{**SIZES, **changes})
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    word_tokenizer(limit).save_pretrained(folder)
    return folder


def save_library_model(
    folder: Path, transformer: Path, later: Callable[[], list[Any]] | None = None, **options: Any
) -> Path:
    """Let sentence-transformers write the folder: Transformer, Pooling and what follows."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(7)
    pooling, include = options.pop("pooling", "mean"), options.pop("include_prompt", True)
    limit, lower = options.pop("max_seq_length", None), options.pop("do_lower_case", False)
    first = Transformer(str(transformer), max_seq_length=limit, do_lower_case=lower)
    modules = [
        first,
        Pooling(first.get_embedding_dimension(), pooling, include_prompt=include),
        *(later() if later else []),
    ]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder), create_model_card=False)
    return folder


def write_old_layout(
    folder: Path,
    transformer: Path,
    pooling: dict[str, Any],
    *,
    settings: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
    normalize: bool = False,
    length_file: str = "sentence_bert_config.json",
    transformer_path: str = "",
) -> Path:
    """The files that releases 2 to 5 wrote, by hand: module paths of sentence_transformers.models, flags, lengths."""
    shutil.copytree(transformer, folder / transformer_path)
    modules = [
        ("Transformer", transformer_path),
        ("Pooling", "1_Pooling"),
        *([("Normalize", "2_Normalize")] if normalize else []),
    ]
    write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(modules)
        ],
    )
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling})
    if settings is not None:
        write(folder / transformer_path / length_file, settings)
    if prompts is not None:
        write(folder / "config_sentence_transformers.json", prompts)
    return folder


def write(path: Path, content: Any) -> None:
    """Write JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))
