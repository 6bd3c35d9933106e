"""The settings of a pre-training run, and the checks that can be made before anything is allocated.

`configs/*.yaml` are written against these classes; `launcher/pretrain.py --help` prints them.
Two checks need more than the file: `check_world` the number of processes, `RunConfig.model_config`
the corpus' vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from s2moe.moe.config import typed_moe
from s2moe.moe.routers import ROUTERS
from s2moe.options import option

from .loader import to_dict
from .model import default_model, facts_of, model_section, with_router
from .options import ConfigError, Section, dataclass_section
from .relevance import Settings

if TYPE_CHECKING:
    from s2moe.data import Corpus
    from s2moe.models.configuration import S2MoEConfig

MINUTES = 10**6  # two years, which clocks of all kinds can count
SEEDS = 2**32  # what every generator takes


@dataclass
class DataConfig:
    dir: str = option(help="directory of a prepared corpus, written by `python -m data_prep`")
    train: str = option("train", "split to train on")
    validation: str = option("valid", "split whose bits per byte, character or word are reported")
    prepare: str | None = option(
        None, "what `python -m data_prep` is given, beside --out, to write the corpus: named where it is missing"
    )

    def open(self) -> Corpus:
        """Open the corpus; CorpusError with the command that prepares it."""
        from s2moe.data import Corpus

        command = f"python -m data_prep {self.prepare} --out {self.dir}" if self.prepare else None
        return Corpus.open(self.dir, command)


@dataclass
class OptimizerConfig:
    name: ClassVar[str] = "adamw"  # of training/engine.OPTIMIZERS; images have a choice
    decayed: ClassVar[str] = "matrices"
    lr: float = option(3e-4, "peak learning rate of AdamW", above=0)
    betas: tuple[float, float] = option((0.9, 0.95), "decay of AdamW's first and second moment", least=0, below=1)
    eps: float = option(1e-8, "added to AdamW's denominator", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices; norms and biases have none", least=0)
    clip: float = option(1.0, "largest norm of the whole gradient; 0 switches clipping off", least=0)


@dataclass
class ScheduleConfig:
    kind: Literal["cosine", "constant_cooldown"] = option(
        "cosine", "cosine: falls from the first step after warm-up; constant_cooldown: flat, then linear to the end"
    )
    warmup_steps: int = option(0, "steps of linear warm-up from 0", least=0)
    min_lr_ratio: float = option(0.1, "learning rate at the last step, as a fraction of the peak", least=0, most=1)
    cooldown_fraction: float = option(
        0.2,
        "part of all steps that the cool-down takes (constant_cooldown)",
        least=0,
        most=1,
        needs="kind=constant_cooldown",
    )


@dataclass
class TrainingConfig:
    steps: int = option(help="optimizer steps of the whole run; the schedule ends here", least=1)
    global_batch: int = option(help="sequences per optimizer step over all processes", least=1)
    sequence_length: int = option(help="tokens per training sequence", least=1)
    micro_batch: int | None = option(
        None, "sequences per process and forward pass; null: global_batch / processes, no accumulation", least=1
    )
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "dtype of weights and activations; optimizer state and router arithmetic are always float32"
    )
    zero_stage: int = option(1, "DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 weights too")
    sequence_parallel: int = option(
        1,
        "processes that share each sequence's tokens (Ulysses), for long ones; divides sequence_length and heads",
        least=1,
    )
    offload_optimizer: bool = option(
        False, "keep optimizer state and its float32 weights in the host's memory, and step there: fits more, is slower"
    )
    expert_parallel: int = option(
        1, "processes that share one copy of the experts; divides processes and experts", least=1
    )
    freeze: Literal["none", "routers", "experts", "routers_and_experts"] = option(
        "none", "what of the SMoE layers is not trained; X-MoE fine-tunes with routers_and_experts"
    )
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    compile: bool = option(False, "torch.compile the dense parts of the model (attention)")
    stop_after_minutes: float | None = option(
        None, "save a checkpoint and stop after this time; the same command then resumes", above=0, most=MINUTES
    )
    timeout_minutes: float = option(
        30.0,
        "a process that made no progress for so long ends, and names the one it waits for; above any checkpoint",
        above=0,
        most=MINUTES,
    )

    def __post_init__(self) -> None:
        check_training(self)


@dataclass
class InitConfig:
    weights: str | None = option(
        None,
        "run or Hugging Face directory whose weights a new run begins with, its optimizer fresh; experts may be twice "
        "as many as there, or of a dense model's MLPs (one trained with model.moe.first_dense=num_hidden_layers)",
    )
    noise: float = option(
        0.01,
        "what copied experts are told apart by: standard deviation, relative to that of each matrix",
        least=0,
        needs="weights",
    )


@dataclass
class EvaluationConfig:
    every: int = option(1000, "steps between validations; 0: only at the end", least=0)
    context: int = option(
        512,
        "tokens before every scored token, where they exist; it attends to the last "
        "model.max_position_embeddings of them, itself included",
        least=1,
    )
    segment: int = option(512, "tokens scored per window; the window holds context + segment - 1 tokens", least=1)
    batch: int = option(16, "windows per process and forward pass", least=1)
    max_symbols: int | None = option(
        None,
        "during training score only the first so many bytes, characters or words; the last validation scores all",
        least=2,
        needs="every",
    )


@dataclass
class ProbeConfig:
    every: int = option(
        0,
        "steps between probes of the SMoE layers, the collapse metrics (and one at the end); 0: none",
        least=0,
        needs="SMoE layers",
    )
    tokens: int = option(
        4096,
        "first so many tokens of the validation split, in windows of training.sequence_length; the same every time",
        least=1,
        needs="every",
    )
    samples: int = option(
        256,
        "tokens among them, evenly spaced, that all experts compute to compare their outputs",
        least=2,
        needs="every",
    )


@dataclass
class CheckpointConfig:
    every: int = option(1000, "steps between checkpoints; 0: only at the end", least=0)
    keep: int = option(2, "complete checkpoints to keep", least=1)
    asynchronous: bool = option(
        False,
        "write behind training: it waits only for a copy in the host's memory, and a failed write ends it later",
    )
    resume: Literal["auto", "never", "must"] = option(
        "auto", "auto: continue from the newest checkpoint if there is one; never, must: an error if there is, is not"
    )


@dataclass
class LogConfig:
    every: int = option(50, "steps between log events (metrics.jsonl, TensorBoard, progress)", least=1)
    tensorboard: bool = option(True, "write TensorBoard event files")
    images_every: int = option(
        500, "steps between load heat-maps and histograms in TensorBoard; 0: none", least=0, needs="tensorboard"
    )


@dataclass
class LoggingConfig(LogConfig):
    sample_prompt: str = option("The ", "text that the sample at the end of the run continues", needs="sample_tokens")
    sample_tokens: int = option(300, "tokens of that sample; 0: none", least=0)


@dataclass
class ProfileConfig:
    steps: str | int | None = option(
        None, "write torch profiler traces of these steps, e.g. 10 or 10-12, to the run's profile/; null: none"
    )
    layers_every: int = option(
        1000,
        "steps between samples (and one at step 10) of the time inside the SMoE layers: dispatch, all-to-all, "
        "experts; 0: none",
        least=0,
        needs="SMoE layers",
    )

    def __post_init__(self) -> None:
        self.range()

    def range(self) -> tuple[int, int] | None:
        """First and last of the steps to trace."""
        if self.steps is None:
            return None
        first, _, last = str(self.steps).partition("-")
        valid = first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first)
        require(valid, "profile.steps", "must be a step or a range of steps such as 10-12", self.steps)
        return int(first), int(last or first)

    def check(self, steps: int) -> None:
        """Raise ConfigError unless a run of so many steps has one of those to trace."""
        traced = self.range()
        require(traced is None or traced[0] <= steps, "profile.steps", f"the run ends at step {steps}", self.steps)


class Run:
    """What the settings of every run say of its directory and of how a batch is dealt out."""

    name: str
    output_dir: str
    training: Any
    logging: LogConfig
    profile: ProfileConfig

    @property
    def directory(self) -> Path:
        """Where the run writes everything."""
        return Path(self.output_dir) / self.name

    def accumulation_steps(self, world_size: int) -> int:
        """Forward passes per process and optimizer step."""
        together = world_size // self.training.sequence_parallel
        return self.training.global_batch // (self.micro_batch(world_size) * together)

    def micro_batch(self, world_size: int) -> int:
        """Sequences or images per process and forward pass."""
        return self.training.micro_batch or self.training.global_batch * self.training.sequence_parallel // world_size

    def check_name(self) -> None:
        """Raise ConfigError unless the name can be a directory's."""
        usable = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        require(usable, "name", "must be a file name", self.name)


@dataclass(kw_only=True)
class RunConfig(Run):
    """Everything that decides a run. `model` holds `S2MoEConfig`'s own fields, resolved, as a plain dict."""

    name: str = option(help="name of the run: its directory is output_dir/name")
    data: DataConfig = option(help="the corpus")
    training: TrainingConfig = option(help="length, batch and parallelism")
    output_dir: str = option("runs", "directory of all runs")
    seed: int = option(1, "initial weights, order of the data, dropout and noise", least=0, below=SEEDS)
    model: dict[str, Any] = option(factory=default_model, section=model_section())
    init: InitConfig = option(factory=InitConfig)
    optimizer: OptimizerConfig = option(factory=OptimizerConfig)
    schedule: ScheduleConfig = option(factory=ScheduleConfig)
    evaluation: EvaluationConfig = option(factory=EvaluationConfig)
    probe: ProbeConfig = option(factory=ProbeConfig)
    checkpoint: CheckpointConfig = option(factory=CheckpointConfig)
    logging: LoggingConfig = option(factory=LoggingConfig)
    profile: ProfileConfig = option(factory=ProfileConfig)

    def __post_init__(self) -> None:
        self.check_name()
        training, schedule = self.training, self.schedule
        if self.model["max_position_embeddings"] is None:
            self.model["max_position_embeddings"] = training.sequence_length
        require(
            training.sequence_length <= self.model["max_position_embeddings"],
            "training.sequence_length",
            f"must not exceed model.max_position_embeddings={self.model['max_position_embeddings']}",
            training.sequence_length,
        )
        require(
            schedule.warmup_steps <= training.steps,
            "schedule.warmup_steps",
            f"must not exceed training.steps={training.steps}",
            schedule.warmup_steps,
        )
        require(
            not self.probe.every or self.probe.tokens >= training.sequence_length,
            "probe.tokens",
            f"must be at least training.sequence_length={training.sequence_length}, one window",
            self.probe.tokens,
        )
        self._check_experts()
        self.profile.check(training.steps)
        if training.sequence_parallel > 1:
            self._check_sequence_parallel()

    def _check_sequence_parallel(self) -> None:
        """Sequences can be cut where nothing but attention looks beyond a token."""
        moe, training, key = self.model["moe"], self.training, "training.sequence_parallel"
        size, heads = training.sequence_parallel, self.model["num_attention_heads"]
        groups = self.model["num_key_value_heads"] or heads
        for name, count in (
            ("training.sequence_length", training.sequence_length),
            ("model.num_attention_heads", heads),
        ):
            require(count % size == 0, key, f"must divide {name}={count}", size)
        require(
            groups % size == 0 or size % groups == 0,
            key,
            f"must divide model.num_key_value_heads={groups}, or be a multiple of it",
            size,
        )
        router = moe["router"]["name"]
        whole = [
            f"model.moe.router.name={router}" if not ROUTERS[router].tokenwise else "",
            "model.moe.router.sequence_loss" if moe["router"].get("sequence_loss") else "",
            "model.moe.stochastic.enabled" if moe["stochastic"]["enabled"] else "",
            "training.compile" if training.compile else "",
        ]
        found = " and ".join(filter(None, whole))
        tokenwise = sorted(name for name, cls in ROUTERS.items() if cls.tokenwise)
        require(
            not found,
            key,
            f"does not go with {found}, which needs whole sequences",
            size,
            f"use a router among {', '.join(tokenwise)} without those, or training.sequence_parallel=1 with "
            "training.activation_checkpointing=true, training.zero_stage=3 or a smaller training.micro_batch",
        )

    def _check_experts(self) -> None:
        moe, training = self.model["moe"], self.training
        if not self._facts()["SMoE layers"]:
            for name, default in (("expert_parallel", 1), ("freeze", "none")):
                value = getattr(training, name)
                require(
                    value == default, f"training.{name}", f"the model has no SMoE layers: leave it {default}", value
                )
        require(
            moe["num_experts"] % training.expert_parallel == 0,
            "training.expert_parallel",
            f"must divide model.moe.num_experts={moe['num_experts']}",
            training.expert_parallel,
        )
        if training.precision != "fp32":
            for name, size in (
                ("model.hidden_size", self.model["hidden_size"]),
                ("model.moe.expert_hidden", moe["expert_hidden"]),
            ):
                require(
                    size % 8 == 0,
                    name,
                    f"must be a multiple of 8 with {training.precision}: grouped matrix products need rows of 16 bytes",
                    size,
                )

    def _facts(self) -> dict[str, bool]:
        return facts_of(typed_moe(self.model["moe"]), self.model["num_hidden_layers"])

    def described(self) -> Settings:
        """The settings with the options of the router that is used."""
        section = dataclass_section(type(self))
        model = section.keys["model"]
        assert isinstance(model, Section)
        model = with_router(model, self.model["moe"]["router"]["name"])
        return Settings(replace(section, keys={**section.keys, "model": model}), to_dict(self), self._facts())

    def model_config(self, vocab_size: int) -> S2MoEConfig:
        """The model's configuration for a corpus of `vocab_size` symbols.

        Raises:
            ConfigError: if `model.vocab_size` is given and smaller than the corpus needs.
        """
        from s2moe.models.configuration import S2MoEConfig

        given = self.model["vocab_size"]
        require(
            given is None or given >= vocab_size,
            "model.vocab_size",
            f"the corpus {self.data.dir} has {vocab_size} symbols",
            given,
        )
        return S2MoEConfig(**{**self.model, "vocab_size": given or vocab_size})


def check_training(training: Any) -> None:
    """Raise ConfigError at what is impossible in the `training:` section of any run."""
    if training.micro_batch is not None:
        require(
            training.global_batch % training.micro_batch == 0,
            "training.micro_batch",
            f"must divide training.global_batch={training.global_batch}",
            training.micro_batch,
        )
    if training.zero_stage == 0:
        raise ConfigError(
            "training.zero_stage: 0 is not supported: DeepSpeed then clips gradients by a norm that depends on "
            "expert_parallel, and bf16 training diverges from stages 1-3. Use 1, which costs nothing more"
        )
    require(training.zero_stage in (1, 2, 3), "training.zero_stage", "must be 1, 2 or 3", training.zero_stage)


def check_world(config: Run, world_size: int) -> None:
    """Raise ConfigError where the run cannot be dealt to `world_size` processes."""
    training = config.training
    require(
        world_size % training.expert_parallel == 0,
        "training.expert_parallel",
        f"must divide the number of processes, {world_size}",
        training.expert_parallel,
        f"start a multiple of {training.expert_parallel} processes, or set training.expert_parallel=1",
    )
    require(
        world_size % training.sequence_parallel == 0,
        "training.sequence_parallel",
        f"must divide the number of processes, {world_size}",
        training.sequence_parallel,
        f"start a multiple of {training.sequence_parallel} processes, or set training.sequence_parallel=1",
    )
    together = world_size // training.sequence_parallel
    step = together * (training.micro_batch or 1)
    possible = max(1, training.global_batch // step) * step
    require(
        training.global_batch % step == 0,
        "training.global_batch",
        f"must be a multiple of processes {'/ sequence_parallel ' if together < world_size else ''}x micro_batch = "
        f"{together} x {training.micro_batch or 1}",
        training.global_batch,
        f"start another number of processes, or set training.global_batch={possible}"
        + (" or a smaller training.micro_batch" if training.micro_batch else ""),
    )


def require(condition: bool, key: str, rule: str, value: Any, remedy: str = "") -> None:
    """Raise ConfigError naming the key, the rule, the offending value and the remedy unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: {rule}, got {value!r}" + (f": {remedy}" if remedy else ""))
