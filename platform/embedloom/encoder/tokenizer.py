"""The tokenizer of a model folder, made to agree with the prompt contract for every reader."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from embedloom.errors import ConfigError, DataError
from embedloom.instructions import PromptContract, Side

# Prose has 2 to 7 characters a token; 16 leaves room for runs of spaces and rules of dashes. No number is safe for
# every text (a WordPiece tokenizer turns a word of a megabyte into one token), so ``truncated_ids`` checks.
CHARACTERS_PER_TOKEN = 16


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder.

    Raises:
        DataError: no tokenizer, or none in the fast form every engine shares.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no usable tokenizer: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise DataError(f"{folder}: no tokenizer.json; only fast tokenizers behave alike in every engine")
    return tokenizer


def special_habits(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts a special token before and after a text."""
    special = set(tokenizer.all_special_ids)
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] in special, len(ids) > 1 and ids[-1] in special


def embedding_tokenizer(
    tokenizer: Any, add_bos: bool, add_eos: bool, padding_side: str, max_tokens: int
) -> Any:
    """A tokenizer whose own files add BOS/EOS as the contract says and which has no chat template.

    BOS alone can move a similarity from 0.65 to 0.02, and sentence-transformers wraps plain strings into a chat
    template if it finds one, so both are fixed in the saved files and not left to each reader.

    Raises:
        ConfigError: BOS or EOS is wanted, but the tokenizer has no such token.
    """
    pieces, tokens = ["$A"], []
    for wanted, name, position in ((add_bos, "bos", 0), (add_eos, "eos", len(pieces))):
        if not wanted:
            continue
        token = getattr(tokenizer, f"{name}_token")
        if token is None:
            raise ConfigError(
                f"encoder.add_{name}: true, but the tokenizer of this base has no {name.upper()} token"
            )
        pieces.insert(position if name == "bos" else len(pieces), token)
        tokens.append((token, getattr(tokenizer, f"{name}_token_id")))
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=" ".join(pieces), special_tokens=tokens)
    backend.no_padding()
    backend.no_truncation()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token or tokenizer.eos_token,
        padding_side=padding_side,
        model_max_length=max_tokens,
    )


def contract_ids(
    tokenizer: Any,
    contract: PromptContract,
    texts: Sequence[str],
    side: Side,
    task_type: str | Sequence[str | None] | None = None,
    instruction: str | Sequence[str | None] | None = None,
) -> list[list[int]]:
    """Token ids of each text, formatted by a contract and cut to the side's limit; never empty.

    Args:
        tokenizer: the fast tokenizer of the contract's model.
        contract: formats and limits.
        texts: raw texts.
        side: whether they are queries or documents.
        task_type: a task type or the name of a task, which decides the instruction and whether documents carry it; one
            for all, one per text, or None for the contract's default task.
        instruction: one for all, one per text, or None for the contract's own.
    """
    if not texts:
        return []
    task_types = [task_type] * len(texts) if task_type is None or isinstance(task_type, str) else task_type
    instructions = (
        [instruction] * len(texts) if instruction is None or isinstance(instruction, str) else instruction
    )
    formatted = [
        contract.format(text, side, kind, own)
        for text, kind, own in zip(texts, task_types, instructions, strict=True)
    ]
    return formatted_ids(tokenizer, formatted, contract.max_tokens(side))


def formatted_ids(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of model texts, cut to a limit; never empty."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return [ids or [pad_id] for ids in truncated_ids(tokenizer, texts, max_tokens)]


def truncated_ids(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Ids of each text cut to ``max_tokens``, special tokens included, without tokenizing what is cut off.

    A long text is tokenized up to ``max_tokens`` x 16 characters. Where that fills the limit, the rest cannot
    matter: a tokenizer looks a word or two back, not thousands of characters. Where it does not, the whole text is
    tokenized. A tokenizer that truncates on the left gets whole texts.

    Args:
        tokenizer: a fast tokenizer.
        texts: any lengths.
        max_tokens: most ids a text may have.
    """

    def ids_of(pieces: Sequence[str]) -> list[list[int]]:
        encoded = tokenizer(list(pieces), truncation=True, max_length=max_tokens, padding=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    if tokenizer.truncation_side != "right":
        return ids_of(texts)
    if not texts:
        return []
    starts = [_start_of(text, max_tokens * CHARACTERS_PER_TOKEN) for text in texts]
    ids = ids_of(starts)
    unsure = [
        position
        for position, (text, start) in enumerate(zip(texts, starts, strict=True))
        if len(start) < len(text) and len(ids[position]) < max_tokens
    ]
    if unsure:
        for position, whole in zip(unsure, ids_of([texts[position] for position in unsure]), strict=True):
            ids[position] = whole
    return ids


def _start_of(text: str, characters: int) -> str:
    """At most so many characters, ending between words where the last quarter has such a place."""
    if len(text) <= characters:
        return text
    start = text[:characters]
    words = start.rsplit(maxsplit=1)
    return words[0] if words and len(words[0]) > 0.75 * characters else start
