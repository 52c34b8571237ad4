"""vLLM as a TextEngine, inside one actor process, with several batches in one decoding loop."""

import copy
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Generic, Protocol, TypeVar

from embedloom.compute.chat_template import ChatTemplate
from embedloom.compute.generation import (
    ENGINE_CUT,
    ENGINE_FINISHED,
    EngineLostError,
    GenerationRequest,
    GenerationResult,
    require_engine,
)
from embedloom.compute.reasoning import answer_of
from embedloom.config.synthesis import EngineOptions, ReasoningParser
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
_Prompt = tuple[
    list[int], GenerationRequest, bool
]  # tokens, what is asked, whether they end inside the thinking


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
            StageError: the GPUs' memory is not free.
        """
        require_engine(gpu)
        set_environment(gpu, threads, options.batch_invariant)
        if gpu:
            wait_for_memory(options.gpu_memory_share)
        self._max_model_tokens = options.max_model_tokens
        self._parser = options.reasoning
        self._reasoning_tokens = options.reasoning_tokens if self._parser else 0

        def open_engine() -> _Steps:
            if not gpu:
                # OpenMP counts threads per calling thread, and vLLM disables the setter once it is loaded.
                import torch

                torch.set_num_threads(threads)
            self._llm = _load(model_folder, options, gpu, tensor_parallel)
            return _Steps(self._llm.llm_engine, self._parser, self._reasoning_tokens)

        self._loop: ContinuousBatches[_Prompt, GenerationResult] = ContinuousBatches(open_engine)
        # A copy: the loop's thread decodes with vLLM's own while callers encode with this one.
        tokenizer = copy.deepcopy(self._llm.get_tokenizer())
        self._template = ChatTemplate(tokenizer, options.chat_template_kwargs, str(model_folder))

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Write one text per request; see TextEngine.

        Raises:
            DataError: vLLM cannot serve the schema or a sampling parameter.
            EngineLostError: vLLM died.
        """
        results: dict[int, GenerationResult] = {}
        prompts: dict[int, _Prompt] = {}
        for position, request in enumerate(requests):
            prompt, opened = self._template.encode(request.messages)
            written_tokens = request.max_tokens + self._reasoning_tokens
            room = self._max_model_tokens - written_tokens
            if len(prompt) > room:
                message = f"prompt has {len(prompt)} tokens, {room} fit beside {written_tokens} new ones"
                results[position] = GenerationResult.failed(request, message, len(prompt))
            else:
                prompts[position] = (prompt, request, opened)
        written = self._loop.generate(list(prompts.values()))
        results.update(zip(prompts, written, strict=True))
        return [results[position] for position in range(len(requests))]

    def close(self) -> None:
        """End the engine and its processes."""
        self._llm.llm_engine.engine_core.shutdown()


class _Steps:
    """vLLM's engine as a Stepper."""

    def __init__(self, engine: Any, parser: ReasoningParser | None, reasoning_tokens: int) -> None:
        self._engine = engine
        self._parser = parser
        self._reasoning_tokens = reasoning_tokens
        self._served: dict[str, _Prompt] = {}

    def add(self, key: str, request: _Prompt) -> None:
        """Admit one request; lengths were checked, so a refusal is about the schema or a sampling parameter."""
        from vllm.exceptions import VLLMClientError

        tokens, asked, _ = request
        sampling = _sampling(asked, self._parser, self._reasoning_tokens)
        try:
            self._engine.add_request(key, {"prompt_token_ids": tokens}, sampling)
        except (VLLMClientError, ValueError) as error:
            raise DataError(f"vLLM refuses these requests: {first_line(error)}") from error
        self._served[key] = request

    def step(self) -> list[tuple[str, GenerationResult]]:
        """Decode once."""
        ended = [output for output in self._engine.step() if output.finished]
        return [(output.request_id, self._answered(output)) for output in ended]

    def _answered(self, output: Any) -> GenerationResult:
        _, asked, opened = self._served.pop(output.request_id)
        return result_of(asked, output, self._parser, opened)

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
            # With a parser the schema holds from where the model has thought; without, from the first token.
            structured_outputs_config={
                "backend": "xgrammar",
                "disable_any_whitespace": True,
                "reasoning_parser": options.reasoning or "",
            },
            **(_gpu_options(options, tensor_parallel) if gpu else _cpu_options(options)),
        )
    except (ValueError, OSError) as error:
        raise DataError(f"{model_folder}: vLLM cannot load this model: {first_line(error)}") from error
    except RuntimeError as error:
        # What the engine's own process, which it has on a GPU, met; its reason stands above in the actor's log.
        if "Engine core initialization failed" not in str(error):
            raise
        raise DataError(
            f"{model_folder}: vLLM's engine did not start ({first_line(error)}); its own words stand in the actor's log. "
            "What helps most often: a smaller engine.max_model_tokens or gpu_memory_share, or more tensor_parallel GPUs"
        ) from error
    if not gpu:
        _compile_grammars_in_order(llm)
    return llm


# Whether a GPU is free again: an engine that was killed there may have left processes that are still ending.


MEMORY_SECONDS = 180.0
_POLL_SECONDS = 2.0


def wait_for_memory(
    share: float,
    free: Callable[[], dict[str, float]] | None = None,
    seconds: float = MEMORY_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return once each of this process's GPUs has ``share`` of its memory free.

    Args:
        share: of a GPU's memory, 0 to 1.
        free: tells the free share by GPU; None: asks the driver.
        seconds: how long to wait.
        sleep: between two questions.

    Raises:
        StageError: a GPU was not free in time; named, with what it has free.
    """
    tell = free or free_shares
    for _ in range(max(1, round(seconds / _POLL_SECONDS))):
        short = {name: found for name, found in tell().items() if found < share}
        if not short:
            return
        sleep(_POLL_SECONDS)
    named = ", ".join(f"{name} has {found:.0%} free" for name, found in short.items())
    raise StageError(
        f"GPU {named} after {seconds:g} s, and engine.gpu_memory_share is {share:g}: another process holds the rest "
        "(nvidia-smi on that node names it)"
    )


def free_shares() -> dict[str, float]:
    """Free share of the memory of each GPU that this process sees, by name; asked of the driver, so that CUDA stays unused."""
    import pynvml  # vLLM for CUDA brings it

    pynvml.nvmlInit()
    try:
        found = {}
        for name in filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
            by_number = name.isdigit()
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(name))
                if by_number
                else pynvml.nvmlDeviceGetHandleByUUID(name)
            )
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found[name] = memory.free / memory.total
        return found
    finally:
        pynvml.nvmlShutdown()


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
    if tensor_parallel > 1:
        # Its workers are children of this process, on the GPUs that Ray gave it; Ray's executor would ask for others.
        chosen["distributed_executor_backend"] = "mp"
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


def _sampling(request: GenerationRequest, parser: ReasoningParser | None, reasoning_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        output_kind=RequestOutputKind.FINAL_ONLY,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens + reasoning_tokens,
        seed=request.seed,
        # Harmony's channels are marked by special tokens, which decoding leaves out otherwise.
        skip_special_tokens=parser != "openai_gptoss",
        structured_outputs=StructuredOutputsParams(json=request.json_schema) if request.json_schema else None,
    )


def result_of(
    request: GenerationRequest, output: Any, parser: ReasoningParser | None = None, opened: bool = False
) -> GenerationResult:
    """What vLLM wrote for a request, without what a model thought before it answered.

    Args:
        request: what was asked.
        output: vLLM's ``RequestOutput``.
        parser: whose marks part thought and answer; None: all is answer.
        opened: whether the prompt ended inside the thinking.
    """
    completion = output.outputs[0]
    prompt_tokens, output_tokens = len(output.prompt_token_ids or ()), len(completion.token_ids)
    if completion.finish_reason not in (ENGINE_FINISHED, ENGINE_CUT):
        return GenerationResult.failed(
            request, f"vLLM ended with {completion.finish_reason!r}", prompt_tokens
        )
    text = completion.text if parser is None else answer_of(completion.text, parser, opened)
    if text is None and completion.finish_reason == ENGINE_FINISHED:
        return GenerationResult.failed(request, "the model ended before it answered", prompt_tokens)
    return GenerationResult(request.id, text or "", completion.finish_reason, prompt_tokens, output_tokens)
