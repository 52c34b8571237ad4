"""vLLM as a TextEngine, inside one actor process.

On CPU the engine runs in the actor's own process: two processes fewer than vLLM's default layout, a start of
seconds instead of twenty, and a schedule that depends on nothing but the requests. That last point is what
makes a shard's texts come out the same when it is generated again after a crash.

vLLM is imported by the constructor, not by this module: it reads its thread and process settings from the
environment, which only the actor knows, and the driver that merely names this class must stay light.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedloom.engines.protocol import ENGINE_CUT, ENGINE_FINISHED, GenerationRequest, GenerationResult
from embedloom.engines.requirements import require_engine
from embedloom.errors import DataError, StageError

CPU_SEQUENCES = 32  # decoded together; more only lengthens a step on a few cores
CPU_KV_CACHE_BYTES = 2**30
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16"}


class VLLMEngine:
    """A vLLM model that answers chat requests, optionally as JSON of a given schema."""

    def __init__(
        self, *, model_folder: Path, max_model_tokens: int, threads: int, gpu: bool, tensor_parallel: int = 1
    ) -> None:
        """Load the model.

        Args:
            model_folder: Hugging Face folder with weights, tokenizer and chat template.
            max_model_tokens: prompt and output together; longer requests are refused one by one.
            threads: compute threads (CPU only).
            gpu: whether this actor was given GPUs.
            tensor_parallel: GPUs the model spans.

        Raises:
            MissingDependency: vLLM is not installed.
            DataError: the folder is no model vLLM can load, or its tokenizer has no chat template.
        """
        require_engine(gpu)
        _set_environment(gpu, threads)
        from vllm import LLM

        options = _gpu_options(tensor_parallel) if gpu else _cpu_options()
        try:
            self._llm = LLM(
                model=str(model_folder),
                max_model_len=max_model_tokens,
                # With cached prefixes a prompt's first forward pass covers fewer tokens, which rounds
                # differently, so a shard run again by a fresh engine could get other texts.
                enable_prefix_caching=False,
                use_tqdm_on_load=False,
                structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
                **options,
            )
        except (ValueError, OSError) as error:
            raise DataError(f"{model_folder}: vLLM cannot load this model: {_first_line(error)}") from error
        self._max_model_tokens = max_model_tokens
        self._tokenizer: Any = self._llm.get_tokenizer()
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{model_folder}: its tokenizer has no chat template; a generator must be an instruction-tuned model"
            )
        if not gpu:
            _compile_grammars_in_order(self._llm)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Write one text per request; see TextEngine.

        Raises:
            DataError: vLLM cannot serve the schema or a sampling parameter.
            StageError: vLLM died on the batch.
        """
        results: dict[int, GenerationResult] = {}
        prompts: dict[int, list[int]] = {}
        for position, request in enumerate(requests):
            prompt = self._prompt_tokens(request)
            room = self._max_model_tokens - request.max_tokens
            if len(prompt) > room:
                message = f"prompt has {len(prompt)} tokens, {room} fit beside {request.max_tokens} new ones"
                results[position] = GenerationResult.failed(request, message, len(prompt))
            else:
                prompts[position] = prompt
        if prompts:
            served = [requests[position] for position in prompts]
            written = self._run(list(prompts.values()), served)
            results.update(zip(prompts, written, strict=True))
        return [results[position] for position in range(len(requests))]

    def _prompt_tokens(self, request: GenerationRequest) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            list(request.messages), tokenize=False, add_generation_prompt=True
        )
        # The template writes the special tokens itself.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _run(self, prompts: list[list[int]], requests: list[GenerationRequest]) -> list[GenerationResult]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        from vllm.exceptions import VLLMClientError

        try:
            outputs = self._llm.generate(inputs, [_sampling(request) for request in requests], use_tqdm=False)
        except VLLMClientError as error:  # lengths were checked, so it is the schema or a sampling parameter
            raise DataError(f"vLLM refuses these requests: {_first_line(error)}") from error
        except Exception as error:  # vLLM raises many types; none of them is about one request alone
            message = f"vLLM failed on a batch of {len(requests)} requests: {_first_line(error)}"
            raise StageError(message) from error
        return [_result(request, output) for request, output in zip(requests, outputs, strict=True)]


def _set_environment(gpu: bool, threads: int) -> None:
    """What vLLM reads from the environment when it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # below it stands one line per converted weight
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if gpu:
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Binding picks the same cores for every engine of a pool; the pool's thread counts share them out instead.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _cpu_options() -> dict[str, Any]:
    return {
        "dtype": "bfloat16" if _has_bf16() else "float32",
        "enforce_eager": True,  # compiling takes over a minute and gains nothing on small batches
        "max_num_seqs": CPU_SEQUENCES,
        "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
        # A prompt split over two steps makes vLLM 0.32 rewind the request's random generator, which torch's
        # CPU generator cannot do: the engine dies as soon as seeded requests fill a step.
        "enable_chunked_prefill": False,
    }


def _gpu_options(tensor_parallel: int) -> dict[str, Any]:
    return {"dtype": "auto", "tensor_parallel_size": tensor_parallel}


def _has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; emulated it is several times slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return bool(_BF16_CPU_FLAGS & set(flags.split()))


def _compile_grammars_in_order(llm: Any) -> None:
    """Compile each request's grammar where it arrives instead of in a background thread.

    In the background a request joins the batch whenever its grammar happens to be ready, so batches, and with
    them the rounding of every logit, would differ from run to run. vLLM itself does this for its
    ``external_launcher``, for the same reason.
    """
    manager = llm.llm_engine.engine_core.engine_core.structured_output_manager
    if not hasattr(manager, "_use_async_grammar_compilation"):
        raise StageError(
            "this vLLM compiles grammars in an unknown way; the version in the lock file is needed"
        )
    manager._use_async_grammar_compilation = False


def _sampling(request: GenerationRequest) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        seed=request.seed,
        structured_outputs=StructuredOutputsParams(json=request.json_schema) if request.json_schema else None,
    )


def _result(request: GenerationRequest, output: Any) -> GenerationResult:
    completion = output.outputs[0]
    prompt_tokens, output_tokens = len(output.prompt_token_ids or ()), len(completion.token_ids)
    if completion.finish_reason not in (ENGINE_FINISHED, ENGINE_CUT):
        return GenerationResult.failed(
            request, f"vLLM ended with {completion.finish_reason!r}", prompt_tokens
        )
    return GenerationResult(
        request.id, completion.text, completion.finish_reason, prompt_tokens, output_tokens
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
