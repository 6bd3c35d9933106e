"""Several models that learn the same text in turns: what a step of each costs, and what it has learned.

Legend: B sequences, S tokens of each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.data import Corpus, WindowSampler
from s2moe.data.units import unit_of
from s2moe.models.sizes import model_sizes
from s2moe.moe.routing import RoutingContext
from s2moe.training.evaluation import Protocol, evaluate
from s2moe.training.stopwatch import stopwatch

WARM_UP = 20  # steps


@dataclass(frozen=True)
class Text:
    """The task: windows of ``sequence`` bytes, ``batch`` of them a step, for ``steps`` steps."""

    corpus: Path
    sequence: int = 256
    batch: int = 8
    steps: int = 300
    lr: float = 2e-3
    seed: int = 1
    scored: int | None = None  # validation bytes that are scored; None: all


@dataclass
class Learner:
    """One method's model on its way through the text."""

    method: str
    model: S2MoEForCausalLM
    optimizer: torch.optim.Optimizer
    milliseconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, method: str, sizes: dict[str, Any], moe: dict[str, Any], seed: int) -> Learner:
        """A new model; every method starts from the same seed."""
        torch.manual_seed(seed)
        model = S2MoEForCausalLM(S2MoEConfig(**sizes, moe={"method": method, **moe}))
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(method, model, torch.optim.AdamW(learned, betas=(0.9, 0.95), weight_decay=0.0, fused=True))

    def step(self, tokens_BS: Tensor, context: RoutingContext) -> None:
        """One optimizer step, all that a trainer does in it: clipping and the routers' feedback included."""
        self.model.train()
        out = self.model(tokens_BS[:, :-1], shift_labels=tokens_BS[:, 1:].contiguous(), context=context)
        assert out.loss is not None
        assert out.routing is not None
        self.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.update_routers([out.routing])


@dataclass(frozen=True)
class Outcome:
    """Figures of one method. Times are medians and interquartile ranges over all steps."""

    method: str
    ms: float
    spread_ms: float
    ratio: float  # to the first method's step, round by round
    bpc: float
    parameters: int
    training_macs: int  # multiply-accumulates of a token's forward pass, as counted from the configuration
    inference_macs: int


def learn(learners: list[Learner], text: Text, device: torch.device, tell: Callable[[str], None]) -> Iterator[Outcome]:
    """Train all of them, taking turns at every step, then score each on the validation split.

    Ratios are medians of a round's ratios to the first learner, so what slows the machine down slows both.
    """
    corpus = Corpus.open(text.corpus)
    sampler = WindowSampler(corpus.split("train"), text.sequence, text.seed)
    clock = stopwatch(device)
    for number in range(text.steps):
        tokens_BS = torch.from_numpy(sampler.batch(number * text.batch, text.batch)).to(device)
        context = RoutingContext(seed=text.seed, step=number, steps=text.steps)
        for learner in learners:
            learner.optimizer.param_groups[0]["lr"] = text.lr * min(1.0, (number + 1) / WARM_UP)
        first = number % len(learners)
        for learner in learners[first:] + learners[:first]:
            work = _bound(learner.step, tokens_BS, context)
            learner.milliseconds.append(clock(work))
        if (number + 1) % 25 == 0:
            tell(f"step {number + 1} of {text.steps}")
    protocol = Protocol(context=text.sequence, segment=text.sequence, max_symbols=text.scored)
    validation = corpus.split("valid")
    for learner in learners:
        score = evaluate(learner.model.eval(), validation, corpus.metadata.vocab_size, protocol, device)
        yield outcome(learner, learners[0], score.bits_per_symbol)


def outcome(learner: Learner, base: Learner, bpc: float) -> Outcome:
    """The figures of a learner, its times relative to ``base``."""
    pairs = zip(learner.milliseconds, base.milliseconds, strict=True)
    low, median, high = statistics.quantiles(learner.milliseconds, n=4, method="inclusive")
    sizes = model_sizes(learner.model.config)
    return Outcome(
        method=learner.method,
        ms=median,
        spread_ms=high - low,
        ratio=statistics.median(own / other for own, other in pairs),
        bpc=bpc,
        parameters=sizes.total,
        training_macs=sizes.training_macs_per_token,
        inference_macs=sizes.macs_per_token,
    )


def markdown(outcomes: Iterable[Outcome], symbol: str) -> str:
    """The table for docs/methods.md, its figures in bits per `symbol`."""
    lines = [
        "| method | step, ms | x top-2 | training MACs a token, x top-2 | inference MACs, x top-2 | "
        f"{unit_of(symbol)} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base: Outcome | None = None
    for found in outcomes:
        base = base or found
        lines.append(
            f"| `{found.method}` | {found.ms:.0f} ± {found.spread_ms:.0f} | {found.ratio:.2f} | "
            f"{found.training_macs / base.training_macs:.2f} | {found.inference_macs / base.inference_macs:.2f} | "
            f"{found.bpc:.3f} |"
        )
    return "\n".join(lines)


def _bound(function: Callable[[Tensor, RoutingContext], None], *given: Any) -> Callable[[], None]:
    return lambda: function(*given)
