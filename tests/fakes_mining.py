"""Small corpus and pair artefacts for the mining tests."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place

WORDS = [
    "read", "write", "parquet", "table", "column", "filter", "sort", "join", "merge", "array", "vector", "matrix",
    "socket", "thread", "queue", "lock",
]  # fmt: skip


def document_row(identifier, text, title=None):
    return {"id": identifier, "text": text, "title": title, "lang": "en", "source": "test"}


def pair_row(identifier, query, document_id, **changes):
    row = {
        "id": identifier, "query": query, "document_id": document_id, "task_type": "retrieval",
        "instruction": "Find the text", "lang": "en", "document_lang": "en", "origin": "public",
    }  # fmt: skip
    return row | changes


def random_documents(count, seed=0):
    generator = random.Random(seed)
    return [
        document_row(f"d{n:04d}", " ".join(generator.choices(WORDS, k=6)) + f" {n}") for n in range(count)
    ]


def make_artefact(folder, kind, tables):
    """A finished artefact from {file name: (kind of table, rows)}."""
    writer = ArtefactWriter(Place(str(folder)), kind, "config", {}, "local")
    for name, (table_kind, rows) in tables.items():
        writer.place.write_table(name, table_from_rows(table_kind, rows))
    return writer.commit({"rows": 1})


def make_corpus(folder, documents, pairs=(), cuts=1) -> Artefact:
    """A corpus artefact whose training documents are cut into several files."""
    step = -(-len(documents) // cuts)
    tables = {
        f"documents/train/part-{n:06d}.parquet": ("documents", documents[n * step : (n + 1) * step])
        for n in range(cuts)
    }
    if pairs:
        tables["pairs/train/part-000000.parquet"] = ("pairs", list(pairs))
    return make_artefact(folder, "corpus", tables)


def make_synthesis(folder, pairs) -> Artefact:
    return make_artefact(folder, "synthesis", {"pairs/part-000000.parquet": ("pairs", list(pairs))})


def make_tiny_cross_encoder(folder, labels=1, seed=0):
    """A random BERT sequence classifier of two layers over bytes, with [CLS] a [SEP] b [SEP] pairs."""
    torch.manual_seed(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {byte: n + 3 for n, byte in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, num_labels=labels, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
