"""The clients that people use, against a running endpoint with keys: their vectors and scores are the offline ones.

    python tests/drills/serve_clients.py [--model minilm-l6]

The model is served with an instruction before queries, so that a client on the wrong side is seen. The clients are
installed into an environment of their own (.bench/clients), as their pins are not ours; openai's JavaScript client runs in
Node and, bundled, in a headless Chromium on a page of an allowed origin (apt-get install chromium-headless-shell).
"""

import argparse
import asyncio
import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[2] / ".bench" / "clients"
NODE = Path(__file__).parents[2] / ".bench" / "clients-node"
PACKAGES = (
    "openai>=3", "cohere>=5.21", "litellm>=1.110", "langchain-openai>=1", "langchain-cohere>=0.6", "haystack-ai>=3",
    "llama-index-embeddings-openai>=0.5", "llama-index-embeddings-openai-like>=0.4",
    "llama-index-embeddings-text-embeddings-inference>=0.6", "huggingface_hub>=1", "voyageai>=0.5",
)  # fmt: skip
NODE_PACKAGES = ("openai@6", "esbuild@0.28", "puppeteer-core@24")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
KEY = "sk-of-this-drill"
TEXTS = [
    "Returns the shortest path between two nodes.", "open a file", "größer, 日本語", " ", "a " * 40, "half a pair \ufffd",
]  # fmt: skip
QUERY = "shortest path"
QUERIES = [QUERY, "read lines"]

# What a client is asked for: rows of TEXTS (or those that are not blank) as documents, rows of QUERIES as queries, the
# scores of TEXTS for QUERY, or the similarities of TEXTS to the first of them.
Answers = dict[str, dict[str, Any]]
SCRIPT = """
import OpenAI from "openai";
export async function ask(url, key, name, texts, queries) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, dangerouslyAllowBrowser: true });
  const cut = texts.map((text) => text.replace("\\ufffd", "\\ud83d")); // half an emoji: escaped by JSON.stringify
  const rows = async (model, input, more) =>
    (await client.embeddings.create({ model, input, ...more })).data.map((item) => Array.from(item.embedding));
  return {
    documents: await rows(name, cut),
    floats: await rows(name, cut, { encoding_format: "float" }),
    queries: await rows(`${name}-query`, queries),
  };
}
"""


class Asker:
    """Asks every client; what one fails with is kept beside its name."""

    def __init__(self, root: str, name: str) -> None:
        self.root, self.url, self.name = root, f"{root}/v1", name
        self.answers: Answers = {}

    def __call__(self, client: str, kind: str, ask: Callable[[], Any]) -> None:
        """Keep an answer of ``kind``: documents, queries, scores, or refusal (whose text is kept)."""
        try:
            answer = ask()
        except Exception as error:  # whatever a client fails with is what the drill is there to show
            answer = f"{type(error).__name__}: {error}"[:600]
            if kind != "refusal":
                kind, answer = "failure", f"{kind}: {answer}"
        self.answers.setdefault(client, {})[kind] = answer

    def openai(self) -> None:
        import openai

        client = openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0)

        def rows(model: str, texts: list[str], **more: Any) -> Any:
            return [
                item.embedding for item in client.embeddings.create(model=model, input=texts, **more).data
            ]

        async def rows_async() -> Any:
            async with openai.AsyncOpenAI(base_url=self.url, api_key=KEY, max_retries=0) as other:
                reply = await other.embeddings.create(model=self.name, input=TEXTS)
                return [item.embedding for item in reply.data]

        self("openai", "documents", lambda: rows(self.name, TEXTS))
        self("openai", "queries", lambda: rows(f"{self.name}-query", QUERIES))
        self(
            "openai, input_type",
            "queries",
            lambda: rows(self.name, QUERIES, extra_body={"input_type": "query"}),
        )
        self("openai, float", "documents", lambda: rows(self.name, TEXTS, encoding_format="float"))
        self("openai async", "documents", lambda: asyncio.run(rows_async()))

    def cohere(self) -> None:
        import cohere

        first, second = (kind(api_key=KEY, base_url=self.root) for kind in (cohere.Client, cohere.ClientV2))

        def embedded(texts: list[str], kind: str) -> Any:
            asked = {"model": self.name, "texts": texts, "input_type": kind, "truncate": "END"}
            return second.embed(**asked, embedding_types=["float"]).embeddings.float_

        def ranked(client: Any, **more: Any) -> Any:
            return client.rerank(
                model=self.name, query=QUERY, documents=TEXTS, top_n=len(TEXTS), **more
            ).results

        self("cohere v2", "documents", lambda: embedded(TEXTS, "search_document"))
        self("cohere v2", "queries", lambda: embedded(QUERIES, "search_query"))
        self("cohere v2", "scores", lambda: by_index(ranked(second, max_tokens_per_doc=4096, priority=1)))
        self(
            "cohere v1", "documents",
            lambda: first.embed(model=self.name, texts=TEXTS, input_type="search_document").embeddings,
        )  # fmt: skip
        more = {"rank_fields": ["text"], "return_documents": True, "max_chunks_per_doc": 10}
        self("cohere v1", "scores", lambda: by_index(ranked(first, **more)))

    def litellm(self) -> None:
        import litellm

        def rows(provider: str, base: str, texts: list[str], suffix: str = "") -> Any:
            model = f"{provider}/{self.name}{suffix}"
            # For Cohere it says search_document by itself, which holds over what the name stands for.
            more = {"input_type": "search_query"} if suffix and provider == "cohere" else {}
            reply = litellm.embedding(model=model, input=texts, api_base=base, api_key=KEY, **more)
            return [item["embedding"] for item in reply.data]

        def ranked(provider: str, base: str) -> Any:
            model = f"{provider}/{self.name}"
            reply = litellm.rerank(
                model=model, query=QUERY, documents=TEXTS, top_n=len(TEXTS), api_base=base, api_key=KEY
            )
            return by_index(reply.results)

        for provider in ("openai", "hosted_vllm", "cohere", "infinity", "jina_ai"):
            for base in (self.root, self.url):
                where = "" if base == self.root else " at /v1"
                self(
                    f"litellm {provider}/{where}", "documents", functools.partial(rows, provider, base, TEXTS)
                )
                self(
                    f"litellm {provider}/{where}",
                    "queries",
                    functools.partial(rows, provider, base, QUERIES, "-query"),
                )
        for provider, base in (
            ("hosted_vllm", self.root), ("hosted_vllm", self.url), ("cohere", self.root), ("infinity", self.root),
            ("jina_ai", self.root), ("jina_ai", self.url),
        ):  # fmt: skip
            where = "" if base == self.root else " at /v1"
            self(f"litellm {provider}/{where}", "scores", functools.partial(ranked, provider, base))

    def langchain(self) -> None:
        from langchain_cohere import CohereEmbeddings, CohereRerank
        from langchain_openai import OpenAIEmbeddings

        asked = {"base_url": self.url, "api_key": KEY, "max_retries": 0}
        texts: Any = OpenAIEmbeddings(model=self.name, check_embedding_ctx_length=False, **asked)
        queries: Any = OpenAIEmbeddings(model=f"{self.name}-query", check_embedding_ctx_length=False, **asked)
        usual: Any = OpenAIEmbeddings(model=self.name, **asked)
        self("LangChain", "documents", lambda: texts.embed_documents(TEXTS))
        self("LangChain", "queries", lambda: [queries.embed_query(query) for query in QUERIES])
        self("LangChain by default", "refusal", lambda: usual.embed_documents(TEXTS))
        of_cohere: Any = {"cohere_api_key": KEY, "base_url": self.root, "model": self.name}
        self("LangChain's Cohere", "documents", lambda: CohereEmbeddings(**of_cohere).embed_documents(TEXTS))
        self(
            "LangChain's Cohere",
            "queries",
            lambda: [CohereEmbeddings(**of_cohere).embed_query(q) for q in QUERIES],
        )
        self(
            "LangChain's Cohere",
            "scores",
            lambda: by_index(CohereRerank(**of_cohere, top_n=9).rerank(TEXTS, QUERY)),
        )

    def llama_index(self) -> None:
        from llama_index.embeddings.openai import OpenAIEmbedding
        from llama_index.embeddings.openai_like import OpenAILikeEmbedding
        from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

        asked = {"api_base": self.url, "api_key": KEY, "max_retries": 0}
        for kind in (OpenAIEmbedding, OpenAILikeEmbedding):
            texts, queries = (
                kind(model_name=self.name, **asked),
                kind(model_name=f"{self.name}-query", **asked),
            )
            client = f"LlamaIndex {kind.__name__}"
            self(client, "documents", functools.partial(texts.get_text_embedding_batch, TEXTS))
            self(client, "queries", lambda: [queries.get_query_embedding(query) for query in QUERIES])  # noqa: B023
        tei: Any = TextEmbeddingsInference(model_name=self.name, base_url=self.root, auth_token=KEY)
        # It strips texts, and TEI takes no empty ones.
        filled = [text for text in TEXTS if text.strip()]
        self("LlamaIndex TextEmbeddingsInference", "filled", lambda: tei.get_text_embedding_batch(filled))

    def haystack(self) -> None:
        from haystack import Document
        from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
        from haystack.utils import Secret

        asked: Any = {"api_key": Secret.from_token(KEY), "api_base_url": self.url}
        documents = OpenAIDocumentEmbedder(model=self.name, progress_bar=False, **asked)
        queries = OpenAITextEmbedder(model=f"{self.name}-query", **asked)
        found = [Document(content=text) for text in TEXTS]
        self("Haystack", "documents", lambda: [item.embedding for item in documents.run(found)["documents"]])
        self("Haystack", "queries", lambda: [queries.run(query)["embedding"] for query in QUERIES])

    def hugging_face(self) -> None:
        from huggingface_hub import InferenceClient

        client = InferenceClient(model=self.root, token=KEY)
        pairs = InferenceClient(model=f"{self.root}/similarity", token=KEY)
        self("TEI's (huggingface_hub)", "documents", lambda: client.feature_extraction(TEXTS).tolist())
        self(
            "TEI's (huggingface_hub)", "queries",
            lambda: [
                client.feature_extraction(query, prompt_name="query", normalize=True, truncate=True)[0].tolist()
                for query in QUERIES
            ],
        )  # fmt: skip
        self(
            "TEI's (huggingface_hub)", "similarities",
            lambda: pairs.sentence_similarity(TEXTS[0], other_sentences=TEXTS),
        )  # fmt: skip

    def voyage(self) -> None:
        import voyageai

        client = voyageai.Client(api_key=KEY, base_url=self.url)
        self(
            "voyageai",
            "documents",
            lambda: client.embed(TEXTS, model=self.name, input_type="document").embeddings,
        )
        self(
            "voyageai",
            "queries",
            lambda: client.embed(QUERIES, model=self.name, input_type="query").embeddings,
        )
        self(
            "voyageai", "scores",
            lambda: by_index(client.rerank(QUERY, TEXTS, model=self.name, top_k=len(TEXTS)).results),
        )  # fmt: skip

    def plain_http(self) -> None:
        """Bodies as products send them that are no libraries."""
        import httpx

        bearer, azure = {"Authorization": f"Bearer {KEY}"}, {"api-key": KEY}

        def post(path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
            reply = httpx.post(f"{self.root}{path}", json=body, headers=headers, trust_env=False, timeout=60)
            if reply.status_code != 200:
                raise RuntimeError(f"{reply.status_code} {reply.text}")
            return reply.json()

        def rows(
            name: str, texts: list[str], headers: dict[str, str], path: str = "/v1/embeddings", **more: Any
        ) -> Any:
            return [
                item["embedding"]
                for item in post(path, {"model": name, "input": texts, **more}, headers)["data"]
            ]

        body = {"model": self.name, "query": QUERY, "documents": TEXTS, "top_n": len(TEXTS)}
        self("Open WebUI", "documents", lambda: rows(self.name, TEXTS, bearer))
        self("Open WebUI", "queries", lambda: rows(f"{self.name}-query", QUERIES, bearer))
        self("Open WebUI", "scores", lambda: by_index(post("/v1/rerank", body, bearer)["results"]))
        self("Dify", "documents", lambda: rows(self.name, TEXTS, bearer, encoding_format="float"))
        self(
            "Dify",
            "scores",
            lambda: by_index(post("/v1/rerank", {**body, "return_documents": True}, bearer)["results"]),
        )
        self(
            "AnythingLLM", "queries",
            lambda: [unpack(row) for row in rows(f"{self.name}-query", QUERIES, bearer, encoding_format="base64")],
        )  # fmt: skip
        self("Azure's header", "documents", lambda: rows(self.name, TEXTS, azure, "/v1//embeddings/"))
        tei = {"query": QUERY, "texts": TEXTS, "raw_scores": False, "return_text": False, "truncate": True}
        self("TEI's rerank", "scores", lambda: by_index(post("/rerank", tei, bearer), "score"))


def by_index(results: Any, score: str = "relevance_score") -> list[float]:
    """Scores in the order of the documents; results are objects or mappings, best first."""
    pairs = [
        (item["index"], item[score]) if isinstance(item, dict) else (item.index, item.relevance_score)
        for item in results
    ]
    return [value for _, value in sorted(pairs)]


def unpack(row: str) -> list[float]:
    """A vector in base64."""
    return array("f", base64.b64decode(row)).tolist()


def ask_all(root: str, name: str) -> Answers:
    """Every Python client's answers; runs in their own environment."""
    asker = Asker(root, name)
    asker.litellm()  # first: it brings OpenAI's vocabulary, which LangChain would fetch from the net
    for client in (
        asker.openai, asker.cohere, asker.langchain, asker.llama_index, asker.haystack, asker.hugging_face, asker.voyage,
        asker.plain_http,
    ):  # fmt: skip
        client()
    return asker.answers


def install() -> Path:
    """The Python clients' environment; made anew where the packages wanted are others."""
    python, wanted = HOME / "bin" / "python", "\n".join(PACKAGES)
    mark = HOME / ".installed"
    if not mark.is_file() or mark.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", str(HOME)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True, stdout=sys.stderr
        )
        mark.write_text(wanted)
    return python


def bundle() -> Path:
    """A folder with openai's JavaScript client as a module for Node and pages, and a page."""
    NODE.mkdir(parents=True, exist_ok=True)
    if not (NODE / "node_modules" / "openai").is_dir():
        subprocess.run(
            ["npm", "install", "--silent", *NODE_PACKAGES], cwd=NODE, check=True, stdout=sys.stderr
        )
    (NODE / "ask.mjs").write_text(SCRIPT)
    command = [
        "npx",
        "esbuild",
        "ask.mjs",
        "--bundle",
        "--format=esm",
        "--outfile=page/ask.mjs",
        "--log-level=error",
    ]
    subprocess.run(command, cwd=NODE, check=True)
    (NODE / "page" / "index.html").write_text("<!doctype html><title>drill</title>")
    (NODE / "run.mjs").write_text(
        """
const [where, browser, ...asked] = process.argv.slice(2);
const [url, key, name, texts, queries] = [...asked.slice(0, 3), JSON.parse(asked[3]), JSON.parse(asked[4])];
let found;
if (where === "node") {
  found = await (await import("./page/ask.mjs")).ask(url, key, name, texts, queries);
} else {
  const { default: puppeteer } = await import("puppeteer-core");
  const chrome = await puppeteer.launch({ executablePath: browser, args: ["--no-sandbox", "--no-proxy-server"] });
  try {
    const page = await chrome.newPage();
    await page.goto(where);
    found = await page.evaluate(
      async (...all) => (await import("/ask.mjs")).ask(...all), url, key, name, texts, queries,
    );
  } finally {
    await chrome.close();
  }
}
console.log(JSON.stringify(found));
"""
    )
    return NODE


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The origin of a page server over a folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    folder.mkdir(parents=True, exist_ok=True)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def ask_javascript(root: str, name: str, origin: str, browser: str) -> Answers:
    """openai's JavaScript client in Node and on a page of an allowed origin."""
    answers: Answers = {}
    for client, where in (("openai in Node", "node"), ("openai in Chromium", f"{origin}/index.html")):
        command = ["node", "run.mjs", where, browser, root, KEY, name, json.dumps(TEXTS), json.dumps(QUERIES)]
        run = subprocess.run(command, cwd=NODE, capture_output=True, text=True, check=False, timeout=180)
        answers[client] = json.loads(run.stdout) if run.returncode == 0 else {"failure": run.stderr[-600:]}
    return answers


def check(answers: Answers, encoder: Any) -> tuple[dict[str, float], list[str]]:
    """The least cosine, or greatest difference of a score, of every client, and what is wrong."""
    import numpy as np

    documents, queries = encoder.embed(TEXTS, "document"), encoder.embed(QUERIES, "query")
    scores = documents @ queries[0]
    scores[[not text.strip() for text in TEXTS]] = -1.0  # a blank one ranks last
    values = {"scores": scores, "similarities": documents @ documents[0]}
    vectors = {
        "documents": documents, "queries": queries, "filled": documents[[bool(text.strip()) for text in TEXTS]],
    }  # fmt: skip
    figures: dict[str, float] = {}
    problems: list[str] = []
    for client, kinds in answers.items():
        for kind, answer in kinds.items():
            label = f"{client}: {kind}"
            if kind == "failure":
                problems.append(f"{label}: {answer}")
            elif kind == "refusal":
                if "check_embedding_ctx_length=False" not in str(answer):
                    problems.append(f"{label}: {str(answer)[:300]}")
            elif kind in values:
                figures[label] = float(np.abs(np.asarray(answer) - values[kind]).max())
                problems += [f"{label}: differs by {figures[label]}"] if not figures[label] < 1e-4 else []
            else:
                expected, rows = vectors[kind], np.asarray(answer, dtype=np.float64)
                lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
                figures[label] = float(((rows * expected).sum(axis=1) / lengths).min())
                problems += [f"{label}: cosine {figures[label]}"] if not figures[label] >= 0.9999 else []
    return figures, problems


def prompted_model(model: str, folder: Path) -> Path:
    """A copy of a model with an instruction before its queries, so that the two sides differ."""
    from embedloom.core.prompting import DEFAULT_INSTRUCTIONS, NEMOTRON_TEMPLATE
    from embedloom.encoder.registry import open_model, resolve_model

    source = resolve_model(model)
    copy = Path(shutil.copytree(source, folder / "model"))
    texts = {"template": NEMOTRON_TEMPLATE, "instructions": dict(DEFAULT_INSTRUCTIONS)}
    open_model(source).contract.model_copy(update=texts).save(copy)
    return copy


def drill(model: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the figure of every client, and what is wrong with them."""
    import hashlib

    from serve_process import NAME, endpoint

    from embedloom.encoder.model import Encoder

    python = install()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None or shutil.which("npm") is None:
        return {"drill": "serve_clients"}, [
            "no npm or no Chromium; apt-get install npm chromium-headless-shell"
        ]
    page = bundle() / "page"
    copy = prompted_model(model, folder)
    encoder = Encoder.load(copy, dtype="float32")
    os.environ["DRILL_KEYS"] = f"drill: {{sha256: {hashlib.sha256(KEY.encode()).hexdigest()}}}"
    with served(page) as origin:
        settings = (
            f"models={{{NAME}-query: {{side: query, truncate: end}}}}", f"allowed_origins=[{origin}]",
            "keys_variable=DRILL_KEYS",
        )  # fmt: skip
        with endpoint(str(copy), folder, settings=settings) as running:
            environment = os.environ | {
                "NO_PROXY": "*",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "HF_HUB_OFFLINE": "0",
            }
            command = [str(python), __file__, "--ask", running.url, "--name", NAME]
            run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if run.returncode:
                return {"drill": "serve_clients"}, [run.stderr[-1000:]]
            answers = json.loads(run.stdout.splitlines()[-1])
            answers |= ask_javascript(running.url, NAME, origin, browser)
    for kinds in answers.values():
        if "floats" in kinds:
            kinds["documents"] = kinds["documents"] if kinds["documents"] == kinds.pop("floats") else []
    figures, problems = check(answers, encoder)
    result = {"drill": "serve_clients", "model": model, "clients": len(answers), "answers": len(figures)}
    cosines = [value for label, value in figures.items() if label.endswith(("documents", "queries"))]
    return {**result, "lowest_cosine": round(min(cosines, default=0.0), 7)}, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--ask", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        print(json.dumps(ask_all(options.ask, options.name)))
        return
    from serve_process import finish

    with tempfile.TemporaryDirectory(prefix="el-drill-", dir="/tmp") as folder:
        finish(*drill(options.model, Path(folder)))


if __name__ == "__main__":
    main()
