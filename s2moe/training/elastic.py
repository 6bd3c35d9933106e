"""With how many processes, and how spread, a run goes on when fewer are left than it was started with."""

from __future__ import annotations

from dataclasses import dataclass

from s2moe.config.run import RunConfig


@dataclass(frozen=True)
class Shape:
    """Processes of a run, those that share one copy of the experts, and sequences per process and forward pass."""

    processes: int
    expert_parallel: int
    micro_batch: int

    @property
    def settings(self) -> list[str]:
        """As ``section.key=value`` arguments."""
        return [f"training.expert_parallel={self.expert_parallel}", f"training.micro_batch={self.micro_batch}"]


def shape_for(config: RunConfig, started: int, available: int) -> Shape | None:
    """The best shape for at most `available` processes of a run made for `started`; None where there is none.

    The global batch and so the training stay what they are, and no process gets larger micro-batches. Experts
    stay spread over as many processes as possible, since fewer need more memory each; then the most processes.
    """
    training, experts = config.training, config.model["moe"]["num_experts"]
    if available >= started:
        return Shape(started, training.expert_parallel, config.micro_batch(started))
    shapes = []
    for processes in range(training.sequence_parallel, available + 1, training.sequence_parallel):
        each, rest = divmod(training.global_batch, processes // training.sequence_parallel)
        if rest:
            continue
        degrees = [n for n in _divisors(processes) if n <= training.expert_parallel and experts % n == 0]
        micro_batches = [n for n in _divisors(each) if n <= config.micro_batch(started)]
        shapes.append(Shape(processes, max(degrees), max(micro_batches)))
    return max(shapes, key=lambda shape: (shape.expert_parallel, shape.processes), default=None)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
