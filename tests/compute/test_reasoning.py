"""Answers of models that think first: no row carries what they thought."""

from types import SimpleNamespace

import pytest

from embedloom.compute.generation import ENGINE_CUT, ENGINE_FAILED, ENGINE_FINISHED, GenerationRequest
from embedloom.compute.reasoning import answer_of, opens_reasoning
from embedloom.compute.vllm_engine import result_of
from embedloom.config.base import validate
from embedloom.config.synthesis import EngineOptions, Generator, proposed_parser
from embedloom.errors import ConfigError

ANSWER = '{"query": "how do I open a file"}'
# As gpt-oss writes (openai/harmony, docs/format.md).
HARMONY = (
    "<|channel|>analysis<|message|>The user wants a query. Let me think.<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>A preamble.<|end|>"
    f"<|start|>assistant<|channel|>final <|constrain|>json<|message|>{ANSWER}<|return|>"
)
THOUGHT = "\nThe user wants a query. Is <think> a word? Let me think.\n"


@pytest.mark.parametrize(
    ("parser", "opened", "text", "answer"),
    [
        ("openai_gptoss", False, HARMONY, ANSWER),
        ("openai_gptoss", False, HARMONY.removesuffix("<|return|>"), ANSWER),
        ("openai_gptoss", False, ANSWER, ANSWER),  # a schema that held from the first token
        ("openai_gptoss", False, HARMONY.split("<|start|>")[0], None),
        ("openai_gptoss", False, "<|channel|>analysis<|message|>Let me th", None),
        ("openai_gptoss", False, "<|channel|>final", None),
        ("qwen3", False, f"<think>{THOUGHT}</think>\n\n{ANSWER}", ANSWER),
        ("qwen3", True, f"{THOUGHT}</think>\n\n{ANSWER}", ANSWER),
        ("qwen3", False, ANSWER, ANSWER),  # thinking switched off
        ("qwen3", False, f"<think>{THOUGHT}", None),
        ("qwen3", True, THOUGHT.replace("<think>", "it"), None),
        ("deepseek_r1", False, THOUGHT.replace("<think>", "it"), None),
        ("deepseek_r1", False, f"{THOUGHT}</think>{ANSWER}", ANSWER),
    ],
)
def test_only_what_is_meant_for_readers_is_the_answer(parser, opened, text, answer):
    assert answer_of(text, parser, opened) == answer


def test_a_template_may_open_the_thinking_itself():
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")


REQUEST = GenerationRequest("id", ({"role": "user", "content": "write"},), 1, 64, 0.7, 0.9)


def written(text: str, finish: str = ENGINE_FINISHED):
    completion = SimpleNamespace(text=text, finish_reason=finish, token_ids=[1, 2, 3])
    return SimpleNamespace(outputs=[completion], prompt_token_ids=[1, 2])


@pytest.mark.parametrize("finish", [ENGINE_FINISHED, ENGINE_CUT])
@pytest.mark.parametrize(
    ("parser", "text"),
    [("openai_gptoss", HARMONY), ("openai_gptoss", HARMONY[:60]), ("qwen3", f"<think>{THOUGHT}</think>{ANSWER}"),
     ("qwen3", f"<think>{THOUGHT}")],
)  # fmt: skip
def test_no_result_carries_a_thought_or_a_mark(parser, text, finish):
    result = result_of(REQUEST, written(text, finish), parser)
    assert result.text in ("", ANSWER)
    assert "think" not in result.text and "<|" not in result.text
    if result.text == "":
        assert result.finish_reason == (ENGINE_CUT if finish == ENGINE_CUT else ENGINE_FAILED)
    assert result.prompt_tokens == 2


def test_without_a_parser_a_text_is_left_as_it_is():
    assert result_of(REQUEST, written(f" {ANSWER}\n")).text == f" {ANSWER}\n"


@pytest.mark.parametrize(
    ("model", "parser"),
    [
        ("openai/gpt-oss-20b", "openai_gptoss"),
        ("/models/gpt-oss-120b/", "openai_gptoss"),
        ("Qwen/Qwen3-32B", "qwen3"),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", "qwen3"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", None),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek_r1"),
        ("meta-llama/Llama-3.3-70B-Instruct", None),
        ("smollm2-135m", None),
    ],
)
def test_a_parser_is_proposed_by_the_models_name(model, parser):
    assert proposed_parser(model) == parser
    assert EngineOptions().for_model(model).reasoning == parser
    assert EngineOptions(reasoning_parser=None).for_model(model).reasoning is None


def test_a_parser_that_would_let_thoughts_into_rows_is_refused():
    def generator(model: str, **engine: object) -> Generator:
        return validate(Generator, {"model": model, "engine": engine}, "g")

    assert (
        generator("openai/gpt-oss-20b", reasoning_parser="openai_gptoss").engine.reasoning == "openai_gptoss"
    )
    with pytest.raises(
        ConfigError, match=r"reasoning_parser is None.*gpt-oss-20b.*allowed: auto, openai_gptoss"
    ):
        generator("openai/gpt-oss-20b", reasoning_parser=None)
    with pytest.raises(ConfigError, match="reasoning_parser is deepseek_r1"):
        generator("Qwen/Qwen3-32B", reasoning_parser="deepseek_r1")
    silent = generator(
        "Qwen/Qwen3-32B", reasoning_parser=None, chat_template_kwargs={"enable_thinking": False}
    )
    assert silent.engine.reasoning is None
    assert "reasoning_parser" not in EngineOptions().model_dump()  # fingerprints of older configs stay
