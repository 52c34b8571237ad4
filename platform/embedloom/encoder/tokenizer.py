"""The tokenizer of a model folder, made to agree with the prompt contract for every reader."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from embedloom.core.contents import is_trusted
from embedloom.core.prompting import PromptContract, Side
from embedloom.encoder.backbone import read_config
from embedloom.errors import ConfigError, DataError, first_line

# Prose has 2 to 7 characters a token; 16 leaves room for runs of spaces and rules of dashes. No number is safe for
# every text (a WordPiece tokenizer turns a word of a megabyte into one token), so ``truncated_ids`` checks.
CHARACTERS_PER_TOKEN = 16
# Fewer tokens than these say nothing of a text: where an instruction leaves no more, all cut texts are nearly one.
MIN_TEXT_TOKENS = 8
# Above this share of tokens that a tokenizer does not know, unlike texts may be one to the model: five Thai sentences are
# the same few ids to MiniLM's, and their vectors have a cosine of 1.
UNKNOWN_SHARE = 0.05


class InstructionTooLong(DataError):
    """A length limit leaves no room for a text beside its instruction."""


@dataclass(slots=True)
class CutTexts:
    """How much of some texts a length limit left out, and how many tokens stand for what the tokenizer does not know."""

    texts: int = 0  # all of them, cut or not
    cut: int = 0
    read: int = 0  # tokens of all texts that the model sees, instructions and special tokens included
    left_out: int = (
        0  # tokens behind the limit; estimated by a text's length beyond ``CHARACTERS_PER_TOKEN`` x limit
    )
    unknown: int = 0  # of the tokens read

    def counts(self) -> dict[str, int]:
        """For a manifest; empty where no text was cut and every token known."""
        cut = {"texts_cut": self.cut, "tokens_left_out": self.left_out} if self.cut else {}
        return {**cut, **({"tokens_unknown": self.unknown} if self.unknown else {})}

    def __str__(self) -> str:
        """One clause for a progress line, or two."""
        doubt = unknown_warning(self.unknown, self.read)
        if not self.cut:
            return f"no text cut{doubt}"
        share = self.read / (self.read + self.left_out)
        tokens = self.read + self.left_out
        return f"{self.cut:,} of {self.texts:,} texts cut, {share:.1%} of {tokens:,} tokens read{doubt}"

    def take(self) -> "CutTexts":
        """What was counted so far; counting starts afresh."""
        found = replace(self)
        self.texts = self.cut = self.read = self.left_out = self.unknown = 0
        return found

    def count(self, read: Sequence[int], left_out: Sequence[int]) -> None:
        """Count texts by what is read and left out of each, in tokens."""
        self.add(CutTexts(len(read), sum(map(bool, left_out)), sum(read), sum(left_out)))

    def add(self, other: "CutTexts") -> None:
        """Count other texts too."""
        self.texts += other.texts
        self.cut += other.cut
        self.read += other.read
        self.left_out += other.left_out
        self.unknown += other.unknown


def unknown_warning(unknown: int, tokens: int) -> str:
    """What follows a progress line where a tokenizer does not know the texts; empty where it does."""
    if unknown <= UNKNOWN_SHARE * tokens:
        return ""
    return (
        f"; warning: {unknown / tokens:.1%} of the tokens are unknown to the model's tokenizer, so that unlike texts may have "
        "one vector; take a model that knows their script"
    )


class CutsByText(CutTexts):
    """Also what was left out of each text, in the order of the texts."""

    def __init__(self) -> None:
        super().__init__()
        self.by_text: list[int] = []

    def count(self, read: Sequence[int], left_out: Sequence[int]) -> None:
        """See ``CutTexts.count``."""
        super().count(read, left_out)
        self.by_text.extend(left_out)


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder.

    Raises:
        DataError: no tokenizer, or none in the fast form every engine shares.
    """
    try:
        trusted = is_trusted(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, **_config_for(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no usable tokenizer: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise DataError(f"{folder}: no tokenizer.json; only fast tokenizers behave alike in every engine")
    if _lower_cases(folder):
        _lower_case(tokenizer.backend_tokenizer)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> None:
    """Raise DataError if the tokenizer gives ids that the model's embedding of so many ``rows`` does not have.

    Models with more rows than tokens are usual: rows are filled up to a multiple of 64.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= rows:
        raise DataError(
            f"{where}: its tokenizer gives ids up to {largest} (token {token!r}), its embedding has {rows} rows; allowed: "
            "the model's own tokenizer, or a model whose embedding was resized to it"
        )


def _config_for(folder: Path) -> dict[str, Any]:
    """The config to choose a tokenizer by, where transformers alone could not read the folder's."""
    path = folder / "config.json"
    if not path.is_file() or not json.loads(path.read_text()).get("auto_map"):
        return {}
    return {"config": read_config(folder)}


def length_file(folder: Path) -> Path:
    """Where sentence-transformers keeps the settings of a Transformer module; older releases named it by the model."""
    names = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    found = [path for name in names if (path := folder / f"sentence_{name}_config.json").is_file()]
    return found[0] if found else folder / f"sentence_{names[0]}_config.json"


def _lower_cases(folder: Path) -> bool:
    path = length_file(folder)
    return path.is_file() and bool(json.loads(path.read_text()).get("do_lower_case"))


def _lower_case(backend: Any) -> None:
    """Lower-case texts before anything else, as sentence-transformers does on ``do_lower_case``."""
    own = backend.normalizer
    if own is not None and own.normalize_str("A") == "a":
        return
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([own] if own is not None else [])])


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
    cuts: CutTexts | None = None,
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
        cuts: takes note of what is cut.

    Raises:
        InstructionTooLong: a text is cut, and its instruction leaves fewer than ``MIN_TEXT_TOKENS`` of the limit to it.
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
    found = formatted_ids(tokenizer, contract, formatted, side, cuts)
    full = (row for row, ids in enumerate(found) if len(ids) >= contract.max_tokens(side))
    for kind, own in dict.fromkeys((task_types[row], instructions[row]) for row in full):
        check_room(tokenizer, contract, side, kind, own)
    return found


def formatted_ids(
    tokenizer: Any, contract: PromptContract, texts: Sequence[str], side: Side, cuts: CutTexts | None = None
) -> list[list[int]]:
    """``contract_ids`` of texts that are formatted already, whatever their instructions leave of the limit."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return [ids or [pad_id] for ids in truncated_ids(tokenizer, texts, contract.max_tokens(side), cuts)]


def check_room(
    tokenizer: Any,
    contract: PromptContract,
    side: Side,
    task_type: str | None = None,
    instruction: str | None = None,
) -> None:
    """Raise InstructionTooLong if an instruction leaves fewer than ``MIN_TEXT_TOKENS`` of a side's limit to a text."""
    problem = room_problem(tokenizer, contract, side, contract.format("", side, task_type, instruction))
    if problem is not None:
        raise InstructionTooLong(problem)


def room_problem(tokenizer: Any, contract: PromptContract, side: Side, prompt: str) -> str | None:
    """What is wrong with the length of a prompt, which is a formatted empty text; None where it leaves enough room."""
    limit, length = contract.max_tokens(side), len(prompt_ids(tokenizer, prompt))
    if not prompt or limit - length >= MIN_TEXT_TOKENS:
        return None
    return (
        f"the instruction takes {length} tokens ({prompt[:60]!r}{'...' * (len(prompt) > 60)}), which leaves "
        f"{max(0, limit - length)} of the limit of {limit} for a {side} to its text; allowed: max_{side}_tokens of "
        f"{length + MIN_TEXT_TOKENS} or more, or a shorter instruction"
    )


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, special tokens included, however many."""
    ids: list[int] = tokenizer([prompt], truncation=False)["input_ids"][0]
    return ids


def truncated_ids(
    tokenizer: Any, texts: Sequence[str], max_tokens: int, cuts: CutTexts | None = None
) -> list[list[int]]:
    """Ids of each text cut to ``max_tokens``, special tokens included, without tokenizing what is cut off.

    A long text is tokenized up to ``max_tokens`` x 16 characters. Where that fills the limit, the rest cannot
    matter: a tokenizer looks a word or two back, not thousands of characters. Where it does not, the whole text is
    tokenized. A tokenizer that truncates on the left gets whole texts.

    Args:
        tokenizer: a fast tokenizer.
        texts: any lengths.
        max_tokens: most ids a text may have.
        cuts: takes note of what is cut.
    """
    left_out = [0] * len(texts)

    def ids_of(rows: Sequence[int], pieces: Sequence[str]) -> list[list[int]]:
        encoded = tokenizer(list(pieces), truncation=True, max_length=max_tokens, padding=False)
        ids: list[list[int]] = encoded["input_ids"]
        if cuts is not None:
            for row, piece, own in zip(rows, pieces, encoded.encodings, strict=True):
                left_out[row] = _left_out(own, len(texts[row]) / max(1, len(piece)))
        return ids

    if not texts:
        return []
    everything = range(len(texts))
    if tokenizer.truncation_side != "right":
        ids = ids_of(everything, texts)
    else:
        starts = [_start_of(text, max_tokens * CHARACTERS_PER_TOKEN) for text in texts]
        ids = ids_of(everything, starts)
        unsure = [
            row for row in everything if len(starts[row]) < len(texts[row]) and len(ids[row]) < max_tokens
        ]
        if unsure:
            for row, whole in zip(unsure, ids_of(unsure, [texts[row] for row in unsure]), strict=True):
                ids[row] = whole
    if cuts is not None:
        cuts.count([len(own) for own in ids], left_out)
        unknown = tokenizer.unk_token_id
        cuts.unknown += 0 if unknown is None else sum(own.count(unknown) for own in ids)
    return ids


def _left_out(encoding: Any, whole: float) -> int:
    """Tokens of a text behind its limit, the text being ``whole`` times as long as what was tokenized."""
    behind: int = sum(len(piece) - sum(piece.special_tokens_mask) for piece in encoding.overflowing)
    if whole <= 1:
        return behind
    seen: int = len(encoding) - sum(encoding.special_tokens_mask) + behind
    return behind + max(1, round(seen * (whole - 1)))


def _start_of(text: str, characters: int) -> str:
    """At most so many characters, ending between words where the last quarter has such a place."""
    if len(text) <= characters:
        return text
    start = text[:characters]
    words = start.rsplit(maxsplit=1)
    return words[0] if words and len(words[0]) > 0.75 * characters else start
