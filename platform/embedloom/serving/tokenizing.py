"""From a part of a request to token ids, or to the reason why not. Functions of an encoder; no queue, no HTTP."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from embedloom.errors import DataError
from embedloom.instructions import PromptContract, Side
from embedloom.serving.messages import Part, Refusal, Vectors

Truncate = Literal["none", "start", "end"]


class ServingEncoder(Protocol):
    """What serving needs of an encoder; ``embedloom.encoder.model.Encoder`` is one."""

    contract: PromptContract
    tokenizer: Any
    backbone: Any

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def tokenize(
        self, texts: Sequence[str], side: Side, task_type: str = "retrieval", instruction: str | None = None
    ) -> list[list[int]]:
        """Token ids, cut to the side's limit."""
        ...

    def embed_tokens(self, token_ids: Sequence[Sequence[int]], max_batch_tokens: int = 4096) -> Vectors:
        """Vectors in order."""
        ...


def text_ids(
    encoder: ServingEncoder, part: Part, rows: slice, truncate: Truncate, limited: bool = True
) -> list[list[int]] | Refusal:
    """Token ids of some of a part's texts, formatted by the model's contract.

    Args:
        encoder: the model.
        part: with texts.
        rows: which of them.
        truncate: what happens to texts above the side's limit; ``none`` refuses them.
        limited: False takes texts of any length as they are where ``truncate`` is ``none``.
    """
    texts = (part.texts or [])[rows]
    limit = encoder.contract.max_tokens(part.side)
    try:
        if truncate == "end":
            cut = encoder.tokenize(texts, part.side, part.task_type, part.instruction)
            return cut if max(map(len, cut)) < limit else _nothing_left(encoder, part, limit) or cut
        formatted = [
            encoder.contract.format(text, part.side, part.task_type, part.instruction) for text in texts
        ]
    except DataError as error:  # a task type this model's contract has no instruction for
        return Refusal(str(error), "invalid_task", "task")
    encoded = encoder.tokenizer(
        formatted, truncation=False, padding=False, return_offsets_mapping=truncate == "start"
    )
    whole: list[list[int]] = encoded["input_ids"]
    for index, ids in enumerate(whole):
        if (
            not ids
        ):  # a tokenizer without BOS may find nothing in a text; the encoder's own way gives one token
            whole[index] = encoder.tokenize(
                texts[index : index + 1], part.side, part.task_type, part.instruction
            )[0]
    if truncate == "start":
        return _cut_starts(encoder.contract, part, whole, encoded["offset_mapping"], rows.start)
    return _too_long(part, whole, limit, rows.start) if limited else whole


def _nothing_left(encoder: ServingEncoder, part: Part, limit: int) -> Refusal | None:
    """Why a text cut at its end would be the client's instruction and nothing else, where it would."""
    if part.instruction is None:  # the contract's own is the model's business
        return None
    prompt = encoder.contract.format("\0", part.side, part.task_type, part.instruction)
    before = prompt[: prompt.rindex("\0")]
    if not before or len(encoder.tokenizer([before], truncation=False)["input_ids"][0]) < limit:
        return None
    return Refusal(
        f"instruction: it alone fills the limit of {limit} tokens for a {part.side}, so nothing of {part.name} would be "
        "left; allowed: a shorter one",
        "context_length_exceeded",
        "instruction",
    )


def _cut_starts(
    contract: PromptContract,
    part: Part,
    ids: list[list[int]],
    offsets: list[list[tuple[int, int]]],
    start: int,
) -> list[list[int]] | Refusal:
    """Drop tokens from the beginning of each text; special tokens and the instruction before it stay."""
    limit = contract.max_tokens(part.side)
    # NUL marks where the text goes; an instruction may hold one too, but it stands before the text.
    before = contract.format("\0", part.side, part.task_type, part.instruction).rindex("\0")
    cut = []
    for index, (tokens, places) in enumerate(zip(ids, offsets, strict=True)):
        excess = len(tokens) - limit
        if excess <= 0:
            cut.append(tokens)
            continue
        # Special tokens have the empty span (0, 0).
        own = [number for number, (left, right) in enumerate(places) if right > left and right > before]
        if len(own) <= excess:
            return Refusal(
                f"{part.where(start + index)}: instruction and special tokens alone fill the limit of {limit} "
                f"tokens for a {part.side}",
                "context_length_exceeded",
                part.name,
            )
        dropped = set(own[:excess])
        cut.append([token for number, token in enumerate(tokens) if number not in dropped])
    return cut


def given_ids(encoder: ServingEncoder, part: Part, truncate: Truncate) -> list[list[int]] | Refusal:
    """The token ids that a client sent, checked against the vocabulary and the side's limit."""
    ids = part.token_ids or []
    vocabulary = int(encoder.backbone.config.vocab_size)
    for index, item in enumerate(ids):
        if (largest := max(item)) >= vocabulary:
            return Refusal(
                f"{part.where(index)} holds token id {largest}, the model's vocabulary ends at "
                f"{vocabulary - 1}; token ids must come from this model's own tokenizer",
                "invalid_token_id",
                part.name,
            )
    limit = encoder.contract.max_tokens(part.side)
    if truncate == "end":
        return [item[:limit] for item in ids]
    if truncate == "start":
        return [item[-limit:] for item in ids]
    return _too_long(part, ids, limit, 0)


def _too_long(part: Part, token_ids: list[list[int]], limit: int, start: int) -> list[list[int]] | Refusal:
    for index, item in enumerate(token_ids):
        if len(item) > limit:
            return Refusal(
                f"{part.where(start + index)} has {len(item)} tokens, the limit for a {part.side} is {limit} "
                '(instruction and special tokens included); shorten it, or send "truncate": "end"',
                "context_length_exceeded",
                part.name,
            )
    return token_ids
