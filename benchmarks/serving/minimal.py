"""What a CPU user builds in an afternoon: one library that encodes, behind the least FastAPI there is.

    python minimal.py ENGINE MODEL PORT THREADS

Run by the environment that ``servers.py`` makes in .bench/int8, never by the project's own. Engines: ``onnx-int8``
(sentence-transformers on ONNX Runtime, dynamic int8 by its own exporter), ``openvino`` (the same on OpenVINO, float32) and
``fastembed`` (float32, as its own MiniLM is; its hub cannot be asked here, so it gets the exported file as a custom model).
Texts are encoded one request at a time, in one thread beside the event loop: without it ONNX sessions of all requests
fight for the cores.
"""

import asyncio
import hashlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

Encode = Callable[[list[str]], Any]  # texts to float32 [n, dimension]
_INT8 = "avx512_vnni"


def export(model: Path, home: Path) -> Path:
    """The model folder with ONNX files, float32 and int8; exported once."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.backend import export_dynamic_quantized_onnx_model

    folder = home / "onnx"
    if not (folder / "onnx" / f"model_qint8_{_INT8}.onnx").is_file():
        exported = SentenceTransformer(str(model), backend="onnx", model_kwargs={"export": True})
        exported.save_pretrained(str(folder))
        export_dynamic_quantized_onnx_model(exported, _INT8, str(folder))
    return folder


def onnx_int8(model: Path, home: Path, threads: int) -> Encode:
    """sentence-transformers on ONNX Runtime, int8."""
    import onnxruntime
    from sentence_transformers import SentenceTransformer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    files = {"file_name": f"onnx/model_qint8_{_INT8}.onnx", "session_options": options}
    found = SentenceTransformer(str(export(model, home)), backend="onnx", model_kwargs=files)
    return lambda texts: found.encode(texts, normalize_embeddings=True)


def openvino(model: Path, home: Path, threads: int) -> Encode:
    """sentence-transformers on OpenVINO, float32."""
    from sentence_transformers import SentenceTransformer

    folder = home / "openvino"
    if not (folder / "openvino" / "openvino_model.xml").is_file():
        SentenceTransformer(str(model), backend="openvino", model_kwargs={"export": True}).save_pretrained(
            str(folder)
        )
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    found = SentenceTransformer(str(folder), backend="openvino", model_kwargs={"ov_config": settings})
    return lambda texts: found.encode(texts, normalize_embeddings=True)


def fastembed(model: Path, home: Path, threads: int) -> Encode:
    """fastembed, float32, on the file that sentence-transformers exported."""
    import numpy as np
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        "bench/bench", PoolingType.MEAN, True, ModelSource(hf="bench/bench"), 384, "onnx/model.onnx"
    )
    found = TextEmbedding("bench/bench", specific_model_path=str(export(model, home)), threads=threads)
    return lambda texts: np.stack(list(found.embed(texts)))


ENGINES = {"onnx-int8": onnx_int8, "openvino": openvino, "fastembed": fastembed}


def application(encode: Encode) -> FastAPI:
    """OpenAI's two routes, as far as the load needs them."""
    app, thread = FastAPI(), ThreadPoolExecutor(1)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "bench", "object": "model"}]}

    @app.post("/v1/embeddings")
    async def embeddings(body: dict[str, Any]) -> dict[str, Any]:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        vectors = await asyncio.get_running_loop().run_in_executor(thread, encode, texts)
        data = [
            {"object": "embedding", "index": index, "embedding": vector.tolist()}
            for index, vector in enumerate(vectors)
        ]
        return {"object": "list", "model": "bench", "data": data}

    return app


if __name__ == "__main__":
    engine, model, port, threads = sys.argv[1:]
    # By path: the registry's models all end in a folder named `model`.
    key = hashlib.blake2b(model.encode(), digest_size=4).hexdigest()
    home = Path(__file__).parents[2] / ".bench" / "models" / key
    encoder = ENGINES[engine](Path(model), home, int(threads))
    encoder(["warm up"])
    uvicorn.run(application(encoder), host="127.0.0.1", port=int(port), log_level="warning")
