"""Learning rates that differ with depth, for fine-tuning (Howard & Ruder 2018's discriminative rates)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from s2moe.options import option

HEADS = ("score.", "lm_head.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")  # h: GPT-2's
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|wpe)\.")


@dataclass(frozen=True)
class LearningRates:
    """Factors of the learning rate. The last block and the final norm have factor 1."""

    head: float = option(1.0, "factor of the learning rate of the head, which is new", least=0)
    layer_decay: float = option(1.0, "each block's learning rate, as a factor of the block's above it", least=0)
    embedding: float = option(
        1.0, "factor of the embedding's learning rate, besides a layer_decay for every block", least=0
    )

    def factors(self, num_layers: int) -> Callable[[str], float]:
        """The factor of a parameter by its name in a model of so many blocks."""

        def factor(name: str) -> float:
            layer = _LAYER.search(name)
            if layer is not None:
                return self.layer_decay ** (num_layers - 1 - int(layer[1]))
            if _EMBEDDING.search(name):
                return self.embedding * self.layer_decay**num_layers
            return self.head if any(head in name for head in HEADS) else 1.0

        return factor
