"""Chat messages as a model's template has them, also where it knows no system role."""

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from embedloom.compute.reasoning import opens_reasoning
from embedloom.errors import DataError, first_line

Message = dict[str, str]  # role and content

_SYSTEM, _USER = "embedloom asks whether this stands in a prompt", "and this"


def folded(messages: Sequence[Message]) -> list[Message]:
    """Messages without a system role: what it said stands before the user's first turn, as Gemma's authors do it."""
    said = [one["content"] for one in messages if one["role"] == "system"]
    turns = [dict(one) for one in messages if one["role"] != "system"]
    if not said:
        return turns
    if not turns or turns[0]["role"] != "user":
        return [{"role": "user", "content": "\n\n".join(said)}, *turns]
    turns[0]["content"] = "\n\n".join([*said, turns[0]["content"]])
    return turns


class ChatTemplate:
    """Renders and encodes chats by a tokenizer's template; several threads may call at once."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any], where: str) -> None:
        """Try the template on two short messages.

        Args:
            tokenizer: of Hugging Face's kind.
            options: what the template is told besides.
            where: the model, named in errors.

        Raises:
            DataError: there is no template, or it takes no user's message.
        """
        self._tokenizer = tokenizer
        self._options = dict(options)
        self._encoding = Lock()
        if not tokenizer.chat_template:
            raise DataError(
                f"{where}: its tokenizer has no chat template; a generator must be an instruction-tuned model"
            )
        self.has_system_role = self._takes_system()
        if not self.has_system_role:
            try:
                self._render([{"role": "user", "content": _USER}])
            except Exception as error:
                raise DataError(
                    f"{where}: its chat template takes no user's message: {first_line(error)}"
                ) from error

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], bool]:
        """Tokens of a chat that waits for an answer, and whether it ends where the model is to think."""
        given = list(messages) if self.has_system_role else folded(messages)
        with self._encoding:
            text = self._render(given)
            # The template writes the special tokens itself.
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]), opens_reasoning(text)

    def _takes_system(self) -> bool:
        """False where the template raises (Gemma 2) or leaves the message out without a word."""
        probe = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        try:
            return _SYSTEM in self._render(probe)
        except (
            Exception
        ):  # jinja2's, by raise_exception; an unknown key, a list where a string was expected, ...
            return False

    def _render(self, messages: list[Message]) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._options
            )
        )
