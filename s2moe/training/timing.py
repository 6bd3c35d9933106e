"""What a run sees of itself: time by phase and by part of the layers, imbalance between ranks, memory.

The figures are logged per optimizer step, as the mean over processes and the slowest of them:

    time/data, forward, backward, wait, step   every step's phases, see phases.py; `_slowest` with each
    time/other                  the rest of the step: logging, sampling
    time/dispatch, all_to_all, experts         within forward and backward, sampled: see layer_times.py
    time/checkpoint, time/evaluation, time/probe   seconds of all since the log event before, of the first process
    expert_parallel/imbalance   rows of the busiest rank's experts over the mean, averaged; 1 is even
    memory_gib                  the largest peak of any process: of the GPU's allocator, else resident
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from s2moe.config.run import Run
from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import LayerStatistics
from s2moe.parallel import ExpertParallel

from .layer_times import PARTS, LayerTimes
from .phases import STEP_PHASES, PhaseClock
from .processes import Processes
from .rank_loads import RankLoads
from .trace import Trace

_TIMES = (*STEP_PHASES, "other", *PARTS.values())


class Timing:
    """The clocks of one process.

    Args:
        directory: the run's, for traces.
        say: tells the person at the console something.
    """

    def __init__(
        self,
        config: Run,
        model: torch.nn.Module,
        processes: Processes,
        directory: Path,
        say: Callable[[str], None],
    ) -> None:
        self.phase = PhaseClock(processes.device)
        self.occasions: dict[str, float] = {}  # seconds that no log event has told yet
        self._processes = processes
        self._accumulation = config.accumulation_steps(processes.world_size)
        layers = [module for module in model.modules() if isinstance(module, SMoELayer)]
        self._layers = LayerTimes(config.profile.layers_every if layers else 0, processes.device, say)
        self._loads = RankLoads(layers[0].parallel if layers else ExpertParallel())
        self._trace = Trace(config.profile.range(), directory, processes.rank, processes.device, say)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around step number `step` (from 1)."""
        self._trace.before(step)
        yield
        self._trace.after(step)

    @contextmanager
    def micro_batch(self, step: int, index: int) -> Iterator[None]:
        """Around forward and backward of a step's micro-batch number `index`; the first may be sampled."""
        if index == 0 and self._layers.is_due(step) and not self._trace.is_recording:
            with self._layers.sample():
                yield
        else:
            yield

    def add(self, routing: Sequence[LayerStatistics]) -> None:
        """What the layers report of a micro-batch."""
        self._loads.add(routing)

    def figures(self, steps: int, seconds: float) -> dict[str, float]:
        """The figures of `steps` steps in `seconds`, since the last call. Collective."""
        phases = self.phase.read()
        own = {name: phases.get(name, 0.0) / steps for name in STEP_PHASES}
        own["other"] = max(0.0, seconds / steps - sum(own.values()))
        own |= {name: part * self._accumulation for name, part in self._layers.read().items()}
        values = self._over_processes(
            [own.get(name, math.nan) for name in _TIMES] + [*self._imbalance(), self._memory()]
        )
        answer: dict[str, float] = {}
        for name, column in zip(_TIMES, values, strict=False):
            if not any(map(math.isnan, column)):
                answer[f"time/{name}"] = sum(column) / len(column)
                answer[f"time/{name}_slowest"] = max(column)
        imbalance, largest, memory = values[len(_TIMES) :]
        if not math.isnan(imbalance[0]):
            answer["expert_parallel/imbalance"] = sum(imbalance) / len(imbalance)
            answer["expert_parallel/imbalance_max"] = max(largest)
        answer["memory_gib"] = max(memory)
        occasions, self.occasions = self.occasions, {}
        return answer | occasions

    @contextmanager
    def occasion(self, name: str) -> Iterator[None]:
        """Around a checkpoint or an evaluation. Wall time: the device is waited for there anyway."""
        begin = time.perf_counter()
        yield
        key = f"time/{name}"
        self.occasions[key] = self.occasions.get(key, 0.0) + time.perf_counter() - begin

    def close(self) -> None:
        """Write a trace that has begun."""
        self._trace.close()

    def _imbalance(self) -> tuple[float, float]:
        return self._loads.read() or (math.nan, math.nan)

    def _memory(self) -> float:
        if self._processes.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _over_processes(self, values: list[float]) -> list[list[float]]:
        """Each figure's values on all processes."""
        if self._processes.world_size == 1:
            return [[value] for value in values]
        own = torch.tensor(values, dtype=torch.float64, device=self._processes.device)
        gathered = [torch.empty_like(own) for _ in range(self._processes.world_size)]
        dist.all_gather(gathered, own)
        return torch.stack(gathered, dim=1).tolist()
