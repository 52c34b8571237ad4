"""What a stage trains, as the loop sees it: an embedding model, or a reranker on the same examples."""

import shutil
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from embedloom.config.reranker import RerankerConfig
from embedloom.config.training import TrainingConfig, TrainingStage
from embedloom.encoder.model import Encoder
from embedloom.encoder.pair_parity import golden_logits, save_golden_logits
from embedloom.encoder.pairs import PairEncoder, save_reranker
from embedloom.encoder.parity import embed_golden
from embedloom.training.checkpoints import save_final_model
from embedloom.training.gradients import ContrastiveModule, PairModule
from embedloom.training.losses import Objective
from embedloom.training.model import prepare_backbone


class Learner(Protocol):
    """A model in training."""

    encoder: Encoder  # its device, dtype, backbone, contract, and the tokens it has computed
    module: nn.Module  # what DeepSpeed wraps
    objective: Objective
    hidden_size: int  # for the cost of attention

    def lengths(self, row: list[int]) -> list[int]:
        """Tokens of what the model computes of an example, by those of its texts: the query, then its documents."""
        ...

    def longest(self, document_tokens: int, negatives: int) -> int:
        """Most tokens that an example can come to."""
        ...

    def golden(self) -> Any:
        """What it makes of the golden texts; under ZeRO-3, all workers must call it together."""
        ...

    def save(self, folder: Path, golden: Any) -> None:
        """Write the model folder; with whole weights, not a worker's part of them."""
        ...


class EmbeddingLearner:
    """An embedding model, each text by itself."""

    def __init__(self, encoder: Encoder, training: TrainingConfig, stage: TrainingStage) -> None:
        prepare_backbone(encoder.backbone, training, stage)
        self.encoder = encoder
        self.module: nn.Module = ContrastiveModule(encoder)
        self.objective = Objective.of(training, encoder.dimension, encoder.contract.normalize)
        self.hidden_size = encoder.dimension
        self._training = training

    def lengths(self, row: list[int]) -> list[int]:
        """See ``Learner.lengths``."""
        return row

    def longest(self, document_tokens: int, negatives: int) -> int:
        """See ``Learner.longest``."""
        return self.encoder.contract.max_query_tokens + (1 + negatives) * document_tokens

    def golden(self) -> Any:
        """See ``Learner.golden``."""
        return embed_golden(self.encoder)

    def save(self, folder: Path, golden: Any) -> None:
        """See ``Learner.save``."""
        save_final_model(self.encoder, folder, self._training, golden)


class RerankerLearner:
    """A reranker, each document with its query."""

    def __init__(
        self, encoder: PairEncoder, config: RerankerConfig, training: TrainingConfig, stage: TrainingStage
    ) -> None:
        prepare_backbone(encoder.backbone, training, stage)
        encoder.model.train()
        self.encoder: Encoder = encoder
        self.module: nn.Module = PairModule(encoder)
        self.objective = Objective.of_reranker(config.loss, training)
        self.hidden_size = int(encoder.backbone.config.hidden_size)
        self._pairs = encoder

    def lengths(self, row: list[int]) -> list[int]:
        """See ``Learner.lengths``."""
        query, *documents = row
        return [self._pairs.pairs.length(query, document) for document in documents]

    def longest(self, document_tokens: int, negatives: int) -> int:
        """See ``Learner.longest``."""
        return (1 + negatives) * self._pairs.pairs.max_tokens

    def golden(self) -> Any:
        """See ``Learner.golden``."""
        return golden_logits(self._pairs)

    def save(self, folder: Path, golden: Any) -> None:
        """See ``Learner.save``."""
        encoder = self._pairs
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_reranker(encoder.model, encoder.tokenizer, encoder.pairs.max_tokens, folder)
        save_golden_logits(golden, encoder.dtype, folder)
