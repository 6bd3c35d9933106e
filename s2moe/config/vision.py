"""The settings of a run on images. `configs/vision/*.yaml` are written against these classes.

`model` has two levels: `kind` names a published model, and the fields of its own configuration stand beside it.
Image size, channels and classes are the data set's, so that the same model section serves all sets.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from huggingface_hub.errors import StrictDataclassError

from s2moe.data.images import AUGMENTATIONS, IMAGE_SETS, ImageSet, open_images
from s2moe.models.vision import VISION_KINDS, VisionConfig
from s2moe.moe.config import MoEConfig, method_of, resolve_moe
from s2moe.options import nearest, option

from .help import section_text
from .loader import build as build_section
from .loader import check_keys, to_dict
from .model import with_router
from .options import MISSING, ConfigError, Key, Section, dataclass_section, hint_of, open_section
from .relevance import Settings
from .run import (
    MINUTES,
    SEEDS,
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    ProfileConfig,
    Run,
    ScheduleConfig,
    check_training,
    require,
)

FROM_THE_DATA = ("num_channels", "image_size", "num_classes")
DEFAULT_KIND = "mixture"


@dataclass
class VisionDataConfig:
    name: str = option("digits", "the set of images: see --list-sets; digits needs no network")
    source: str | None = option(
        None,
        "a local copy, directory or archive, of the set's official files; null: download them to data.dir",
        needs="name!=digits|synthetic_strokes",
    )
    dir: str = option("data", "where downloaded files are kept")
    options: dict[str, Any] = option(factory=dict, help="what the set itself can be asked for, such as its classes")
    augmentation: str | None = option(None, "of training images, none or flip_crop; null: the set's own")
    normalise: bool | None = option(
        None,
        "subtract the set's mean and divide by its standard deviation; false: pixels in [0, 1]; null: true, but for "
        "kind vae, which takes no other pixels, false",
        needs="model.kind!=vae",
    )
    fraction: float = option(1.0, "train on the first part of each class only", above=0, most=1)
    max_train: int | None = option(
        None, "train on so many images only, the same ones in every run, drawn by chance; null: all", least=1
    )
    max_test: int | None = option(None, "test on so many images only, likewise; null: all", least=1)

    def __post_init__(self) -> None:
        for name, known in (("name", IMAGE_SETS), ("augmentation", AUGMENTATIONS)):
            value = getattr(self, name)
            known_names = ", ".join(known)
            rule = f"unknown{nearest(value, known)}; known are {known_names}"
            require(value is None or value in known, f"data.{name}", rule, value)

    def open(self) -> ImageSet:
        """The images; CorpusError says what is missing, and how to get it."""
        images = open_images(self.name, source=self.source, directory=self.dir, **self.options).fraction(self.fraction)
        if self.normalise is False:
            images = dataclasses.replace(images, mean=(0.0,) * images.channels, std=(1.0,) * images.channels)
        return images.drawn(self.max_train or len(images.train), self.max_test or len(images.test))

    def augmentation_of_training(self) -> str:
        """The given augmentation, or the set's own."""
        return self.augmentation or IMAGE_SETS[self.name].augmentation


@dataclass
class VisionOptimizerConfig(OptimizerConfig):
    name: Literal["adam", "adamw", "sgd", "rmsprop"] = option(  # type: ignore[misc]
        "adam", "adam couples weight decay with the gradient, as the classic papers do; adamw does not"
    )
    lr: float = option(1e-3, "peak learning rate", above=0)
    betas: tuple[float, float] = option(
        (0.9, 0.999), "decay of the first and second moment (adam, adamw)", least=0, below=1, needs="name=adam|adamw"
    )
    eps: float = option(
        1e-8, "added to the denominator (adam, adamw, rmsprop)", above=0, needs="name=adam|adamw|rmsprop"
    )
    momentum: float = option(0.9, "of sgd and rmsprop", least=0, below=1, needs="name=sgd|rmsprop")
    weight_decay: float = option(0.0, "of all weights or of matrices, see decayed", least=0)
    decayed: Literal["all", "matrices"] = option(  # type: ignore[misc]
        "all",
        "what weight decay is for: all weights, as torch's optimizers have it, or no biases, norms and vectors",
        needs="weight_decay",
    )
    clip: float = option(0.0, "largest norm of the whole gradient; 0 switches clipping off", least=0)


@dataclass
class VisionScheduleConfig(ScheduleConfig):
    kind: Literal["constant", "step", "cosine", "linear"] = option(  # type: ignore[assignment]
        "constant", "step: falls by step_factor after every step_epochs; linear: to min_lr_ratio at the last step"
    )
    min_lr_ratio: float = option(
        0.0,
        "learning rate at the last step, as a fraction of the peak (cosine, linear)",
        least=0,
        most=1,
        needs="kind=cosine|linear",
    )
    step_epochs: int = option(20, "epochs between the falls of kind=step", least=1, needs="kind=step")
    step_factor: float = option(
        1 / 3, "what the learning rate is multiplied with at each of them", above=0, most=1, needs="kind=step"
    )
    cooldown_fraction: ClassVar[float] = 1.0  # type: ignore[misc]


@dataclass
class VisionTrainingConfig:
    epochs: float = option(
        20.0, "passes over the training images; the schedule ends with them", above=0, needs="not steps"
    )
    steps: int | None = option(
        None, "optimizer steps of the whole run, instead of epochs; null: those of the epochs", least=1
    )
    global_batch: int = option(512, "images per optimizer step over all processes", least=1)
    micro_batch: int | None = option(
        None, "images per process and forward pass; null: global_batch / processes, no accumulation", least=1
    )
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "dtype of weights and activations; optimizer state and router arithmetic are always float32"
    )
    zero_stage: int = option(1, "DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 weights too")
    offload_optimizer: bool = option(False, "keep optimizer state in the host's memory, and step there")
    expert_parallel: int = option(1, "processes that share one copy of SMoE layers' experts; divides both", least=1)
    freeze: Literal["none", "routers", "experts", "routers_and_experts"] = option(
        "none", "what of the SMoE layers is not trained; see model.frozen for a mixture"
    )
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    stop_after_minutes: float | None = option(
        None, "save a checkpoint and stop after this time; the same command then resumes", above=0, most=MINUTES
    )
    timeout_minutes: float = option(
        30.0,
        "a process that made no progress for so long ends, and names the one it waits for; above any checkpoint",
        above=0,
        most=MINUTES,
    )
    sequence_parallel: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_training(self)


@dataclass
class VisionInitConfig:
    weights: str | None = option(None, "a finished run's directory, or its hf/, that the new run's weights come from")
    stage: Literal["all", "distil", "gate_of_experts", "experts_of_gate"] = option(
        "all",
        "all: every weight, of the same model. Of a mixture: distil: its experts, kept, under an original gate whose "
        "output layer is new; gate_of_experts: a new gate for its experts, kept; experts_of_gate: the reverse",
    )

    def __post_init__(self) -> None:
        needed = self.weights is not None or self.stage == "all"
        require(needed, "init.stage", "needs init.weights to take from", self.stage)


@dataclass
class VisionEvaluationConfig:
    every: int = option(
        0, "steps between evaluations of the test split; 0: after every evaluation.every_epochs", least=0
    )
    every_epochs: float = option(
        1.0, "epochs between evaluations where `every` is 0; 0: only at the end", least=0, needs="not every"
    )
    batch: int = option(500, "images per process and forward pass", least=1)


@dataclass
class _NoProbe:
    """Probes of SMoE layers look at texts."""

    every: int = 0


@dataclass(kw_only=True)
class VisionRunConfig(Run):
    """Everything that decides a run. `model` holds `kind` and every field of that kind's configuration."""

    name: str = option(help="name of the run: its directory is output_dir/name")
    output_dir: str = option("runs", "directory of all runs")
    seed: int = option(
        1, "initial weights, order and augmentation of the images, dropout and noise", least=0, below=SEEDS
    )
    data: VisionDataConfig = option(factory=VisionDataConfig, help="the images")
    model: dict[str, Any] = option(factory=dict, help="kind, and that kind's own settings, listed below")
    init: VisionInitConfig = option(factory=VisionInitConfig, help="where a new run's weights come from")
    optimizer: VisionOptimizerConfig = option(factory=VisionOptimizerConfig)
    schedule: VisionScheduleConfig = option(factory=VisionScheduleConfig, help="of the learning rate")
    training: VisionTrainingConfig = option(factory=VisionTrainingConfig, help="length, batch and parallelism")
    evaluation: VisionEvaluationConfig = option(factory=VisionEvaluationConfig, help="on the test split")
    checkpoint: CheckpointConfig = option(factory=CheckpointConfig)
    logging: LogConfig = option(factory=LogConfig)
    profile: ProfileConfig = option(factory=ProfileConfig)
    probe: ClassVar[_NoProbe] = _NoProbe()

    def __post_init__(self) -> None:
        self.check_name()
        self.model = resolve_model(self.model)
        unit_pixels = VISION_KINDS[self.model["kind"]].model.unit_pixels
        self.data = dataclasses.replace(self.data, normalise=self.data.normalise is not False and not unit_pixels)

    def open_images(self) -> ImageSet:
        """The images, without their normalisation where the model needs pixels in [0, 1]."""
        return self.data.open()

    def described(self) -> Settings:
        """The settings with the fields of the model's kind, and the options of its router."""
        kind, section = self.model["kind"], dataclass_section(type(self))
        model, values = kind_section(kind), to_dict(self)
        fields = {name: known.default for name, known in model.keys.items() if isinstance(known, Key)} | self.model
        facts = {"SMoE layers": "moe" in model.keys and fields["placement"] != "none"}
        if "moe" in model.keys:
            given = fields["moe"] or {}
            try:
                moe = resolve_moe({"method": method_of(given, "vmoe"), "num_experts": 8, **given})
            except ValueError as error:
                raise ConfigError(f"model.moe: {error}") from error
            model, fields["moe"] = with_router(model, moe.router["name"]), dataclasses.asdict(moe)
        values["model"] = fields
        model = dataclasses.replace(model, keys={"kind": Key(str, MISSING), **model.keys})
        return Settings(dataclasses.replace(section, keys={**section.keys, "model": model}), values, facts)

    def for_images(self, images: int) -> VisionRunConfig:
        """The settings of a run on so many training images: with the number of steps that its epochs take.

        Raises:
            ConfigError: the schedule does not fit them.
        """
        training, evaluation = self.training, self.evaluation
        steps = training.steps or math.ceil(training.epochs * images / training.global_batch)
        every = evaluation.every or math.ceil(evaluation.every_epochs * images / training.global_batch)
        require(
            self.schedule.warmup_steps <= steps,
            "schedule.warmup_steps",
            f"must not exceed the run's {steps} steps",
            self.schedule.warmup_steps,
        )
        self.profile.check(steps)
        return dataclasses.replace(
            self,
            training=dataclasses.replace(training, steps=steps),
            evaluation=dataclasses.replace(evaluation, every=every),
        )

    def model_config(self, images: ImageSet) -> VisionConfig:
        """The model's configuration for a set of images.

        Raises:
            ConfigError: settings are impossible together, or with images of that size.
        """
        kind = VISION_KINDS[self.model["kind"]]
        fields = {name: value for name, value in self.model.items() if name != "kind"}
        sizes = {"num_channels": images.channels, "image_size": images.image_size, "num_classes": len(images.classes)}
        try:
            config = kind.config(**fields, **sizes)
        except (ValueError, TypeError, StrictDataclassError) as error:
            cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
            raise ConfigError(f"model: {cause}") from error
        self._check_experts(config)
        return config

    def resolved_model(self, config: VisionConfig) -> dict[str, Any]:
        """`model:` with every field of its kind, and what the configuration made of those that were null."""
        kind = self.model["kind"]
        return {"kind": kind, **{name: getattr(config, name) for name in kind_section(kind).keys}}

    def _check_experts(self, config: Any) -> None:
        moe, training = getattr(config, "moe", None), self.training
        recomputed = VISION_KINDS[self.model["kind"]].model.supports_gradient_checkpointing
        rule = f"model.kind={self.model['kind']} does not recompute activations: leave it false"
        require(recomputed or not training.activation_checkpointing, "training.activation_checkpointing", rule, True)
        if moe is None:
            kind = self.model["kind"]
            rule = f"must be 1: model.kind={kind} has no SMoE layers whose experts could be dealt out"
            require(training.expert_parallel == 1, "training.expert_parallel", rule, training.expert_parallel)
            rule = f"must be 1 or 2: model.kind={kind} is not made for weights that are cut up"
            require(training.zero_stage < 3, "training.zero_stage", rule, training.zero_stage)
            rule = f"model.kind={kind} has no SMoE layers"
            require(
                training.freeze == "none", "training.freeze", rule, training.freeze, "see model.frozen of a mixture"
            )
            return
        if config.placement == "none":
            rule = "model.placement=none has no SMoE layers: leave it"
            require(training.expert_parallel == 1, "training.expert_parallel", f"{rule} 1", training.expert_parallel)
            require(training.freeze == "none", "training.freeze", f"{rule} none", training.freeze)
        require(
            moe["num_experts"] % training.expert_parallel == 0,
            "training.expert_parallel",
            f"must divide model.moe.num_experts={moe['num_experts']}",
            training.expert_parallel,
        )


def resolve_model(given: dict[str, Any]) -> dict[str, Any]:
    """`model:` with its kind, and the given fields checked.

    Raises:
        ConfigError: there is no such kind, or it has no such field.
    """
    kind = given.get("kind", DEFAULT_KIND)
    if not isinstance(kind, str) or kind not in VISION_KINDS:
        known = ", ".join(VISION_KINDS)
        raise ConfigError(f"model.kind: {kind!r} is unknown{nearest(kind, VISION_KINDS)}; known are {known}")
    section, fields = kind_section(kind), {name: value for name, value in given.items() if name != "kind"}
    check_keys(fields, section, "model.")
    return {"kind": kind, **build_section(section, fields, "model.")}


@cache
def kind_section(kind: str) -> Section:
    """The settings of a kind: the fields of its configuration that are neither the data set's nor transformers' own."""
    config = VISION_KINDS[kind].config
    declared: dict[str, Any] = {}
    for cls in reversed(config.__mro__):
        if issubclass(cls, VisionConfig):
            declared |= inspect.get_annotations(cls, eval_str=True)
    keys: dict[str, Key | Section] = {}
    for item in dataclasses.fields(config):
        if item.name not in declared or item.name in FROM_THE_DATA or "help" not in item.metadata:
            continue
        hint = hint_of(item, declared)
        help = item.metadata["help"]
        if item.metadata["section"] is not None:
            keys[item.name] = item.metadata["section"]
        elif item.name == "moe":
            keys[item.name] = open_section(MoEConfig, dict, help)
        else:
            keys[item.name] = Key.of(item, hint, help)
    return Section(keys, dict, VISION_KINDS[kind].summary)


def explain_kinds() -> str:
    """The settings of every kind of model as text."""
    return "".join(section_text(kind_section(kind), "model", f"with model.kind={kind}") for kind in VISION_KINDS)
