"""Configuration of the classic mixtures."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict

from s2moe.models.vision.base import VisionConfig
from s2moe.models.vision.mixture_networks import ARCHITECTURES, features_after
from s2moe.models.vision.mixture_splits import owners
from s2moe.objectives.sample_similarity import DISTANCES, REDUCTIONS, SCALES
from s2moe.options import check_fields, option


@strict
class MixtureConfig(VisionConfig):
    """A classic mixture of whole networks (Krishnamurthy et al. 2023). See models/vision/mixture.py.

    Raises:
        ValueError: on impossible values, naming the key.
    """

    model_type = "s2moe_mixture"

    architecture: str = option(
        "mnist",
        "experts and gate as published for a data set; any images will do that survive its pooling (cifar100 for "
        "CIFAR-10, say)",
        choices=tuple(ARCHITECTURES),
    )
    num_experts: int | None = option(
        None, "experts; null: as published for the architecture; 1: a single model without a gate", least=1, most=10_000
    )
    form: str = option(
        "mixture",
        "mixture: probabilities of all experts, mixed; stochastic: the probabilities of one expert, drawn by the gate",
        choices=("mixture", "stochastic"),
    )
    gate: str = option(
        "original",
        "original: a network with an output for each expert; attentive: attention over the experts' hidden states",
        choices=("original", "attentive"),
    )
    query_relu: bool | None = option(
        None,
        "ReLU before the attentive gate's query; null: as in the published code, for fmnist alone",
        needs="gate=attentive",
    )
    importance_loss: float = option(
        0.0, "coefficient of the squared variation of the gate's sums (unbiased variance)", least=0
    )
    sample_similarity: float = option(0.0, "beta_s of the sample similarity loss", least=0)
    sample_dissimilarity: float = option(0.0, "beta_d of the sample similarity loss", least=0)
    similarity_reduction: str = option(
        "pair_mean",
        "pair_mean: mean over pairs of samples; repo_sum: as the published code",
        choices=REDUCTIONS,
        needs="sample_similarity or sample_dissimilarity",
    )
    similarity_distance: str = option(
        "euclidean",
        "distance of two images, flattened",
        choices=DISTANCES,
        needs="sample_similarity or sample_dissimilarity",
    )
    similarity_scale: str = option(
        "batch_max",
        "batch_max: distances over their largest in the batch (published CIFAR-100 runs); none (MNIST, FMNIST)",
        choices=SCALES,
        needs="sample_similarity or sample_dissimilarity",
    )
    frozen: str = option("none", "what is not trained", choices=("none", "experts", "gate"))
    preset_split: str | None = option(
        None, "experts own classes, as in 0-7,1-9,2-4,3-8,5-6, and the label selects the expert; null: a gate does"
    )
    gate_kd: float = option(
        0.0,
        "coefficient of KL(teacher's attentive gate || gate) in distillation; the published method has none",
        least=0,
    )
    inference: str = option(
        "dense",
        "outside training: dense: all experts compute; top1: the gate's first choice alone computes; threshold: those "
        "above inference_threshold compute, and the first choice",
        choices=("dense", "top1", "threshold"),
    )
    inference_threshold: float = option(
        0.1,
        "gate value above which an expert computes, with inference=threshold",
        least=0,
        most=1,
        needs="inference=threshold",
    )
    batch_statistics: bool = option(
        False, "normalise by the batch's own statistics at test too, as the published code does; for replication"
    )

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        architecture = ARCHITECTURES[self.architecture]
        if self.num_experts is None:
            self.num_experts = architecture.experts
        if self.query_relu is None:
            self.query_relu = architecture.query_relu
        for network in (architecture.expert, architecture.gate):
            features_after(network, self.image_size)  # raises where nothing would be left
        if self.num_experts == 1:
            self._check_single()
        if self.preset_split is not None:
            owners(self.preset_split, self.num_classes, self.num_experts)
            self._require_unset("preset_split", "importance_loss", "sample_similarity", "sample_dissimilarity")
            if self.gate != "original" or self.frozen != "none" or self.inference != "dense":
                raise ValueError("preset_split: has no gate: leave gate, frozen and inference at their defaults")
        if self.inference != "dense" and self.gate == "attentive":
            raise ValueError(
                f"inference: {self.inference} cannot spare an expert, since the attentive gate needs all of them: "
                "distil the model into one with the original gate first"
            )
        if self.inference != "dense" and self.batch_statistics:
            raise ValueError(f"inference: {self.inference} needs running statistics: set batch_statistics=false")
        if self.gate_kd and (self.gate != "original" or self.frozen != "experts"):
            raise ValueError("gate_kd: is for gate=original with frozen=experts, which distillation sets")
        super().__post_init__(**kwargs)

    def _check_single(self) -> None:
        self._require_unset("num_experts=1", "importance_loss", "sample_similarity", "sample_dissimilarity", "gate_kd")
        for name, default in (("gate", "original"), ("form", "mixture"), ("frozen", "none"), ("inference", "dense")):
            if getattr(self, name) != default:
                raise ValueError(f"{name}: num_experts=1 has no gate: leave it at {default}")

    def _require_unset(self, what: str, *names: str) -> None:
        for name in names:
            if getattr(self, name):
                raise ValueError(f"{name}: {what} has no gate to train: leave it at 0")
