"""A model folder as vLLM's pooling runner reads it, in a process of its own.

vLLM reads its settings from the environment when it is imported, and takes threads and memory as it likes; nothing of
that may touch a training driver. Run as ``python -m embedloom.encoder.vllm_reader REQUEST ANSWER``, two JSON files.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedloom.errors import StageError, last_line

_PACKAGE_ROOT = Path(__file__).parents[2]
_TIMEOUT_SECONDS = 1800  # loading 16 GB from a cold disk included
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # In one process with as many threads as the driver has: on a CPU, two processes fewer and a start of seconds.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

Read = tuple[list[list[int]], list[list[float]]]  # token ids and vectors


def read_with_vllm(folder: Path, texts: Sequence[str], max_tokens: Sequence[int]) -> Read:
    """Token ids and vectors that vLLM makes of texts.

    Args:
        folder: model folder.
        texts: formatted by the contract.
        max_tokens: of each text.

    Raises:
        StageError: vLLM cannot load the folder or embed with it.
    """
    with tempfile.TemporaryDirectory(prefix="embedloom-vllm-") as scratch:
        request, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
        content = {"folder": str(folder), "texts": list(texts), "max_tokens": list(max_tokens)}
        request.write_text(json.dumps(content))
        path = os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "embedloom.encoder.vllm_reader", str(request), str(answer)]
        try:
            process = subprocess.run(
                command, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path}, capture_output=True, text=True,
                timeout=_TIMEOUT_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise StageError(f"{folder}: vllm did not answer in {_TIMEOUT_SECONDS} seconds") from error
        if process.returncode != 0:
            raise StageError(f"{folder}: vllm cannot read this model: {_reason(process.stderr)}")
        found = json.loads(answer.read_text())
    return found["ids"], found["vectors"]


def _reason(stderr: str) -> str:
    """The last line that says what was wrong; pydantic ends its errors with where to read about them."""
    said = [line for line in stderr.splitlines() if "For further information" not in line]
    return last_line("\n".join(said) or "no message")


def _embed(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from vllm import LLM

    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    options = {} if gpu else {"max_num_seqs": 8, "enable_chunked_prefill": False}
    llm = LLM(
        model=request["folder"], runner="pooling", dtype="float32", enforce_eager=True,
        max_model_len=max(request["max_tokens"]), **options,
    )  # fmt: skip
    ids, vectors = [], []
    for text, limit in zip(request["texts"], request["max_tokens"], strict=True):
        # One by one: what a text's neighbours do to it is another question.
        (output,) = llm.embed([text], use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": limit})
        ids.append(list(output.prompt_token_ids))
        vectors.append([float(value) for value in output.outputs.embedding])
    return {"ids": ids, "vectors": vectors}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_embed(json.loads(Path(sys.argv[1]).read_text()))))
