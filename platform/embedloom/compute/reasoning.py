"""The answer of a model that thinks before it answers: what it thought is never a row."""

import re

from embedloom.config.synthesis import ReasoningParser

_THINK, _THOUGHT = "<think>", "</think>"
# OpenAI's Harmony format (openai/harmony, docs/format.md): each message names its channel, and only "final" is for readers.
_MESSAGE = re.compile(
    r"<\|channel\|>\s*(?P<channel>\w+)(?:(?!<\|(?:message|channel|start|end)\|>).)*<\|message\|>"
    r"(?P<content>.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)
_MARKER = re.compile(r"<\|(?:channel|message|start|end|return|call|constrain)\|>")


def answer_of(text: str, parser: ReasoningParser, opened: bool = False) -> str | None:
    """What the model answers; None where its text ended before it began to.

    Args:
        text: as it was decoded, special tokens included where they mark the channels.
        parser: whose marks it uses.
        opened: whether the prompt itself ends inside the thinking, as some chat templates have it.
    """
    if parser == "openai_gptoss":
        return _final_message(text)
    _, mark, answer = text.rpartition(_THOUGHT)
    if mark:
        return answer.strip()
    thinking = opened or _THINK in text or parser == "deepseek_r1"
    return None if thinking else text


def opens_reasoning(prompt: str) -> bool:
    """Whether a prompt ends where the model is to think."""
    return prompt.rstrip().endswith(_THINK)


def _final_message(text: str) -> str | None:
    """Without any mark the text is the answer: a grammar that holds from the first token leaves no room for channels."""
    if not _MARKER.search(text):
        return text
    finals = [found["content"] for found in _MESSAGE.finditer(text) if found["channel"] == "final"]
    return finals[-1].strip() if finals else None
