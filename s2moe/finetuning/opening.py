"""What a fine-tuning run reads before it trains: weights, tokenizer, texts; checked against its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2moe.config import ConfigError
from s2moe.config.finetune import FinetuneConfig
from s2moe.data.classification import ClassificationData, load_classification, subset
from s2moe.data.encoding import EncodedTexts
from s2moe.training.agreement import together
from s2moe.training.processes import Processes
from s2moe.training.weights import Weights, find_weights

from .loading import changed_config
from .tokenizer import TheirTokenizer, tokenizer_of


@dataclass(frozen=True)
class Pretrained:
    """The weights that are fine-tuned, their tokenizer and their model's configuration."""

    weights: Weights
    tokenizer: TheirTokenizer
    config: Any

    @classmethod
    def open(cls, config: FinetuneConfig) -> Pretrained:
        """Find and read them.

        Raises:
            ConfigError, CorpusError: they are not there, or do not allow the run.
        """
        weights = find_weights(Path(config.model.checkpoint))
        tokenizer = tokenizer_of(weights)
        before = changed_config(weights, {})
        moe = before.moe_config()
        config.check_dense(sum(map(moe.is_sparse, range(before.num_hidden_layers))))
        if config.data.input_length > before.max_position_embeddings:
            raise ConfigError(
                f"data.input_length: {weights.description} was pre-trained on at most {before.max_position_embeddings} "
                f"tokens, got {config.data.input_length}: give data.input_length={before.max_position_embeddings}"
            )
        return cls(weights, tokenizer, before)

    def changes(self, config: FinetuneConfig, classes: tuple[str, ...]) -> dict[str, Any]:
        """What of the configuration the run changes; ConfigError for what is impossible."""
        changes = config.model_changes(self.config.moe_config().router, classes)
        changed_config(self.weights, changes)
        return changes

    def encoded(self, config: FinetuneConfig, data: ClassificationData) -> dict[str, EncodedTexts]:
        """The splits as the model reads them."""
        return {
            name: EncodedTexts(getattr(data, name), self.tokenizer, config.data.input_length, config.data.keep)
            for name in ("train", "validation", "test")
        }


def read_texts(config: FinetuneConfig) -> ClassificationData:
    """The texts of the settings, downloaded where need be.

    Raises:
        CorpusError: they cannot be had, or are not what the settings say.
    """
    settings = config.data
    found = load_classification(
        settings.task,
        settings.source,
        settings.validation,
        0,
        settings.official,
        settings.downloads,
        (settings.text_column or "text", settings.label_column or "label"),
    )
    return subset(found, settings.max_texts, 0) if settings.max_texts else found


def load_data(config: FinetuneConfig, processes: Processes) -> ClassificationData:
    """The texts; one process of a machine downloads them where need be. Collective."""
    data: ClassificationData | None = None
    with together(processes):
        if processes.local_rank == 0:
            data = read_texts(config)
    with together(processes):
        data = data or read_texts(config)
    assert data is not None
    return data
