"""From a part of a request to token ids, or to the reason why not. Functions of an encoder; no queue, no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from embedloom.config.serving import Truncate
from embedloom.encoder.tokenizer import CHARACTERS_PER_TOKEN, InstructionTooLong
from embedloom.errors import DataError
from embedloom.instructions import PromptContract, Side
from embedloom.serving.messages import Part, Piece, Refusal, Vectors

_SEND_TEXTS = (
    "send texts instead (LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False)), or ids that /tokenize of this "
    "endpoint gave; serving.token_ids: accept takes any"
)


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
        self, texts: Sequence[str], side: Side, task_type: str | None = None, instruction: str | None = None
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
    except InstructionTooLong as error:
        return Refusal(f"instruction: {error}", "context_length_exceeded", "instruction")
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


def cut_items(encoder: ServingEncoder, part: Part, rows: slice, ids: Sequence[Sequence[int]]) -> int:
    """How many of these texts have more tokens than ``ids`` has of them, which were cut to the side's limit.

    Only a text that fills the limit is tokenised again, and of it no more than decides the matter: what fills the limit
    in its first ``CHARACTERS_PER_TOKEN`` characters a token has been cut if there is more of it.
    """
    limit = encoder.contract.max_tokens(part.side)
    full = [text for text, own in zip((part.texts or [])[rows], ids, strict=True) if len(own) >= limit]
    prompted = [encoder.contract.format(text, part.side, part.task_type, part.instruction) for text in full]
    short = [text for text in prompted if len(text) <= limit * CHARACTERS_PER_TOKEN]
    if not short:
        return len(prompted)
    whole: list[list[int]] = encoder.tokenizer(short, truncation=False, padding=False)["input_ids"]
    return len(prompted) - sum(len(own) <= limit for own in whole)


@dataclass(frozen=True, slots=True)
class Frame:
    """The special tokens that a tokenizer puts before and after every text."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        """What is there of no text is before or after any."""
        alone, text = tokenizer(["", "a"], truncation=False, padding=False)["input_ids"]
        count = next(
            (n for n, (own, other) in enumerate(zip(alone, text, strict=False)) if own != other), len(alone)
        )
        before, after = alone[:count], alone[count:]
        return cls(before, after if after and text[-len(after) :] == after else [])

    def holds(self, ids: list[int]) -> bool:
        """Whether ids begin and end as those of a text do."""
        return (
            len(ids) >= len(self.before) + len(self.after)
            and ids[: len(self.before)] == self.before
            and ids[len(ids) - len(self.after) :] == self.after
        )

    def cut(self, ids: list[int], limit: int, truncate: Truncate) -> list[int]:
        """Ids within a limit, cut as the text itself would have been: special tokens around it stay."""
        if len(ids) <= limit or truncate == "none":
            return ids
        if not self.holds(ids) or len(self.before) + len(self.after) >= limit:
            return ids[:limit] if truncate == "end" else ids[-limit:]
        room = limit - len(self.before) - len(self.after)
        inner = ids[len(self.before) : len(ids) - len(self.after)]
        return [*self.before, *(inner[:room] if truncate == "end" else inner[-room:]), *self.after]


def given_ids(
    encoder: ServingEncoder,
    part: Part,
    truncate: Truncate,
    limited: bool = True,
    frame: Frame | None = None,
    own_only: bool = False,
) -> list[list[int]] | Refusal:
    """The token ids that a client sent, checked against the vocabulary and the side's limit.

    Args:
        encoder: the model.
        part: with token ids.
        truncate: what happens to ids above the side's limit.
        limited: False takes any number where ``truncate`` is ``none``.
        frame: of the model's tokenizer; None: ids are cut without regard to special tokens.
        own_only: refuse ids that the tokenizer cannot have made, as they lack its special tokens: another
            tokenizer's, which would be read as other words.
    """
    ids = part.token_ids or []
    vocabulary = int(encoder.backbone.config.vocab_size)
    for index, item in enumerate(ids):
        reason = None
        if (largest := max(item)) >= vocabulary:
            reason = (
                f"holds token id {largest}, the model's vocabulary ends at {vocabulary - 1}; token ids must come from "
                "this model's own tokenizer"
            )
        elif frame is not None and own_only and not frame.holds(item):
            reason = (
                f"does not begin with {frame.before} and end with {frame.after}, the special tokens of this model, so "
                "its token ids are another tokenizer's and mean other words here"
            )
        if reason is not None:
            return Refusal(f"{part.where(index)} {reason}; {_SEND_TEXTS}", "invalid_token_id", part.name)
    limit = encoder.contract.max_tokens(part.side)
    if truncate != "none":
        frame = frame or Frame([], [])
        return [frame.cut(item, limit, truncate) for item in ids]
    return _too_long(part, ids, limit, 0) if limited else ids


def pieces_of(encoder: ServingEncoder, part: Part, ids: Sequence[Sequence[int]]) -> list[list[Piece]]:
    """The tokens of a part's texts: the characters that each stands for, or its name where it stands for none.

    Of a text that was cut, every token has its name.
    """
    tokenizer = encoder.tokenizer
    special = set(tokenizer.all_special_ids)
    texts = [
        encoder.contract.format(text, part.side, part.task_type, part.instruction)
        for text in part.texts or ()
    ]
    found = tokenizer(texts, truncation=False, padding=False, return_offsets_mapping=True)
    pieces = []
    for own, whole, text, offsets in zip(
        ids, found["input_ids"], texts, found["offset_mapping"], strict=True
    ):
        places = offsets if list(own) == whole else [(0, 0)] * len(own)
        names = tokenizer.convert_ids_to_tokens(list(own))
        pieces.append(
            [
                Piece(token, text[start:stop], token in special, start, stop)
                if stop > start
                else Piece(token, str(name), token in special)
                for token, name, (start, stop) in zip(own, names, places, strict=True)
            ]
        )
    return pieces


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
