"""The vision Transformer with SMoE layers: V-MoE, and with ``placement=none`` the dense ViT.

Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts" (V-MoE); Dosovitskiy et al. 2021, "An Image is
Worth 16x16 Words" (ViT). Patches by a convolution, a class token, learned positions, then blocks

    x ← x + MHSA(LN x),   x ← x + MLP(LN x)  or  x + MoE(LN x)

and the head on the class token's normalised state. All products have biases but the router's. The class token is
routed as every patch is. An expert is the MLP of a dense block, with the same biases and GELU.

Placement, blocks counted from 0: every-n: blocks n-1, 2n-1, ... (every-2: 1, 3, 5); last-n: the last n odd blocks.

The head starts at zero, with bias -log C, so a fresh model gives every class the same probability. Sizes are named as
in the papers; S has 8 blocks here, not ViT-S' usual 12. With the 18,291 classes of JFT-300M and a tanh layer as wide as
the model (``representation_size``) they have the published numbers of parameters. The released code approximates GELU
by tanh (``activation=gelu_tanh``).

Every method of moe/methods.py is a setting of ``moe`` here, momentum and S2MoE included, but for routers that need
token ids or the order of a text. ``regularisers.snnl_classes=next_token`` takes an image's class for its tokens'.

Legend: B images, P patches, S = P + 1 tokens of an image, D model, F hidden, H heads, C classes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from s2moe.models.recomputation import WithoutReentrance
from s2moe.models.vision.base import VisionModel, VisionOutput, mean_auxiliary, register_kind
from s2moe.models.vision.vit_config import VMoEConfig
from s2moe.moe.expert_product import ACTIVATION_FUNCTIONS
from s2moe.moe.experts import Experts
from s2moe.moe.layer import SMoELayer, build_layer
from s2moe.moe.momentum import MomentumState, build_momentum
from s2moe.moe.regularisers import Regularisers
from s2moe.moe.routers import LinearScores, Router
from s2moe.moe.routers.vmoe import VMoERouter
from s2moe.moe.routing import LayerStatistics, RoutingContext
from s2moe.moe.stochastic import StochasticSMoELayer
from s2moe.parallel import ExpertParallel


def dropout(hidden: Tensor, rate: float, training: bool, context: RoutingContext, purpose: str) -> Tensor:
    """Dropout whose draws the context keys, so that recomputing and resuming repeat them."""
    if not training or not rate:
        return hidden
    generator = context.generator(hidden.device, purpose)
    drawn = torch.rand(hidden.shape, generator=generator, device=hidden.device)
    return hidden * (drawn >= rate).to(hidden.dtype) * (1 / (1 - rate))


class ViTEmbedding(nn.Module):
    """Patches, class token and positions, [B, channels, height, width] to [B, S, D]."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        sizes = config.sizes()
        self.image_size = config.image_size
        self.patch = nn.Conv2d(config.num_channels, sizes.hidden_size, sizes.patch_size, sizes.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, sizes.hidden_size))
        self.positions = nn.Parameter(torch.zeros(1, config.patches + 1, sizes.hidden_size))

    def reset_parameters(self) -> None:
        """As in ViT: positions normal with deviation 0.02, class token zero, LeCun's deviation for patches."""
        nn.init.zeros_(self.class_token)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.patch.weight, std=self.patch.weight[0].numel() ** -0.5)
        assert self.patch.bias is not None
        nn.init.zeros_(self.patch.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[1:] != (self.patch.in_channels, self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values: expected images of {self.patch.in_channels} channels and {self.image_size} x "
                f"{self.image_size} pixels, got {tuple(pixel_values.shape[1:])}"
            )
        patch_BPD = self.patch(pixel_values.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        class_B1D = self.class_token.expand(len(patch_BPD), -1, -1)
        return torch.cat((class_B1D, patch_BPD), 1) + self.positions


class ViTAttention(nn.Module):
    """Multi-head attention among all tokens of an image, with biases, [B, S, D] to [B, S, D]."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        query_BHSC, key_BHSC, value_BHSC = (
            projection(hidden_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed_BHSC = F.scaled_dot_product_attention(query_BHSC, key_BHSC, value_BHSC)
        return self.o_proj(mixed_BHSC.transpose(1, 2).flatten(2))


class ViTMLP(nn.Module):
    """The MLP of dense blocks, [B, S, D] to [B, S, D], with dropout after both products."""

    def __init__(self, hidden_size: int, width: int, activation: str, rate: float) -> None:
        super().__init__()
        self.activation = activation
        self.rate = rate
        self.up = nn.Linear(hidden_size, width)
        self.down = nn.Linear(width, hidden_size)

    def forward(self, hidden_BSD: Tensor, context: RoutingContext) -> Tensor:
        hidden_BSF = ACTIVATION_FUNCTIONS[self.activation](self.up(hidden_BSD))
        hidden_BSF = dropout(hidden_BSF, self.rate, self.training, context, "mlp activation dropout")
        return dropout(self.down(hidden_BSF), self.rate, self.training, context, "mlp dropout")


class ViTBlock(GradientCheckpointingLayer):
    """Attention and an SMoE (or dense) MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: VMoEConfig, index: int, parallel: ExpertParallel | None) -> None:
        super().__init__()
        moe, sizes = config.moe_config(), config.sizes()
        self.index = index
        self.rate = config.dropout
        self.attention_norm = nn.LayerNorm(sizes.hidden_size, config.layer_norm_eps)
        self.attention = ViTAttention(sizes.hidden_size, sizes.num_attention_heads)
        self.mlp_norm = nn.LayerNorm(sizes.hidden_size, config.layer_norm_eps)
        self.is_sparse = moe.is_sparse(index)
        if self.is_sparse:
            self.moe: SMoELayer = build_layer(moe, sizes.hidden_size, index, parallel)
        else:
            self.mlp = ViTMLP(sizes.hidden_size, sizes.intermediate_size, config.activation, config.dropout)
        sparse_before = sum(moe.is_sparse(block) for block in range(index))
        self.momentum_update = build_momentum(moe.momentum, sparse_before) if self.is_sparse else None
        if self.is_sparse and moe.momentum.legacy_double_residual:
            self.residual_norm = nn.LayerNorm(sizes.hidden_size, config.layer_norm_eps)

    def forward(
        self, hidden_BSD: Tensor, context: RoutingContext, momentum: MomentumState | None = None
    ) -> tuple[Tensor, LayerStatistics | None, MomentumState | None]:
        """Hidden states after the block; what its SMoE layer reports; MomentumSMoE's state for the next one.

        Args:
            momentum: that state, as the block before returned it; None before the first.
        """
        context = replace(context, layer=self.index)
        attended_BSD = self.attention(self.attention_norm(hidden_BSD))
        hidden_BSD = hidden_BSD + dropout(attended_BSD, self.rate, self.training, context, "attention dropout")
        update = self.momentum_update
        normed_BSD = self.mlp_norm(hidden_BSD if update is None else update.look_ahead(hidden_BSD, momentum))
        if not self.is_sparse:
            return hidden_BSD + self.mlp(normed_BSD, context), None, momentum
        step_BSD, statistics = self.moe(normed_BSD, context)
        if update is not None:
            step_BSD, momentum = update.step(hidden_BSD, step_BSD, momentum)
            if update.options.legacy_double_residual:
                step_BSD = self.residual_norm(hidden_BSD + step_BSD)
        return hidden_BSD + step_BSD, statistics, momentum


class Head(nn.Linear):
    """The classifier, which starts at zero, its bias at ``start``."""

    def __init__(self, width: int, classes: int, start: float) -> None:
        self.start = start
        super().__init__(width, classes)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.start)


class Inference(NamedTuple):
    """What ``set_inference`` set; see there."""

    experts_per_token: int | None = None
    capacity_factor: float | None = None
    priority: str | None = None


class VMoEForImageClassification(WithoutReentrance, VisionModel):
    """V-MoE.

    Args:
        parallel: where the experts live; None for a single process.
    """

    config: VMoEConfig
    config_class = VMoEConfig
    base_model_prefix = "vmoe"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTBlock"]

    def __init__(self, config: VMoEConfig, parallel: ExpertParallel | None = None) -> None:
        super().__init__(config)
        sizes = config.sizes()
        self.embedding = ViTEmbedding(config)
        self.blocks = nn.ModuleList(ViTBlock(config, index, parallel) for index in range(sizes.num_hidden_layers))
        self.norm = nn.LayerNorm(sizes.hidden_size, config.layer_norm_eps)
        width = config.representation_size
        self.representation = None if width is None else nn.Linear(sizes.hidden_size, width)
        bias = -math.log(config.num_classes) if config.head_bias is None else config.head_bias
        self.head = Head(width or sizes.hidden_size, config.num_classes, bias)
        self.inference = Inference()
        self._forwards = 0
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        given, width = self.config.initializer_range, self.config.sizes().hidden_size
        if isinstance(module, (ViTEmbedding, Head)):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            std = (2 / (module.in_features + module.out_features)) ** 0.5 if given is None else given
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Experts):
            module.reset_parameters((2 / (width + module.w1.shape[1])) ** 0.5 if given is None else given)
        elif isinstance(module, (LinearScores, Regularisers, Router)):
            module.reset_parameters(width**-0.5 if given is None else given)
        elif isinstance(module, StochasticSMoELayer):
            nn.init.normal_(module.mix_gate.weight, std=0.02 if given is None else given)

    def set_inference(
        self, experts_per_token: int | None = None, capacity_factor: float | None = None, priority: str | None = None
    ) -> None:
        """Evaluate with so many experts a token, this capacity and this priority from now on; training is as it was.

        Args:
            experts_per_token: None: as trained.
            capacity_factor: C, of ``moe.router.name=vmoe`` alone; math.inf: dropless; None: ``inference_capacity``.
            priority: "none", "max" or "sum", likewise; None: as trained.

        Raises:
            ValueError: on a value that is none, or that the router knows nothing of.
        """
        moe = self.config.moe_config()
        if experts_per_token is not None and not 1 <= experts_per_token <= moe.num_experts:
            raise ValueError(f"experts_per_token must lie in 1..{moe.num_experts}, got {experts_per_token}")
        for module in self.modules():
            if isinstance(module, VMoERouter):
                module.set_inference(capacity_factor, priority)
            elif isinstance(module, Router) and (capacity_factor is not None or priority is not None):
                raise ValueError(
                    "capacity_factor and priority at inference are V-MoE's: the router "
                    f"{moe.router['name']!r} has none (moe.router.name=vmoe has)"
                )
        self.inference = Inference(experts_per_token, capacity_factor, priority)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        context: RoutingContext | None = None,
        **kwargs: Any,
    ) -> VisionOutput:
        """Logits [B, C] float32 and, given labels, the loss in nats.

        Args:
            pixel_values: normalised images [B, channels, height, width].
            labels: classes, int64 [B].
            context: keys the layers' randomness in training. Without one it is keyed by torch's seed, the rank, and
                the number of training forwards of this process so far.
        """
        if context is None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            context = RoutingContext(seed=torch.initial_seed(), step=self._forwards, microbatch=rank)
            self._forwards += self.training
        tokens = self.config.patches + 1
        if not self.training and context.experts_per_token is None:
            context = replace(context, experts_per_token=self.inference.experts_per_token)
        context = replace(
            context,
            layers=len(self.blocks),
            target_T=None if labels is None else labels.repeat_interleave(tokens),
        )
        hidden_BSD = self.embedding(pixel_values)
        hidden_BSD = dropout(hidden_BSD, self.config.dropout, self.training, context, "embedding dropout")
        momentum: MomentumState | None = None
        reports = []
        for block in self.blocks:
            hidden_BSD, statistics, momentum = block(hidden_BSD, context=context, momentum=momentum)
            if statistics is not None:
                reports.append(statistics)
        class_BD = self.norm(hidden_BSD)[:, 0]
        if self.representation is not None:
            class_BD = torch.tanh(self.representation(class_BD))
        logits_BC = self.head(class_BD).float() if class_BD.dtype != torch.float64 else self.head(class_BD)

        routing = tuple(reports)
        aux_loss = mean_auxiliary(routing, logits_BC)
        if self.config.auxiliary_sum():
            aux_loss = aux_loss * len(routing)
        task_loss = None if labels is None else self._task_loss(logits_BC, labels)
        return VisionOutput(
            loss=None if task_loss is None else task_loss + aux_loss,
            task_loss=task_loss,
            aux_loss=aux_loss,
            logits=logits_BC,
            routing=routing,
        )

    def _task_loss(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        if self.config.loss == "softmax":
            return F.cross_entropy(logits_BC, labels_B)
        target_BC = F.one_hot(labels_B, logits_BC.shape[1]).to(logits_BC.dtype)
        return F.binary_cross_entropy_with_logits(logits_BC, target_BC, reduction="none").sum(1).mean()


register_kind(
    "vmoe",
    "V-MoE: a vision Transformer with SMoE layers (placement=none: a dense ViT)",
    VMoEConfig,
    VMoEForImageClassification,
)
