"""The settings of a fine-tuning run. `configs/finetune/*.yaml` are written against these classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from s2moe.options import option, written

from .learning_rates import LearningRates
from .run import MINUTES, SEEDS, OptimizerConfig, require


@dataclass
class FinetuneDataConfig:
    task: Literal["sst2", "sst5", "imdb", "banking77", "own"] = option(
        help="the set of texts and classes; own: your files, any classes"
    )
    source: str | None = option(
        None,
        "a local copy, directory or archive, of the official files; null: download them to downloads/task. With task "
        "own: a directory or archive with train and, where you have them, validation and test, each .csv, .tsv or "
        ".jsonl; or one such file",
    )
    text_column: str | None = option(
        None, "the column, or field, of your files that holds the text; null: text", needs="task=own"
    )
    label_column: str | None = option(None, "the one that holds the class; null: label", needs="task=own")
    downloads: str = option("data", "where downloaded files are kept", needs="not source")
    official: bool = option(True, "whether the splits must have the official numbers of texts", needs="task!=own")
    validation: float = option(
        0.1,
        "part of train that is held out to choose the best epoch, where there is no validation split of its own",
        above=0,
        below=1,
        needs="task=imdb|banking77|own",
    )
    input_length: int = option(512, "most tokens of a text", least=1)
    keep: Literal["first", "last"] = option("first", "which tokens of a longer text remain")
    max_texts: int | None = option(
        None, "use at most so many texts of each split, for trying things; null: all", least=2
    )

    def __post_init__(self) -> None:
        require(
            self.task != "own" or self.source is not None,
            "data.source",
            "must say where your files are, with data.task=own",
            None,
        )


@dataclass
class FinetuneModelConfig:
    checkpoint: str = option(help="what to start from: a run directory of launcher/pretrain.py, or its hf/")
    balance_loss: float | None = option(
        0.0,
        "coefficient of the router's balance loss; 0 as published; null: as in pre-training, as all other auxiliary "
        "losses always are",
        least=0,
    )
    noise: bool = option(True, "keep S2MoE's noisy copies in training; false: train the clean path alone")
    hidden_dropout: float | None = option(
        None,
        "dropout of each residual branch, which native models and GPT-2 have; null: as in pre-training",
        least=0,
        below=1,
    )
    freeze: Literal["none", "routers", "experts", "routers_and_experts"] = option(
        "none", "what of the SMoE layers is not trained; X-MoE fine-tunes with routers_and_experts"
    )


@dataclass
class FinetuneOptimizerConfig(OptimizerConfig):
    lr: float = option(1e-4, "peak learning rate of AdamW", above=0)
    betas: tuple[float, float] = option((0.9, 0.999), "decay of AdamW's first and second moment", least=0, below=1)
    weight_decay: float = option(0.0, "decoupled weight decay of matrices; norms and biases have none", least=0)
    clip: float = option(1.0, "largest norm of the whole gradient", above=0)
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "of the learning rate, after warm-up")
    warmup: float = option(0.0, "part of all steps in which the learning rate rises from 0", least=0, below=1)
    factors: LearningRates = option(factory=LearningRates, help="learning rates by depth")


@dataclass
class FinetuneTrainingConfig:
    epochs: int = option(5, "passes over train; the schedule ends here", least=1)
    batch: int = option(16, "texts per optimizer step over all processes", least=1)
    micro_batch: int | None = option(None, "texts per process and forward pass; null: batch / processes", least=1)
    evaluation_batch: int = option(32, "texts per process and forward pass in evaluation", least=1)
    label_smoothing: float = option(0.0, "part of each label that is spread over all classes", least=0, below=1)
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "dtype of weights and activations")
    zero_stage: int = option(1, "DeepSpeed ZeRO: 1, 2 or 3", least=1, most=3)
    expert_parallel: int = option(
        1, "processes that share one copy of the experts; divides processes and experts", least=1
    )
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    timeout_minutes: float = option(
        30.0, "for processes to join, and for each wait for one another", above=0, most=MINUTES
    )


@dataclass
class FinetuneCheckpointConfig:
    keep: int = option(1, "checkpoints to keep, beside the best one; one is written after every epoch", least=1)
    resume: Literal["auto", "never", "must"] = option(
        "auto", "auto: continue from the newest checkpoint if there is one; never, must: an error if there is, is not"
    )


@dataclass
class FinetuneLoggingConfig:
    every: int = option(20, "steps between log events (metrics.jsonl, TensorBoard)", least=1)


@dataclass(kw_only=True)
class FinetuneConfig:
    """Everything that decides a fine-tuning run."""

    name: str = option(help="name of the run: its directory is output_dir/name")
    data: FinetuneDataConfig = option(help="texts and classes")
    model: FinetuneModelConfig = option(help="what is fine-tuned")
    output_dir: str = option("runs", "directory of all runs")
    seed: int = option(1, "the new head, order of the data, dropout and noise; not the splits", least=0, below=SEEDS)
    training: FinetuneTrainingConfig = option(factory=FinetuneTrainingConfig, help="length, batch and parallelism")
    optimizer: FinetuneOptimizerConfig = option(factory=FinetuneOptimizerConfig)
    checkpoint: FinetuneCheckpointConfig = option(factory=FinetuneCheckpointConfig)
    logging: FinetuneLoggingConfig = option(factory=FinetuneLoggingConfig)

    def __post_init__(self) -> None:
        valid = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        require(valid, "name", "must be a file name", self.name)

    @property
    def directory(self) -> Path:
        """Where the run writes everything."""
        return Path(self.output_dir) / self.name

    def micro_batch(self, world_size: int) -> int:
        """Texts per process and forward pass. Raises ConfigError where the batch cannot be dealt out."""
        training = self.training
        require(
            world_size % training.expert_parallel == 0,
            "training.expert_parallel",
            f"must divide the number of processes, {world_size}",
            training.expert_parallel,
        )
        micro = training.micro_batch or max(1, training.batch // world_size)
        require(
            training.batch % (micro * world_size) == 0,
            "training.batch",
            f"must be a multiple of processes x micro_batch = {world_size} x {micro}",
            training.batch,
        )
        return micro

    def check_dense(self, sparse_layers: int) -> None:
        """Raise ConfigError where settings of SMoE layers are given for a model that has none."""
        if sparse_layers:
            return
        for key, value, default in (
            ("model.balance_loss", self.model.balance_loss or 0.0, 0.0),
            ("model.freeze", self.model.freeze, "none"),
            ("model.noise", self.model.noise, True),
            ("training.expert_parallel", self.training.expert_parallel, 1),
        ):
            require(value == default, key, f"the model has no SMoE layers: leave it {written(default)}", value)

    def model_changes(self, router: dict[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
        """What of the pre-trained model's configuration is to change. `router`: its router's options."""
        moe: dict[str, Any] = {}
        if self.model.balance_loss is not None and "balance_loss" in router:
            moe["router"] = {"balance_loss": self.model.balance_loss}
        elif self.model.balance_loss:
            require(False, "model.balance_loss", f"the router {router['name']!r} has none", self.model.balance_loss)
        if not self.model.noise:
            moe["stochastic"] = {"enabled": False}
        changes: dict[str, Any] = {
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
            "problem_type": "single_label_classification",
            "moe": moe,
        }
        if self.model.hidden_dropout is not None:
            changes["hidden_dropout"] = self.model.hidden_dropout
        return changes
