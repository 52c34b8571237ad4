"""Memory of an actor that maps its encoder's weights from the object store, beside one with a copy of its own.

    python benchmarks/shared_weights.py [--quick] [--json] [--dtype float32|bfloat16]

Work: a random Llama of 400 MB in float32 (40 MB with --quick) in a private Ray; two actors that load the folder, then
two that map the shared arrays. Weight memory is the private memory (USS) of an actor after it embedded a text, less
that of an actor with a tiny model, which holds the same libraries. The floor is 0: a mapped page is nobody's own.
Embeddings are nobody's own on either side, as the loader maps them from the file.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from embedloom.cluster.session import ray_session
from embedloom.config.cluster import AuthConfig, PoolConfig, Profile
from embedloom.core.prompting import PromptContract
from embedloom.retrieval.embedder import EmbedderSource, EncoderSource, share_weights

WORDS = ("loom", "thread", "weave", "cloth")
TEXTS = ["loom thread weave", "cloth", "weave weave cloth thread loom"]


def make_model(folder: Path, hidden: int, layers: int, vocabulary: int) -> Path:
    """Save a random bidirectional Llama with a tokenizer of four words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=512,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder)
    backend = Tokenizer(
        models.WordLevel({"<unk>": 0} | {word: i + 1 for i, word in enumerate(WORDS)}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>").save_pretrained(
        folder
    )
    PromptContract(template="{text}", add_bos=False, add_eos=False, attention="bidirectional").save(folder)
    return folder


class Holder:
    """An actor with one encoder."""

    def __init__(self, source: EmbedderSource) -> None:
        torch.set_num_threads(1)
        self.embedder = source.open()

    def measure(self) -> tuple[dict[str, int], Any]:
        """Private and proportional memory in bytes after one forward, and its vectors."""
        kinds: list[Any] = [["retrieval"] * len(TEXTS), [None] * len(TEXTS)]
        vectors, _ = self.embedder.embed(TEXTS, "document", *kinds)
        memory = psutil.Process().memory_full_info()
        return {"uss": memory.uss, "pss": memory.pss}, vectors


def hold(source: EmbedderSource, actors: int) -> tuple[list[dict[str, int]], list[Any]]:
    """Start actors one after another; their memory once all are there."""
    import ray  # after ray_session: Ray reads its authentication mode when it is imported

    actor = ray.remote(num_cpus=1)(Holder)
    holders = [actor.remote(source) for _ in range(actors)]
    ray.get([holder.measure.remote() for holder in holders])
    memory, vectors = zip(*ray.get([holder.measure.remote() for holder in holders]), strict=True)
    for holder in holders:
        ray.kill(holder)
    return list(memory), list(vectors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a model of 40 MB")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="el-", dir="/tmp") as temporary:
        root = Path(temporary)
        auth = AuthConfig(token_path=str(root / "token"))
        with ray_session(Profile(logical_cpus=8, object_store_mib=1024), auth):
            import ray

            sizes = (512, 2, 3000) if options.quick else (1024, 4, 32000)
            tiny = EncoderSource("tiny", make_model(root / "tiny", 64, 1, 100), None, options.dtype)
            own = EncoderSource("own", make_model(root / "model", *sizes), None, options.dtype)
            shared: Any = share_weights(own, PoolConfig(max_actors=2))
            weights_bytes = ray.get(shared.weights).nbytes
            (base,), _ = hold(tiny, 1)
            private, expected = hold(own, 2)
            mapped, vectors = hold(shared, 2)
    mib = {
        side: [round((memory["uss"] - base["uss"]) / 2**20, 1) for memory in found]
        for side, found in (("private", private), ("shared", mapped))
    }
    ours, peer = max(mib["shared"][1], 0.1), mib["private"][1]
    result = {
        "name": "shared_weights",
        "ours": ours,
        "peer": peer,
        "peer_name": "every actor loads the folder",
        "ratio": round(peer / ours, 2),
        "unit": "MiB of weights private to the second actor",
        "floor_share": 0.0,
        "equal": all(np.array_equal(found, expected[0]) for found in [*expected, *vectors]),
        "work": {
            "dtype": options.dtype, "weights_mib": round(weights_bytes / 2**20, 1),
            "share_of_a_copy": round(ours / peer, 4), "private_mib": mib["private"], "shared_mib": mib["shared"],
            "uss_without_weights_mib": round(base["uss"] / 2**20, 1),
            "pss_mib": {"private": [round(m["pss"] / 2**20, 1) for m in private],
                        "shared": [round(m["pss"] / 2**20, 1) for m in mapped]},
        },
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
