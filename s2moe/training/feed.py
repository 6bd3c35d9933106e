"""What the training loop is fed with: the one thing in which text and images differ there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s2moe.config.run import RunConfig
from s2moe.data import WindowSampler, microbatch_start
from s2moe.data.units import bits_per_symbol
from s2moe.parallel.sequence_parallel import SequencePart

from .checkpoint import TrainingState
from .processes import Processes


class Feed(ABC):
    """Micro-batches as a pure function of the number of samples consumed, so that nothing has to be saved of it.

    Attributes:
        unit: what speed and length of a run are counted in.
        units: so many of them are in a sample.
    """

    unit: str
    units: int = 1

    @abstractmethod
    def inputs(self, samples: int, index: int) -> dict[str, Any]:
        """What the model is called with, beside its context: this process' micro-batch with an accumulation index.

        Args:
            samples: consumed before this optimizer step.
        """

    def epoch(self, samples: int) -> int:
        """Passes over the training data that are done after so many samples."""
        return 0

    def values(self, inputs: dict[str, Any], output: Any) -> dict[str, Tensor]:
        """Detached scalars of a micro-batch for the log, by name, the same at every step."""
        return {}

    def figures(self, state: TrainingState, means: Mapping[str, float]) -> dict[str, float]:
        """Further figures of a log event, made from its mean losses and values, which have the log's names."""
        return {}


class TextFeed(Feed):
    """Training sequences of a corpus, each cut where several processes share it.

    Args:
        sampler: the training sequences.
        symbols_V: symbols of each token of the vocabulary, by which bits per symbol are counted; None: one each.

    Legend: B sequences of a micro-batch, S sequence length, V vocabulary.
    """

    unit = "tokens"

    def __init__(
        self,
        config: RunConfig,
        processes: Processes,
        sampler: WindowSampler,
        symbols_V: NDArray[np.int64] | None = None,
    ) -> None:
        self.units = config.training.sequence_length
        self._sampler, self._device = sampler, processes.device
        self._symbols_V = None if symbols_V is None else torch.from_numpy(symbols_V).to(processes.device)
        self._part = SequencePart.of(processes.rank, processes.world_size, config.training.sequence_parallel)
        self._size = config.micro_batch(processes.world_size)

    def inputs(self, samples: int, index: int) -> dict[str, Any]:
        part = self._part
        first = microbatch_start(samples, self._size, part.group, part.groups, index)
        tokens_BS = to_device(torch.from_numpy(self._sampler.batch(first, self._size)), self._device)
        inputs_BS, labels_BS = tokens_BS[:, :-1], tokens_BS[:, 1:].contiguous()
        positions: dict[str, Tensor] = {}
        if part.size > 1:
            positions["position_ids"] = part.positions(inputs_BS.shape[1], inputs_BS.device).expand(self._size, -1)
            inputs_BS, labels_BS = part.cut(inputs_BS), part.cut(labels_BS)
        return {"input_ids": inputs_BS, "shift_labels": labels_BS, "use_cache": False, **positions}

    def values(self, inputs: dict[str, Any], output: Any) -> dict[str, Tensor]:
        """Where tokens count other than one symbol: the mean, which a mean loss has to be divided by."""
        if self._symbols_V is None:
            return {}
        return {"symbols_per_token": self._symbols_V[inputs["shift_labels"]].float().mean()}

    def figures(self, state: TrainingState, means: Mapping[str, float]) -> dict[str, float]:
        symbols = means.get("train/symbols_per_token", 1.0)
        return {"train/bpc": bits_per_symbol(means["train/task_loss"], symbols) if symbols else math.inf}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; its copy to a GPU goes on behind the next kernels."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
