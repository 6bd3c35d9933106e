"""The classic mixtures: whole networks as experts, and a gate that sees the image.

Krishnamurthy, Watkins & Gaertner 2023, "Improving Expert Specialization in Mixture of Experts". With p_ni the gate's
probability of expert i for image n (mixture_gates.py), and e_ni = softmax of expert i's outputs (mixture_networks.py):

    mixture      y_n = Σ_i p_ni e_ni,       loss = −mean_n log(y_n[t_n] + 1e-7)
    stochastic   y_n = e_{n s}, s ~ p_n,    loss = −mean_n log Σ_i p_ni (e_ni[t_n] + 1e-7)^½

Probabilities are mixed, not logits. The stochastic loss is −log Σ p exp(−½ l) with l an expert's cross-entropy. One
expert alone, without a gate, is the paper's single model. Added to the loss, over the images of the micro-batch:

    importance_loss · CV²(Σ_n p_n)     with the unbiased variance
    L_s                                objectives/sample_similarity.py, of the normalised images as they come in

Experts are frozen together with their batch normalisation, which then uses its running statistics.

Legend: B images, M experts, C classes, I channels, S image size, H width of the hidden states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2moe.metrics.selection import sample_entropy, usage_entropy
from s2moe.models.vision.base import VisionModel, VisionOutput, register_kind
from s2moe.models.vision.mixture_config import MixtureConfig
from s2moe.models.vision.mixture_gates import AttentiveGate, OriginalGate
from s2moe.models.vision.mixture_networks import ARCHITECTURES, StackedNetworks
from s2moe.models.vision.mixture_splits import owners
from s2moe.models.vision.stacked import StackedLayer
from s2moe.moe.routing import RoutingContext
from s2moe.objectives.balance import importance_loss
from s2moe.objectives.sample_similarity import sample_distance, sample_similarity_loss
from s2moe.precision import full_precision

EPSILON = 1e-7


class MixtureModel(VisionModel):
    """Experts, stacked, and a gate. The output's ``logits`` are log(y + 1e-7).

    Its ``gate`` is p, with sparse inference too; ``gate`` and ``selected_prediction`` are None for a single model.
    """

    owner_C: Tensor  # int64, the expert that each class belongs to, where there is a preset split
    config: MixtureConfig
    config_class = MixtureConfig

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        architecture, image = ARCHITECTURES[config.architecture], (config.num_channels, config.image_size)
        assert config.num_experts is not None
        assert config.query_relu is not None
        self.experts = StackedNetworks(
            architecture.expert, config.num_experts, image, config.num_classes, "experts", config.batch_statistics
        )

        def attentive() -> AttentiveGate:
            return AttentiveGate(architecture.gate, image, bool(config.query_relu), config.batch_statistics)

        self.gate: OriginalGate | AttentiveGate | None = None
        if config.num_experts > 1 and config.preset_split is None:
            if config.gate == "attentive":
                self.gate = attentive()
            else:
                self.gate = OriginalGate(architecture.gate, config.num_experts, image, config.batch_statistics)
        # The attentive gate that the gate learns from, where distillation asks for it.
        self.teacher_gate = attentive() if config.gate_kd else None
        if config.preset_split is not None:
            self.register_buffer("owner_C", torch.empty(config.num_classes, dtype=torch.int64))
        self.post_init()
        self.train(self.training)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StackedLayer | nn.BatchNorm2d):
            module.reset_parameters()
        elif module is self and self.config.preset_split is not None:
            split = owners(self.config.preset_split, self.config.num_classes, self.experts.count)
            self.owner_C.copy_(torch.tensor(split))

    def train(self, mode: bool = True) -> MixtureModel:
        """Training mode for all but frozen parts, whose batch normalisation keeps its running statistics."""
        super().train(mode)
        frozen = {"experts": self.experts, "gate": self.gate}.get(self.config.frozen)
        for part in (frozen, self.teacher_gate):
            if part is not None:
                part.eval().requires_grad_(False)  # here too, since from_pretrained makes the parameters anew
        return self

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, context: RoutingContext | None = None
    ) -> VisionOutput:
        """Loss (with ``labels`` [B]), logits, gate and predictions of images [B, I, S, S]."""
        image_BISS = pixel_values.to(self.dtype)
        if self.training or self.config.inference == "dense":
            hidden_MBH, logits_MBC = self.experts(image_BISS)
            expert_MBC = full_precision(logits_MBC).softmax(-1)
            gate_BM = self._gate(image_BISS, hidden_MBH, labels)
            logits_BC, selected_B = self._output(gate_BM, expert_MBC, context or RoutingContext())
        else:
            hidden_MBH, expert_MBC = None, None
            gate_BM = self._gate(image_BISS, None, labels)
            logits_BC, selected_B = self._sparse_output(gate_BM, image_BISS)
        output = VisionOutput(logits=logits_BC)
        if self.experts.count > 1:
            output.gate, output.selected_prediction = gate_BM, selected_B
        if labels is not None:
            if self.config.form == "stochastic" and expert_MBC is not None:
                output.task_loss = stochastic_loss(gate_BM, expert_MBC, labels)
            else:
                output.task_loss = F.nll_loss(logits_BC, labels)
            output.aux_loss, output.figures = self._auxiliary(gate_BM, image_BISS, hidden_MBH)
            output.loss = output.task_loss + output.aux_loss
        return output

    def expert_logits(self, pixel_values: Tensor) -> Tensor:
        """What every expert says of every image, before its softmax: float32 [M, B, C]."""
        return full_precision(self.experts(pixel_values.to(self.dtype))[1])

    def expert_weights(self) -> Tensor:
        """Every expert's weight matrices, flattened, without biases and normalisation: [M, ..]."""
        return self.experts.weights()

    def _gate(self, image_BISS: Tensor, hidden_MBH: Tensor | None, labels: Tensor | None) -> Tensor:
        if self.gate is not None:
            return self.gate(image_BISS, hidden_MBH)
        if self.config.preset_split is None:
            return full_precision(image_BISS.new_ones(len(image_BISS), 1))
        if labels is None:
            raise ValueError("preset_split: the label selects the expert, so the model needs labels")
        return F.one_hot(self.owner_C[labels], self.experts.count).to(full_precision(image_BISS[:0]).dtype)

    def _output(self, gate_BM: Tensor, expert_MBC: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """log(y + 1e-7), and the selected experts' predictions."""
        selected_B = prediction_of_selected(gate_BM, expert_MBC)
        if self.config.form == "stochastic":
            generator = context.generator(gate_BM.device, "expert")
            drawn_B1 = torch.multinomial(gate_BM.detach(), 1, generator=generator)
            mixed_BC = of_expert(expert_MBC, drawn_B1[:, 0])
        else:
            mixed_BC = torch.einsum("bm,mbc->bc", gate_BM, expert_MBC)
        return (mixed_BC + EPSILON).log(), selected_B

    def _sparse_output(self, gate_BM: Tensor, image_BISS: Tensor) -> tuple[Tensor, Tensor]:
        """The same of the experts that ``inference`` keeps, whose gate values are made to sum to 1."""
        first_BM = F.one_hot(gate_BM.argmax(1), gate_BM.shape[1]).bool()
        kept_BM = first_BM
        if self.config.inference == "threshold":
            kept_BM = first_BM | (gate_BM > self.config.inference_threshold)
        weight_BM = gate_BM * kept_BM
        weight_BM = weight_BM / weight_BM.sum(1, keepdim=True)
        mixed_BC, selected_B = self._compute_kept(image_BISS, weight_BM, kept_BM, first_BM)
        return (mixed_BC + EPSILON).log(), selected_B

    def _compute_kept(
        self, image_BISS: Tensor, weight_BM: Tensor, kept_BM: Tensor, first_BM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each expert on its own images alone.

        A loop, since no kernel convolves groups of images of different sizes with different weights; without images
        an expert costs nothing.
        """
        mixed_BC = weight_BM.new_zeros(len(weight_BM), self.config.num_classes)
        selected_B = torch.zeros(len(weight_BM), dtype=torch.int64, device=weight_BM.device)
        image_N = kept_BM.T.nonzero()[:, 1]  # expert by expert
        for expert, image_n in enumerate(image_N.split(kept_BM.sum(0).tolist())):
            if not len(image_n):
                continue
            probability = full_precision(self.experts.one(image_BISS[image_n], expert)).softmax(-1)
            mixed_BC.index_add_(0, image_n, weight_BM[image_n, expert, None] * probability)
            own = first_BM[image_n, expert]
            selected_B[image_n] = torch.where(own, probability.argmax(1), selected_B[image_n])
        return mixed_BC, selected_B

    def _auxiliary(
        self, gate_BM: Tensor, image_BISS: Tensor, hidden_MBH: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted auxiliary losses, and figures for the log."""
        config, total = self.config, gate_BM.new_zeros(())
        if self.experts.count == 1:
            return total, {}
        losses = {"importance": importance_loss(gate_BM, unbiased=True)}
        total = total + config.importance_loss * losses["importance"]
        if config.sample_similarity or config.sample_dissimilarity:
            distance_BB = sample_distance(image_BISS.flatten(1), config.similarity_distance, config.similarity_scale)
            losses["sample_similarity"] = sample_similarity_loss(
                gate_BM,
                distance_BB,
                config.sample_similarity,
                config.sample_dissimilarity,
                config.similarity_reduction,
            )
            total = total + losses["sample_similarity"]
        if self.teacher_gate is not None and hidden_MBH is not None:
            losses["gate_kd"] = divergence(self.teacher_gate(image_BISS, hidden_MBH), gate_BM)
            total = total + config.gate_kd * losses["gate_kd"]
        with torch.no_grad():
            figures = {name: loss.detach().float() for name, loss in losses.items()}
            figures |= {"h_s": sample_entropy(gate_BM).float(), "h_u": usage_entropy(gate_BM).float()}
        return total, figures


def of_expert(value_MBC: Tensor, expert_B: Tensor) -> Tensor:
    """Each image's row from its own expert, [B, C]."""
    return value_MBC[expert_B, torch.arange(len(expert_B), device=expert_B.device)]


def prediction_of_selected(gate_BM: Tensor, score_MBC: Tensor) -> Tensor:
    """The class that the expert of each image's largest gate value predicts, int64 [B]."""
    return of_expert(score_MBC.detach(), gate_BM.argmax(1)).argmax(1)


def stochastic_loss(gate_BM: Tensor, expert_MBC: Tensor, label_B: Tensor) -> Tensor:
    """−mean_n log Σ_i p_ni exp(−½ l_ni), with l_ni = −log(e_ni[t_n] + 1e-7)."""
    target_BM = expert_MBC.gather(2, label_B.expand(len(expert_MBC), -1)[..., None])[..., 0].T
    return -(gate_BM * (target_BM + EPSILON).sqrt()).sum(1).log().mean()


def divergence(teacher_BM: Tensor, gate_BM: Tensor) -> Tensor:
    """Mean over images of KL(teacher ‖ gate), in nats."""
    smallest = torch.finfo(gate_BM.dtype).tiny
    log_ratio_BM = teacher_BM.clamp(min=smallest).log() - gate_BM.clamp(min=smallest).log()
    return (teacher_BM * log_ratio_BM).sum(1).mean()


register_kind(
    "mixture", "whole networks as experts, gated by the image (Krishnamurthy et al.)", MixtureConfig, MixtureModel
)
