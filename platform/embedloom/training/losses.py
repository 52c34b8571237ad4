"""Contrastive losses, all with the signature of ``Loss``. ``b`` queries, ``k`` negatives, ``d`` dimensions."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from embedloom.config.reranker import RerankerLoss
from embedloom.config.training import DistillationLoss, TrainingConfig
from embedloom.errors import ConfigError, DataError

# What a loss is given: the vectors of some queries and their documents, and which of the texts are equal.


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """What a teacher says of the documents of ``b`` queries, and how much each query's row is to hear of it."""

    scores: Tensor  # [b, 1 + k], the positive's first, over the teacher's temperature; NaN: none
    temperatures: Tensor  # [b], which divide the model's similarities
    weights: Tensor  # [b]

    def rows(self, positions: Tensor | slice) -> "TeacherScores":
        """Those of some of the queries."""
        return TeacherScores(self.scores[positions], self.temperatures[positions], self.weights[positions])

    @classmethod
    def joined(cls, parts: Sequence["TeacherScores | None"]) -> "TeacherScores | None":
        """Those of several parts in one; None where no teacher is asked."""
        known = [part for part in parts if part is not None]
        if not known:
            return None
        return cls(
            torch.cat([part.scores for part in known]),
            torch.cat([part.temperatures for part in known]),
            torch.cat([part.weights for part in known]),
        )


@dataclass(frozen=True, slots=True)
class VectorGroups:
    """``b`` queries with ``1 + k`` documents each, of ``d`` dimensions."""

    queries: Tensor  # [b, d]
    documents: Tensor  # [b, 1 + k, d], the positive first
    query_keys: Tensor  # [b] int64, equal where the texts are
    document_keys: Tensor  # [b, 1 + k] int64
    right_keys: Tensor | None = (
        None  # [b, r] int64: all right answers to a query, filled up with -1; None: its positive
    )
    teacher: TeacherScores | None = None  # None: nothing is distilled

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            DataError: shapes that do not belong together.
        """
        queries, documents = self.queries, self.documents
        if (
            queries.ndim != 2
            or documents.ndim != 3
            or queries.shape[0] != documents.shape[0]
            or queries.shape[1] != documents.shape[2]
        ):
            raise DataError(
                f"loss: queries {tuple(queries.shape)} and documents {tuple(documents.shape)} must be [b, d] and [b, 1 + k, d]"
            )
        if self.query_keys.shape != queries.shape[:1] or self.document_keys.shape != documents.shape[:2]:
            raise DataError(
                f"loss: keys {tuple(self.query_keys.shape)} and {tuple(self.document_keys.shape)} do not fit documents {tuple(documents.shape)}"
            )

    def __len__(self) -> int:
        """Number of queries."""
        return int(self.queries.shape[0])

    @property
    def rights(self) -> Tensor:
        """Keys of all right answers to each query: [b, r]."""
        return self.document_keys[:, :1] if self.right_keys is None else self.right_keys

    def rows(self, positions: Tensor | slice) -> "VectorGroups":
        """Some of the queries, with their documents."""
        return VectorGroups(
            self.queries[positions],
            self.documents[positions],
            self.query_keys[positions],
            self.document_keys[positions],
            self.rights[positions],
            None if self.teacher is None else self.teacher.rows(positions),
        )

    def with_vectors(self, queries: Tensor, documents: Tensor) -> "VectorGroups":
        """Other vectors of the same texts."""
        return VectorGroups(
            queries, documents, self.query_keys, self.document_keys, self.right_keys, self.teacher
        )


def text_key(token_ids: Sequence[int]) -> int:
    """63-bit key of a text as the model sees it: two texts that differ only behind the token limit are equal.

    Among 10 million texts two different ones share a key with a chance of about 10^-5.
    """
    digest = hashlib.blake2b(np.asarray(token_ids, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def key_tensor(keys: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Keys as int64 on a device."""
    return torch.tensor(keys, dtype=torch.int64, device=device)


def padded_keys(keys: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Lists of keys as one tensor [len(keys), longest], filled up with -1, which is no key."""
    longest = max(map(len, keys), default=0)
    return key_tensor([[*own, *[-1] * (longest - len(own))] for own in keys], device).view(len(keys), longest)


def joined_keys(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several ``padded_keys`` in one."""
    longest = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, longest - part.shape[1]), value=-1) for part in parts])


# Any loss over prefixes of the vectors too (Matryoshka representation learning, arXiv 2205.13147).


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The lengths that must work alone; ``normalize`` where similarities are cosines."""

    dimensions: tuple[int, ...]
    weights: tuple[float, ...]
    normalize: bool

    def views(self, groups: VectorGroups) -> list[tuple[float, VectorGroups]]:
        """(weight, the groups with their vectors cut to a length, and brought back to norm 1)."""
        return [
            (weight, groups.with_vectors(self._cut(groups.queries, size), self._cut(groups.documents, size)))
            for weight, size in zip(self.weights, self.dimensions, strict=True)
        ]

    def _cut(self, vectors: Tensor, size: int) -> Tensor:
        cut = vectors[..., :size]
        return torch.nn.functional.normalize(cut, dim=-1) if self.normalize else cut


# What the losses that look at the whole batch have in common.


def other_queries(own: int, batch: int, first: int, device: torch.device) -> Tensor:
    """Bool [own, batch]: whether a column is another query than the row, which stands at ``first + row``."""
    rows = torch.arange(own, device=device)[:, None] + first
    return torch.arange(batch, device=device)[None, :] != rows


def is_right(own: VectorGroups, keys: Tensor) -> Tensor:
    """Bool [own, n]: whether documents are right answers to a query, by their keys [n] or [own, n]."""
    rights = own.rights
    columns = keys if keys.ndim == 2 else keys[None, :].expand(len(rights), -1)
    found = torch.zeros(columns.shape, dtype=torch.bool, device=keys.device)
    # Column by column, as [own, r, n] would not fit; nearly all of a query's other answers are outside the batch.
    for column in rights.T[torch.isin(rights.contiguous(), keys.contiguous()).any(dim=0)]:
        found |= columns == column[:, None]
    return found


def own_negatives(own: VectorGroups, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The term of a query's own negatives: their similarities out of ``scores`` [own, 1 + k], less right answers."""
    return scores[:, 1:], ~is_right(own, own.document_keys[:, 1:])


def asking_otherwise(own: VectorGroups, batch: VectorGroups, first: int) -> Tensor:
    """Bool [own, batch]: queries that neither are the row's, which stands at ``first + row``, nor share an answer."""
    others = other_queries(len(own), len(batch), first, own.queries.device)
    others = others & (own.query_keys[:, None] != batch.query_keys[None, :])
    return others & ~is_right(own, batch.document_keys[:, 0])


def loss_of(positive: Tensor, terms: Sequence[tuple[Tensor, Tensor | None]], temperature: float) -> Tensor:
    """-log softmax of the positive among itself and the kept terms.

    Args:
        positive: similarities [b].
        terms: similarities [b, n] and which of them count; None: all.
        temperature: divides the similarities.

    Returns:
        Losses [b].
    """
    columns = [positive[:, None]] + [
        scores if kept is None else scores.masked_fill(~kept, -torch.inf) for scores, kept in terms
    ]
    return -torch.log_softmax(torch.cat(columns, dim=1) / temperature, dim=1)[:, 0]


# InfoNCE over a query's own positive and its own mined negatives (arXiv 2511.07025, Eq. 1).
#
# L_i = -log( exp(s(q_i, d_i+)/t) / ( exp(s(q_i, d_i+)/t) + sum_k exp(s(q_i, d_ik-)/t) ) )
#
# No in-batch and no same-tower negatives: the loss of a query does not depend on its batch, so nothing is gathered
# between workers and the batch size only averages gradients. A negative that is a right answer is left out.


def infonce(own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
    """Per-query losses [b], see ``Loss``; ``batch`` and ``first`` are not looked at."""
    scores = torch.einsum("bd,bkd->bk", own.queries, own.documents)
    return loss_of(scores[:, 0], [own_negatives(own, scores)], temperature)


# Binary cross-entropy of a query's own pairs, for rerankers: the positive is right, each mined negative wrong.
#
# The mean over the pairs of a query, so that each query weighs the same. A negative that is a right answer is left out.


def binary_cross_entropy(own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
    """Per-query losses [b], see ``Loss``; similarities are logits. ``batch`` and ``first`` are not looked at.

    sentence-transformers' BinaryCrossEntropyLoss is its mean, where every query has as many pairs.
    """
    logits = torch.einsum("bd,bkd->bk", own.queries, own.documents) / temperature
    kept = torch.cat([torch.ones_like(logits[:, :1], dtype=torch.bool), own_negatives(own, logits)[1]], dim=1)
    right = torch.zeros_like(logits)
    right[:, 0] = 1.0
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, right, reduction="none")
    return losses.masked_fill(~kept, 0.0).sum(dim=1) / kept.sum(dim=1)


# Gemini Embedding's loss: in-batch positives with a duplicate mask, and the query's own negatives (arXiv 2503.07891).
#
# L_i = -log( exp(s(q_i, p_i+)/t) / ( sum_j m_ij exp(s(q_i, p_j+)/t) + sum_k exp(s(q_i, n_ik)/t) ) )
#
# m_ij = 0 for j != i where q_j equals q_i or p_j equals p_i, else 1: few labels make many equal positives in a
# classification batch. p_j that is another right answer to q_i counts as equal, and so does a negative that is one. No
# same-tower terms. Gemini has one negative a query; here all of its own count.


def gemini(own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
    """Per-query losses [b], see ``Loss``; needs the positives of the batch."""
    kept = asking_otherwise(own, batch, first)
    groups = torch.einsum("bd,bkd->bk", own.queries, own.documents)
    positives = own.queries @ batch.documents[:, 0].T
    return loss_of(groups[:, 0], [own_negatives(own, groups), (positives, kept)], temperature)


# Gecko's loss: in-batch positives, the other queries, and the query's own negatives (arXiv 2403.20327, Eq. 3).
#
# L_i = -log( exp(s(q_i, p_i+)/t) / ( sum_j [ exp(s(q_i, p_j+)/t) + [j != i] exp(s(q_i, q_j)/t) ] + sum_k exp(s(q_i, n_ik)/t) ) )
#
# Gecko has one negative a query; here all of its own count. The paper masks nothing; here, as for Gemini's loss, another
# query is left out with its positive where it is the same text or its positive is a right answer to q_i, as is a
# negative that is one: a batch with two rows of one query would else teach both to be wrong.


def gecko(own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
    """Per-query losses [b], see ``Loss``; needs the positives of the batch."""
    others = asking_otherwise(own, batch, first)
    groups = torch.einsum("bd,bkd->bk", own.queries, own.documents)
    positives = own.queries @ batch.documents[:, 0].T
    queries = own.queries @ batch.queries.T
    return loss_of(
        groups[:, 0],
        [own_negatives(own, groups), (positives, others), (queries, others)],
        temperature,
    )


# Qwen3-Embedding's loss: own negatives and four kinds of in-batch terms, with a false-negative mask (arXiv 2506.05176).
#
# Z_i = exp(s(q_i, d_i+)/t) + sum_k m exp(s(q_i, d_ik-)/t) + sum_{j != i} m exp(s(q_i, q_j)/t)
#       + sum_{j != i} m exp(s(d_i+, d_j)/t) + sum_{j != i} m exp(s(q_i, d_j)/t),     L_i = -log( exp(s(q_i, d_i+)/t) / Z_i )
#
# m = 0 where that term's own similarity is above s(q_i, d_i+) + 0.1, or where the document equals d_i+; else 1. Any other
# right answer to q_i counts as equal to d_i+.
#
# Two things the report leaves open:
#
# - What d_j spans. ``all`` documents of the other queries, positives and negatives, is how arXiv 2511.07025 §6.1 reads
#   it, and whose ablation this repeats; ``positives`` is the narrower reading.
# - Which document decides for a query term s(q_i, q_j). Here its positive does: where d_j+ equals d_i+, both queries
#   ask for the same document and q_j is no negative of q_i; nor is it where both are one text.
#
# The mask is a decision, not a part of the function: no gradient flows through it.


MARGIN = 0.1


def qwen3(own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
    """Per-query losses [b], see ``Loss``; the documents in ``batch`` are those that d_j spans."""
    spanned = batch.documents.shape[1]
    others = other_queries(len(own), len(batch), first, own.queries.device)
    wide = others.repeat_interleave(spanned, dim=1)
    documents = batch.documents.flatten(0, 1)
    same_document = is_right(own, batch.document_keys.flatten())
    groups = torch.einsum("bd,bkd->bk", own.queries, own.documents)
    limit = groups[:, :1].detach() + MARGIN
    terms = [
        own_negatives(own, groups),
        (own.queries @ batch.queries.T, asking_otherwise(own, batch, first)),
        (own.documents[:, 0] @ documents.T, wide & ~same_document),
        (own.queries @ documents.T, wide & ~same_document),
    ]
    return loss_of(groups[:, 0], [(scores, kept & (scores <= limit)) for scores, kept in terms], temperature)


# Distillation: the model's similarities of a query and its own documents against a teacher's scores of them.
#
# Both are divided by their temperatures first. A document without a score is left out on both sides; a row in which fewer
# than two documents are left (for margins: the positive, or all negatives) has loss 0.


_NOWHERE = -1e9  # as a logit: chance 0, and unlike -inf no NaN where two of them meet


def kl_divergence(similarities: Tensor, scores: Tensor) -> Tensor:
    """KL(teacher || model) over each query's documents.

    sentence-transformers' DistillKLDivLoss is its mean, times the squared temperature of the model.

    Args:
        similarities: [b, 1 + k], over the temperature.
        scores: the teacher's [b, 1 + k], over its own; NaN: none.

    Returns:
        Losses [b].
    """
    known = torch.isfinite(scores)
    teacher = torch.log_softmax(scores.masked_fill(~known, _NOWHERE), dim=1)
    model = torch.log_softmax(similarities.masked_fill(~known, _NOWHERE), dim=1)
    return (teacher.exp() * (teacher - model)).sum(dim=1)


def margin_mse(similarities: Tensor, scores: Tensor) -> Tensor:
    """Mean squared difference of the margins between positive and negative (arXiv 2010.02666, Eq. 6).

    sentence-transformers' MarginMSELoss is its mean where every document has a score. Arguments and result as of
    ``kl_divergence``.
    """
    known = torch.isfinite(scores[:, 1:]) & torch.isfinite(scores[:, :1])
    found = torch.where(torch.isfinite(scores), scores, 0.0)
    errors = (similarities[:, :1] - similarities[:, 1:]) - (found[:, :1] - found[:, 1:])
    return (errors**2).masked_fill(~known, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)


DISTILLATION: dict[DistillationLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl_divergence,
    "margin_mse": margin_mse,
}


@dataclass(frozen=True, slots=True)
class Distillation:
    """The part of an objective that compares the model with a teacher."""

    loss: Callable[[Tensor, Tensor], Tensor]
    contrastive_weight: float

    def __call__(self, own: VectorGroups) -> Tensor:
        """Weighted losses [b].

        Raises:
            DataError: queries without a teacher's scores.
        """
        teacher = own.teacher
        if teacher is None or teacher.scores.shape != own.documents.shape[:2]:
            found = None if teacher is None else tuple(teacher.scores.shape)
            raise DataError(
                f"distillation: teacher's scores {found} do not fit documents {tuple(own.documents.shape)}"
            )
        similarities = torch.einsum("bd,bkd->bk", own.queries, own.documents)
        precise = torch.promote_types(similarities.dtype, torch.float32)
        similarities = similarities.to(precise) / teacher.temperatures[:, None]
        return self.loss(similarities, teacher.scores.to(precise)) * teacher.weights


# What of the other workers' queries a loss compares with.
Needs = Literal["nothing", "positives", "documents"]


class Loss(Protocol):
    """A loss of some queries of a batch."""

    def __call__(self, own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
        """Per-query losses [b].

        Args:
            own: the queries whose losses are wanted.
            batch: the whole global batch, in which ``own`` stands at ``first``; of its documents only the
                positives where no more are needed.
            first: position of ``own`` in ``batch``.
            temperature: divides the cosine similarities (arXiv 2511.07025: 0.02).
        """
        ...


LOSSES: dict[str, tuple[Loss, Needs]] = {
    "infonce": (infonce, "nothing"),
    "gecko": (gecko, "positives"),
    "qwen3": (qwen3, "documents"),
    "gemini": (gemini, "positives"),
}


RERANKER_LOSSES: dict[RerankerLoss, Loss] = {"infonce": infonce, "bce": binary_cross_entropy}


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss with its settings: what the training loop minimises."""

    loss: Loss
    needs: Needs
    temperature: float
    prefixes: Prefixes | None = None
    distillation: Distillation | None = None

    @classmethod
    def of(cls, config: TrainingConfig, dimension: int, normalize: bool) -> "Objective":
        """The objective of a config, for vectors of ``dimension``.

        Raises:
            ConfigError: unknown loss, or Matryoshka dimensions that do not fit the model.
        """
        loss, needs = get_loss(config.loss)
        if config.loss == "qwen3" and config.qwen3_documents == "positives":
            needs = "positives"
        section = config.distillation
        distillation = (
            None if section is None else Distillation(DISTILLATION[section.loss], section.contrastive_weight)
        )
        if config.matryoshka is None:
            return cls(loss, needs, config.temperature, None, distillation)
        sizes = config.matryoshka.dimensions
        if max(sizes) != dimension:
            raise ConfigError(
                f"training.matryoshka.dimensions: {list(sizes)}; the largest must be the model's own, {dimension}"
            )
        weights = config.matryoshka.weights or (1.0,) * len(sizes)
        return cls(loss, needs, config.temperature, Prefixes(sizes, weights, normalize), distillation)

    @classmethod
    def of_reranker(cls, loss: RerankerLoss, config: TrainingConfig) -> "Objective":
        """The objective of a reranker, whose logits are similarities of one dimension.

        Args:
            loss: of ``RERANKER_LOSSES``.
            config: the section as a training, see ``RerankerConfig.training``.
        """
        section = config.distillation
        distillation = (
            None if section is None else Distillation(DISTILLATION[section.loss], section.contrastive_weight)
        )
        return cls(RERANKER_LOSSES[loss], "nothing", config.temperature, None, distillation)

    def __call__(self, own: VectorGroups, batch: VectorGroups, first: int) -> Tensor:
        """Per-query losses [b] of the queries that stand at ``first`` in the batch."""
        if self.prefixes is None:
            return self._of_view(own, batch, first)
        views = zip(self.prefixes.views(own), self.prefixes.views(batch), strict=True)
        losses = [weight * self._of_view(cut, cut_batch, first) for (weight, cut), (_, cut_batch) in views]
        return sum(losses[1:], losses[0])

    def _of_view(self, own: VectorGroups, batch: VectorGroups, first: int) -> Tensor:
        contrastive = self.loss(own, batch, first, self.temperature)
        if self.distillation is None:
            return contrastive
        return self.distillation.contrastive_weight * contrastive + self.distillation(own)

    def shared_part(self, own: VectorGroups) -> VectorGroups:
        """What of one worker's groups the others need to see."""
        if self.needs == "documents":
            return own
        return VectorGroups(own.queries, own.documents[:, :1], own.query_keys, own.document_keys[:, :1])


def get_loss(name: str) -> tuple[Loss, Needs]:
    """The loss of a name, and what it compares with.

    Raises:
        ConfigError: unknown name.
    """
    if name not in LOSSES:
        raise ConfigError(f"training.loss: {name!r} is unknown; allowed: {', '.join(sorted(LOSSES))}")
    return LOSSES[name]
