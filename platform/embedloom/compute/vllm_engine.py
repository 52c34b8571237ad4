"""vLLM as a TextEngine, inside one actor process, with several batches in one decoding loop."""

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Generic, Protocol, TypeVar

from embedloom.compute.generation import (
    ENGINE_CUT,
    ENGINE_FINISHED,
    EngineLostError,
    GenerationRequest,
    GenerationResult,
    require_engine,
)
from embedloom.config.synthesis import EngineOptions
from embedloom.core.hardware import has_bf16_instructions
from embedloom.errors import DataError, EmbedloomError, StageError, first_line

# Several batches in one decoding loop: a batch's last, longest text does not leave the engine idle.
#
# An engine that decodes step by step is fed from an inbox: callers hand in a batch and wait for it, the loop's own
# thread admits what has arrived and steps while anything is unfinished. A batch is admitted whole before the next
# step, so with one batch at a time the schedule depends on the batch alone.


Request = TypeVar("Request", contravariant=True)
Result = TypeVar("Result")
One = TypeVar("One")
Out = TypeVar("Out")


class Stepper(Protocol[Request, Result]):
    """An engine that decodes one token of every admitted request per step."""

    def add(self, key: str, request: Request) -> None:
        """Admit a request; raises one of our errors if it can never be served."""
        ...

    def step(self) -> list[tuple[str, Result]]:
        """Decode once; the requests that ended."""
        ...

    def drop(self, keys: Sequence[str]) -> None:
        """Forget admitted requests."""
        ...


@dataclass(slots=True)
class _Batch(Generic[One, Out]):
    requests: Sequence[One]
    answer: "Future[list[Out]]" = field(default_factory=Future)
    results: dict[int, Out] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


class ContinuousBatches(Generic[One, Out]):
    """Runs a stepper in a thread of its own; ``generate`` may be called by several threads at once."""

    def __init__(self, open_stepper: Callable[[], Stepper[One, Out]]) -> None:
        """Open the stepper in the loop's thread, where it will be used, and wait for it.

        Raises:
            Exception: whatever ``open_stepper`` raised.
        """
        self._open_stepper = open_stepper
        self._opened: Future[Stepper[One, Out]] = Future()
        self._inbox: SimpleQueue[_Batch[One, Out]] = SimpleQueue()
        self._places: dict[str, tuple[_Batch[One, Out], int]] = {}
        self._admitted = 0
        self._lock = Lock()
        self._lost: EngineLostError | None = None
        Thread(target=self._run, name="decoding", daemon=True).start()
        self._opened.result()

    def generate(self, requests: Sequence[One]) -> list[Out]:
        """Results in the order of the requests, once all of them ended.

        Raises:
            EmbedloomError: a request of this batch can never be served.
            EngineLostError: a step failed, now or earlier.
        """
        if not requests:
            return []
        batch: _Batch[One, Out] = _Batch(requests)
        with self._lock:  # or a batch could slip in after the loop has failed all it saw
            if self._lost is not None:
                raise self._lost
            self._inbox.put(batch)
        return batch.answer.result()

    def _run(self) -> None:
        try:
            stepper = self._open_stepper()
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(stepper)
        while True:
            try:
                while not self._places or not self._inbox.empty():
                    self._admit(self._inbox.get(), stepper)
                for key, result in stepper.step():
                    self._finish(key, result)
            except Exception as error:  # engines raise many types; none of them is about one batch alone
                self._fail(error)
                return

    def _admit(self, batch: _Batch[One, Out], stepper: Stepper[One, Out]) -> None:
        for position, request in enumerate(batch.requests):
            key = str(self._admitted)
            self._admitted += 1
            try:
                stepper.add(key, request)
            except EmbedloomError as error:
                stepper.drop(batch.keys)
                for known in batch.keys:
                    del self._places[known]
                batch.answer.set_exception(error)
                return
            batch.keys.append(key)
            self._places[key] = (batch, position)

    def _finish(self, key: str, result: Out) -> None:
        batch, position = self._places.pop(key)
        batch.results[position] = result
        if len(batch.results) == len(batch.requests):
            batch.answer.set_result([batch.results[number] for number in range(len(batch.requests))])

    def _fail(self, error: Exception) -> None:
        message = (
            f"the engine died with {len(self._places)} requests: {type(error).__name__}: {first_line(error)}"
        )
        with self._lock:
            self._lost = EngineLostError(message)
            waiting = {id(batch): batch for batch, _ in self._places.values()}
            while not self._inbox.empty():
                batch = self._inbox.get()
                waiting[id(batch)] = batch
        for batch in waiting.values():
            batch.answer.set_exception(self._lost)


# vLLM as a TextEngine, inside one actor process.
#
# On CPU the engine runs in the actor's own process: two processes fewer than vLLM's default layout, a start of
# seconds instead of twenty, and a schedule that depends on nothing but the requests. That last point is what
# makes a shard's texts come out the same when it is generated again after a crash.
#
# vLLM is imported by the constructor, not by this module: it reads its thread and process settings from the
# environment, which only the actor knows, and the driver that merely names this class must stay light.


CPU_SEQUENCES = 32  # decoded together; more only lengthens a step on a few cores
CPU_KV_CACHE_GIB = 1.0
_Prompt = tuple[list[int], GenerationRequest]


class VLLMEngine:
    """A vLLM model that answers chat requests, optionally as JSON of a given schema."""

    def __init__(
        self, *, model_folder: Path, options: EngineOptions, threads: int, gpu: bool, tensor_parallel: int = 1
    ) -> None:
        """Load the model.

        Args:
            model_folder: Hugging Face folder with weights, tokenizer and chat template.
            options: lengths, batch, cache and number formats; requests longer than ``max_model_tokens`` are
                refused one by one.
            threads: compute threads (CPU only).
            gpu: whether this actor was given GPUs.
            tensor_parallel: GPUs the model spans.

        Raises:
            MissingDependency: vLLM is not installed.
            DataError: the folder is no model vLLM can load, or its tokenizer has no chat template.
        """
        require_engine(gpu)
        set_environment(gpu, threads, options.batch_invariant)
        self._max_model_tokens = options.max_model_tokens
        self._encoding = Lock()

        def open_engine() -> _Steps:
            if not gpu:
                # OpenMP counts threads per calling thread, and vLLM disables the setter once it is loaded.
                import torch

                torch.set_num_threads(threads)
            self._llm = _load(model_folder, options, gpu, tensor_parallel)
            return _Steps(self._llm.llm_engine)

        self._loop: ContinuousBatches[_Prompt, GenerationResult] = ContinuousBatches(open_engine)
        # A copy: the loop's thread decodes with vLLM's own while callers encode with this one.
        self._tokenizer: Any = copy.deepcopy(self._llm.get_tokenizer())
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{model_folder}: its tokenizer has no chat template; a generator must be an instruction-tuned model"
            )

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Write one text per request; see TextEngine.

        Raises:
            DataError: vLLM cannot serve the schema or a sampling parameter.
            EngineLostError: vLLM died.
        """
        results: dict[int, GenerationResult] = {}
        prompts: dict[int, _Prompt] = {}
        for position, request in enumerate(requests):
            prompt = self._prompt_tokens(request)
            room = self._max_model_tokens - request.max_tokens
            if len(prompt) > room:
                message = f"prompt has {len(prompt)} tokens, {room} fit beside {request.max_tokens} new ones"
                results[position] = GenerationResult.failed(request, message, len(prompt))
            else:
                prompts[position] = (prompt, request)
        written = self._loop.generate(list(prompts.values()))
        results.update(zip(prompts, written, strict=True))
        return [results[position] for position in range(len(requests))]

    def _prompt_tokens(self, request: GenerationRequest) -> list[int]:
        with self._encoding:
            text = self._tokenizer.apply_chat_template(
                list(request.messages), tokenize=False, add_generation_prompt=True
            )
            # The template writes the special tokens itself.
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class _Steps:
    """vLLM's engine as a Stepper."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._served: dict[str, GenerationRequest] = {}

    def add(self, key: str, request: _Prompt) -> None:
        """Admit one request; lengths were checked, so a refusal is about the schema or a sampling parameter."""
        from vllm.exceptions import VLLMClientError

        tokens, asked = request
        try:
            self._engine.add_request(key, {"prompt_token_ids": tokens}, _sampling(asked))
        except (VLLMClientError, ValueError) as error:
            raise DataError(f"vLLM refuses these requests: {first_line(error)}") from error
        self._served[key] = asked

    def step(self) -> list[tuple[str, GenerationResult]]:
        """Decode once."""
        ended = [output for output in self._engine.step() if output.finished]
        return [(output.request_id, _result(self._served.pop(output.request_id), output)) for output in ended]

    def drop(self, keys: Sequence[str]) -> None:
        """Forget admitted requests."""
        self._engine.abort_request(list(keys))
        for key in keys:
            self._served.pop(key, None)


def _load(model_folder: Path, options: EngineOptions, gpu: bool, tensor_parallel: int) -> Any:
    from vllm import LLM

    try:
        llm = LLM(
            model=str(model_folder),
            max_model_len=options.max_model_tokens,
            # With cached prefixes a prompt's first forward pass covers fewer tokens, which rounds
            # differently, so a shard run again by a fresh engine could get other texts.
            enable_prefix_caching=options.prefix_caching,
            use_tqdm_on_load=False,
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            **(_gpu_options(options, tensor_parallel) if gpu else _cpu_options(options)),
        )
    except (ValueError, OSError) as error:
        raise DataError(f"{model_folder}: vLLM cannot load this model: {first_line(error)}") from error
    if not gpu:
        _compile_grammars_in_order(llm)
    return llm


def set_environment(gpu: bool, threads: int, batch_invariant: bool) -> None:
    """What vLLM reads from the environment when it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # below it stands one line per converted weight
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if gpu:
        os.environ["VLLM_BATCH_INVARIANT"] = str(int(batch_invariant))
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Binding picks the same cores for every engine of a pool; the pool's thread counts share them out instead.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _cpu_options(options: EngineOptions) -> dict[str, Any]:
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_bf16_instructions() else "float32"
    return {
        "dtype": dtype,
        "enforce_eager": True,  # compiling takes over a minute and gains nothing on small batches
        "max_num_seqs": options.sequences or CPU_SEQUENCES,
        "kv_cache_memory_bytes": int((options.kv_cache_gib or CPU_KV_CACHE_GIB) * 2**30),
        # A prompt split over two steps makes vLLM 0.32 rewind the request's random generator, which torch's
        # CPU generator cannot do: the engine dies as soon as seeded requests fill a step.
        "enable_chunked_prefill": False,
    }


def _gpu_options(options: EngineOptions, tensor_parallel: int) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "dtype": options.dtype,
        "tensor_parallel_size": tensor_parallel,
        "gpu_memory_utilization": options.gpu_memory_share,
    }
    if options.sequences is not None:
        chosen["max_num_seqs"] = options.sequences
    if options.kv_cache_gib is not None:
        chosen["kv_cache_memory_bytes"] = int(options.kv_cache_gib * 2**30)
    return chosen


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
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        output_kind=RequestOutputKind.FINAL_ONLY,
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
