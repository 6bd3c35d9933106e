"""What a run does differently on texts and on images; everything else is run.py's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import TrainingState
from .feed import Feed
from .processes import Processes
from .run_log import RunLog

if TYPE_CHECKING:
    from s2moe.config.run import RunConfig
    from s2moe.config.vision import VisionRunConfig


class Job(ABC):
    """A run whose settings have been checked and whose data is open.

    Attributes:
        kind: of run, as its directory names it: see run_directory.py.
        config: with the number of steps known.
        state: of a run that has not begun, with everything that a checkpoint must agree with.
        flops_per_unit: of training on one unit of the feed; 0 where it is not known.
        sample: what the settings call one.
        symbol: what a figure per symbol is divided by; empty where there is none.
    """

    kind: str
    config: RunConfig | VisionRunConfig
    state: TrainingState
    feed: Feed
    flops_per_unit: float = 0.0
    sample: str = "sequences"
    symbol: str = ""

    @abstractmethod
    def initial(self) -> Any:
        """The weights that `init.weights` names, with a `description`.

        Raises:
            ConfigError: they do not fit.
        """

    @abstractmethod
    def build(self, processes: Processes, initial: Any) -> Any:
        """The engine, with weights that are drawn, or `initial`. Collective."""

    @abstractmethod
    def begin(self, engine: Any) -> None:
        """Called once, before the first step of a run; not where it goes on. Collective."""

    @abstractmethod
    def prober(self, engine: Any, processes: Processes, log: RunLog) -> Callable[[int], None]:
        """Called with a step, looks into the SMoE layers. Collective."""

    @abstractmethod
    def validate(self, engine: Any, full: bool) -> Any:
        """A score of the held-out split; of all of it, or of the part that is scored during training. Collective."""

    @abstractmethod
    def validation_values(self, score: Any) -> dict[str, Any]:
        """The figures of a score, as metrics.jsonl has them."""

    @abstractmethod
    def export(self, engine: Any, step: int) -> Path:
        """Write the finished model to the run directory. Collective."""
