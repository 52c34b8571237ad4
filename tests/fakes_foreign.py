"""Model folders as others write them: tiny random encoders in the layouts of sentence-transformers 2 to 6."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TEXTS = ["cats", "sort two lists", "How do I merge Two sorted lists", "of " * 700 + "dogs"]
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
    name = f"{kind}EncoderModel" if config.is_encoder_decoder else f"{kind}Model"
    model = getattr(transformers, name)(config).eval()
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


def gtr_t5(folder: Path, seed: int = 3) -> Path:
    """The folder of gtr-t5 and sentence-t5, by hand: T5's encoder, mean, a square Dense without bias or activation, unit length."""
    from safetensors.torch import save_file

    bare = make_transformer(folder.with_name(folder.name + "-bare"), "T5", **KINDS["T5"])
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    write_old_layout(folder, bare, pooling, settings={"max_seq_length": 40, "do_lower_case": False})
    modules = json.loads((folder / "modules.json").read_text())
    for number, kind in ((2, "Dense"), (3, "Normalize")):
        path = f"{number}_{kind}"
        modules.append(
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
    write(folder / "modules.json", modules)
    activation = "torch.nn.modules.linear.Identity"
    dense = {"in_features": 32, "out_features": 32, "bias": False, "activation_function": activation}
    write(folder / "2_Dense" / "config.json", dense)
    (folder / "3_Normalize").mkdir()
    torch.manual_seed(seed)
    save_file({"linear.weight": torch.randn(32, 32)}, folder / "2_Dense" / "model.safetensors")
    return folder


def write(path: Path, content: Any) -> None:
    """Write JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


E5 = {"query": "query : ", "passage": "passage : "}
FLAGS = dict.fromkeys(("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken"), False)  # fmt: skip


def dense(out=12, **options):
    from sentence_transformers.base.modules import Dense

    return Dense(32, out, **options)


def with_dense():
    return [dense()]


def two_dense_then_normalize():
    """EmbeddingGemma's: wider, back, unit length."""
    from sentence_transformers.base.modules import Dense, Normalize

    identity = torch.nn.Identity()
    return [
        dense(64, bias=False, activation_function=identity),
        Dense(64, 32, bias=False, activation_function=identity),
        Normalize(),
    ]


def residual_dense():
    return [dense(12, activation_function=torch.nn.GELU(), use_residual=True)]


def normalize_then_dense():
    from sentence_transformers.base.modules import Normalize

    return [Normalize(), dense(8)]


def layer_norm():
    from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm

    layer = LayerNorm(32)
    torch.nn.init.normal_(layer.norm.weight)
    return [Dropout(0.3), layer]


LIBRARY = {
    "mean": {},
    "cls": {"pooling": "cls"},
    "compact lasttoken": {"pooling": "lasttoken"},
    "max": {"pooling": "max"},
    "mean_sqrt_len": {"pooling": "mean_sqrt_len_tokens"},
    "weighted mean": {"pooling": "weightedmean"},
    "a list of poolings": {
        "pooling": ["mean", "cls", "weightedmean", "max", "lasttoken", "mean_sqrt_len_tokens"]
    },
    "dense": {"later": with_dense},
    "dense behind two poolings": {"pooling": ["cls", "mean"], "later": lambda: [dense_of_64()]},
    "two dense, normalize": {"later": two_dense_then_normalize},
    "residual dense": {"later": residual_dense},
    "normalize before dense": {"later": normalize_then_dense},
    "layer norm and dropout": {"later": layer_norm},
    "query and passage prompts": {"prompts": E5},
    "query and document prompts": {"prompts": {"query": "search : ", "document": "list : "}},
    "default prompt": {"prompts": {"own": "big "}, "default_prompt_name": "own"},
    "lower case": {"do_lower_case": True},
    "max_seq_length": {"max_seq_length": 20},
    "cut": {"truncate_dim": 7},
    "dot of unit vectors": {"similarity_fn_name": "dot", "later": two_dense_then_normalize},
}


def dense_of_64():
    from sentence_transformers.base.modules import Dense

    return Dense(64, 12)


OLD = {
    "verbose flags": {"pooling": {**FLAGS, "pooling_mode_cls_token": True}, "normalize": True},
    "several flags": {"pooling": {**FLAGS, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
    "no flag": {"pooling": dict(FLAGS)},
    "embedding_dimension and a one-item list": {"pooling": {"embedding_dimension": 32, "pooling_mode": ["lasttoken"]}},
    "limit beside the weights": {"pooling": {"pooling_mode_mean_tokens": True}, "settings": {"max_seq_length": 30, "do_lower_case": False}},
    "no limit stated": {"pooling": {"pooling_mode_mean_tokens": True}, "settings": {"max_seq_length": None}},
    "sentence_roberta_config": {
        "pooling": {"pooling_mode_mean_tokens": True}, "settings": {"max_seq_length": 25}, "length_file": "sentence_roberta_config.json",
    },
    "0_Transformer": {"pooling": {"pooling_mode_mean_tokens": True}, "settings": {"max_seq_length": 40}, "transformer_path": "0_Transformer"},
    "prompts that start anew": {
        "pooling": {"pooling_mode_mean_tokens": True},
        "prompts": {"prompts": {"query": "search : ", "document": ""}, "default_prompt_name": "query"},
    },
}  # fmt: skip


KINDS = {
    "T5": {"d_kv": 8, "d_ff": 64}, "MT5": {"d_kv": 8, "d_ff": 64}, "GPT2": {},
    "MPNet": {}, "XLMRoberta": {}, "Roberta": {}, "Camembert": {}, "Electra": {"embedding_size": 32},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "Qwen3": {"head_dim": 8, "num_key_value_heads": 2}, "Gemma2": {"head_dim": 8, "num_key_value_heads": 2, "attn_logit_softcapping": 1.0},
    "ModernBert": {"global_attn_every_n_layers": 2, "local_attention": 16}, "SmolLM3": {"num_key_value_heads": 2, "pad_token_id": 1},
}  # fmt: skip


def open_ours(folder: Path) -> Any:
    """The folder in our encoder, in float32."""
    from embedloom.encoder.model import Encoder

    return Encoder.load(folder, dtype="float32", device="cpu")


def lowest_cosines(folder: Path, open_model: Callable[[Path], Any] = open_ours) -> float:
    """Ours against the library's, query and document side."""
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(folder), device="cpu")
    ours = open_model(folder)
    found = []
    for side, encode in (("query", library.encode_query), ("document", library.encode_document)):
        theirs, own = encode(TEXTS), ours.embed(TEXTS, side)
        assert own.shape == theirs.shape
        norms = np.linalg.norm(theirs, axis=1) * np.linalg.norm(own, axis=1)
        found.append(float(((theirs * own).sum(axis=1) / norms).min()))
    return min(found)


def static_model(folder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "cats": 1, "dogs": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    model = SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=weights)], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


def routed_model(folder, bert):
    """Queries and documents through different layers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    query, document = (
        [Transformer(str(bert)), Pooling(32), dense()],
        [Transformer(str(bert)), Pooling(32, "cls"), dense()],
    )
    router = Router.for_query_document(query_modules=query, document_modules=document)
    SentenceTransformer(modules=[router], device="cpu").save(str(folder), create_model_card=False)
    return folder
