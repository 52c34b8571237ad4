"""LangChain's and LlamaIndex's OpenAI embeddings, and curl, against a running endpoint: the vectors are the offline ones.

    python tests/drills/serve_clients.py [--model minilm-l6]

The two libraries are installed into an environment of their own (.bench/clients), as their pins are not ours. LangChain
is told ``check_embedding_ctx_length=False``, its documented setting for servers that are not OpenAI's: else it sends
token ids of OpenAI's own vocabulary, which mean other words to any other model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[2] / ".bench" / "clients"
PACKAGES = ("langchain-openai>=1", "llama-index-embeddings-openai>=0.5")
TEXTS = ["open a file", "Returns the shortest path between two nodes.", "größer, 日本語", "a " * 40]


def ask(url: str, name: str) -> dict[str, Any]:
    """Both libraries' vectors; runs in their own environment."""
    from langchain_openai import OpenAIEmbeddings
    from llama_index.embeddings.openai import OpenAIEmbedding

    chain: Any = OpenAIEmbeddings(model=name, base_url=url, api_key="none", check_embedding_ctx_length=False)
    index: Any = OpenAIEmbedding(model_name=name, api_base=url, api_key="none")
    return {
        "langchain": [*chain.embed_documents(TEXTS[1:]), chain.embed_query(TEXTS[0])],
        "llama_index": [*index.get_text_embedding_batch(TEXTS[1:]), index.get_query_embedding(TEXTS[0])],
    }


def curl(url: str, name: str) -> list[list[float]]:
    """The same by the command line."""
    body = json.dumps({"model": name, "input": [*TEXTS[1:], TEXTS[0]]})
    command = [
        "curl",
        "-sS",
        "--noproxy",
        "*",
        f"{url}/embeddings",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    reply = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return [item["embedding"] for item in reply["data"]]


def install() -> Path:
    """The clients' Python."""
    python = HOME / "bin" / "python"
    if not (HOME / ".installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(HOME)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True, stdout=sys.stderr
        )
        (HOME / ".installed").touch()
    return python


def drill(model: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the lowest cosines, and what is wrong with them."""
    import numpy as np  # the clients' own environment need not have it
    from serve_process import NAME, endpoint

    from embedloom.encoder.model import Encoder
    from embedloom.encoder.registry import resolve_model

    python = install()
    encoder = Encoder.load(resolve_model(model), dtype="float32")
    expected = encoder.embed([*TEXTS[1:], TEXTS[0]], "document")
    with endpoint(model, folder) as running:
        url = f"{running.url}/v1"
        run = subprocess.run(
            [str(python), __file__, "--ask", url, "--name", NAME], capture_output=True, text=True, check=False
        )
        if run.returncode:
            return {"drill": "serve_clients"}, [run.stderr[-1000:]]
        found = {**json.loads(run.stdout.splitlines()[-1]), "curl": curl(url, NAME)}
    cosines = {}
    for client, rows in found.items():
        vectors = np.asarray(rows)
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
        cosines[client] = round(float(((vectors * expected).sum(axis=1) / lengths).min()), 7)
    problems = [f"{client}: cosine {cosine}" for client, cosine in cosines.items() if not cosine >= 0.9999]
    return {"drill": "serve_clients", "model": model, "lowest_cosine": cosines}, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--ask", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        print(json.dumps(ask(options.ask, options.name)))
        return
    from serve_process import finish

    with tempfile.TemporaryDirectory(prefix="el-drill-", dir="/tmp") as folder:
        finish(*drill(options.model, Path(folder)))


if __name__ == "__main__":
    main()
