"""Time that a GPU waits for texts while a corpus is embedded: tokenized apart, beside the actor that tokenizes itself.

    python benchmarks/feeding.py [--quick] [--json] [--device-rate N] [--core-rate N] [--cores N]

No GPU is needed: the device is simulated and takes a set time a token (a million a second: MiniLM on an A100), and so does
a tokenizing core (0.27 million a second: measured with 512-token texts and Llama 3's tokenizer). Everything else is the
product's own: ``embed_corpus`` over Ray Data, its reading tasks, actor and writing tasks, the batches and the queue before
the device. The actor writes down how long its device had nothing to do between its first batch and the end of its last.
Before that a run of two shards a core starts the processes that tokenize, which takes ten CPU seconds each: on a machine
with fewer cores than are simulated that is minutes in which no device is fed.

Ours: reading tasks tokenize on ``--cores`` CPUs, the actor works on two shards at once, batches have 65,536 tokens, results
are taken a batch behind. The peer is the way before: the actor tokenizes, batches have 4,096 tokens, each is waited for.
``equal``: both wrote the same files.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "platform"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
)
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from embedloom.config.cluster import AuthConfig, PoolConfig, Profile  # noqa: E402
from embedloom.core.storage import Place  # noqa: E402
from embedloom.encoder.feeding import Queue  # noqa: E402
from embedloom.encoder.model import MemoryLimit, run_batches  # noqa: E402
from embedloom.encoder.tokenizer import CutTexts  # noqa: E402
from embedloom.retrieval.embed import TextColumns, embed_corpus  # noqa: E402
from fakes_device import SimulatedDevice  # noqa: E402

TEXT_TOKENS = 512
SHARD_ROWS = 2048
DIMENSION = 8


@dataclass(frozen=True)
class SimulatedModel:
    """A model whose tokenizer and device take a set time a token; ``name`` is the way it is fed."""

    name: str
    device_rate: float  # tokens a second
    core_rate: float
    batch_tokens: int
    behind: int
    warm_shards: int
    folder: Path  # where the actor writes what its device did

    def open(self) -> "SimulatedEmbedder":
        return SimulatedEmbedder(self)

    def open_tokenizer(self) -> "SimulatedTokenizer":
        return SimulatedTokenizer(self.core_rate)


class SimulatedTokenizer:
    """Ids after the time a core would take."""

    def __init__(self, rate: float) -> None:
        self.cuts = CutTexts()
        self._rate = rate

    def tokenize(self, texts: Sequence[str], *_: Any) -> list[np.ndarray[Any, Any]]:
        began = time.monotonic()
        # The first id says which text it is, so that vectors can be compared.
        ids = [np.full(TEXT_TOKENS, int(text), dtype=np.int32) for text in texts]
        time.sleep(max(0.0, began + TEXT_TOKENS * len(texts) / self._rate - time.monotonic()))
        return ids


class SimulatedEmbedder:
    """Vectors after the time a device would take."""

    contract_hash = "simulated"

    def __init__(self, model: SimulatedModel) -> None:
        self._model = model
        self._tokenizer = model.open_tokenizer()
        warm_tokens = model.warm_shards * SHARD_ROWS * TEXT_TOKENS
        self._device = SimulatedDevice(model.device_rate, warm_tokens=warm_tokens)

    def embed(self, texts: Sequence[str], *_: Any) -> tuple[np.ndarray[Any, Any], list[int]]:
        ids = self._tokenizer.tokenize(texts)
        return self.embed_tokens(ids), [len(own) for own in ids]

    def embed_tokens(self, token_ids: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
        """As ``Encoder.embed_tokens``, with a device that only takes time."""
        vectors = np.empty((len(token_ids), DIMENSION), np.float32)

        def start(batch: Sequence[int]) -> Any:
            wait = self._device.start(sum(len(token_ids[position]) for position in batch))

            def result() -> np.ndarray[Any, Any]:
                wait()
                return np.array([[token_ids[position][0]] * DIMENSION for position in batch], np.float32)

            return result

        def take(batch: Sequence[int], found: np.ndarray[Any, Any]) -> None:
            vectors[batch] = found

        queue = Queue(start, take, self._model.behind)
        run_batches([len(ids) for ids in token_ids], self._model.batch_tokens, MemoryLimit(), queue)
        queue.finish()
        state = {"busy": self._device.busy_seconds, "idle": self._device.idle_seconds}
        Place(str(self._model.folder)).write_json(f"{self._model.name}.json", state)
        return vectors


def embed_texts(model: SimulatedModel, place: Place, count: int, apart: bool) -> dict[str, float]:
    """Embed so many texts; what the device did."""
    numbers = [str(number) for number in range(count)]
    place.write_table("texts/part-000000.parquet", pa.table({"id": numbers, "text": numbers}))
    began = time.monotonic()
    embed_corpus(
        stage=model.name, source=place, source_folder="texts", output=place, done_folder=model.name, model=model,
        side="document", pool=PoolConfig(cpus=1), shard_rows=SHARD_ROWS, columns=TextColumns(texts=("text",)),
        tokenize_apart=apart,
    )  # fmt: skip
    state = Place(str(model.folder)).read_json(f"{model.name}.json")
    return {
        "idle_share": round(state["idle"] / (state["idle"] + state["busy"]), 4),
        "busy_seconds": round(state["busy"], 2),
        "idle_seconds": round(state["idle"], 2),
        "seconds": round(time.monotonic() - began, 1),
    }


def vectors_of(place: Place, folder: str) -> pa.Table:
    return pa.concat_tables(
        [place.read_table(name, ["id", "vector"]) for name in place.names(folder, ".parquet")]
    )


def compare(shards: int, old_shards: int, device_rate: float, core_rate: float, cores: int) -> dict[str, Any]:
    from embedloom.cluster.session import ray_session

    with tempfile.TemporaryDirectory(prefix="el-", dir="/tmp") as name:
        folder, sides, tables = Path(name), {}, {}
        ways = {
            "apart": SimulatedModel("apart", device_rate, core_rate, 65_536, 1, 2, folder),
            "in-the-actor": SimulatedModel("in-the-actor", device_rate, core_rate, 4096, 0, 1, folder),
        }
        # One CPU for the actor, one for writing, the others tokenize.
        profile = Profile(logical_cpus=cores + 2, object_store_mib=512)
        with ray_session(profile, AuthConfig(token_path=str(folder / "token"))):
            warm = replace(ways["apart"], name="warm-up")
            embed_texts(warm, Place(str(folder / "warm-up")), 2 * cores * SHARD_ROWS, True)
            for way, model in ways.items():
                count = (model.warm_shards + (shards if way == "apart" else old_shards)) * SHARD_ROWS
                place = Place(str(folder / way))
                sides[way] = embed_texts(model, place, count, way == "apart")
                tables[way] = vectors_of(place, way)
                sys.stderr.write(f"{way}: {sides[way]}\n")
    both = min(table.num_rows for table in tables.values())
    ours, theirs = sides["apart"]["idle_share"], sides["in-the-actor"]["idle_share"]
    return {
        "name": "feeding",
        "ours": ours,
        "peer": theirs,
        "peer_name": "tokenizing in the actor, batches of 4,096 tokens, each waited for",
        "ratio": round(theirs / max(ours, 1e-4), 1),
        "unit": "share of the time in which the device waits",
        "equal": tables["apart"].slice(0, both).equals(tables["in-the-actor"].slice(0, both)),
        "work": {
            "tokens": shards * SHARD_ROWS * TEXT_TOKENS, "device_tokens_per_second": device_rate,
            "core_tokens_per_second": core_rate, "tokenizing_cores": cores, "sides": sides,
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of the work")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--device-rate", type=float, default=1e6, help="tokens a second of the device")
    parser.add_argument(
        "--core-rate", type=float, default=0.27e6, help="tokens a second of a tokenizing core"
    )
    parser.add_argument("--cores", type=int, default=8, help="tokenizing cores")
    options = parser.parse_args()
    shards, old_shards = (12, 3) if options.quick else (60, 12)
    result = compare(shards, old_shards, options.device_rate, options.core_rate, options.cores)
    for way, side in result["work"]["sides"].items():
        print(
            f"{way}: the device idles {side['idle_share']:.1%} of {side['busy_seconds'] + side['idle_seconds']:.1f} s"
        )
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    import feeding  # the classes as the actors find them, by the module's name

    feeding.main()
