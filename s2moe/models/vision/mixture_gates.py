"""The gates of Krishnamurthy et al. 2023: each image's distribution over experts, float32 [B, M].

    original    p = softmax(out(ReLU(h_g))), with h_g the gate network's second hidden layer
    attentive   p_i = softmax_i((h_g Wq) · (h_i Wk) / √H), with h_i expert i's second hidden layer before its ReLU
                (eqs. 4-6). Wq and Wk [H, H] have no bias and are shared by all experts

The attentive gate has to have every expert's hidden state, and its gradient goes through them into the experts.

Legend: B images, M experts, I channels, S image size, H width of the hidden states.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2moe.models.vision.mixture_networks import Network, StackedNetworks
from s2moe.models.vision.stacked import StackedLinear
from s2moe.precision import full_precision


class OriginalGate(nn.Module):
    """A network of its own, with one output an expert."""

    def __init__(self, network: Network, experts: int, image: tuple[int, int], batch_statistics: bool) -> None:
        super().__init__()
        self.trunk = StackedNetworks(network, 1, image, experts, "gate", batch_statistics)

    def forward(self, image_BISS: Tensor, hidden_MBH: Tensor | None = None) -> Tensor:
        """p; the experts' hidden states play no part."""
        logits_1BM = self.trunk(image_BISS)[1]
        return full_precision(logits_1BM[0]).softmax(-1)


class AttentiveGate(nn.Module):
    """Attention of the gate's hidden state over those of the experts, without values.

    Args:
        query_relu: ReLU of h_g before Wq, as the code has it for FMNIST alone.
    """

    def __init__(self, network: Network, image: tuple[int, int], query_relu: bool, batch_statistics: bool) -> None:
        super().__init__()
        width = network.hidden[1]
        self.query_relu = query_relu
        self.trunk = StackedNetworks(network, 1, image, None, "gate", batch_statistics)
        self.query = StackedLinear(1, (width, width), "gate/query", bias=False)
        self.key = StackedLinear(1, (width, width), "gate/key", bias=False)

    def forward(self, image_BISS: Tensor, hidden_MBH: Tensor | None = None) -> Tensor:
        """p from the images and the experts' hidden states (before their ReLU)."""
        assert hidden_MBH is not None
        query_1BH = self.trunk(image_BISS)[0]
        if self.query_relu:
            query_1BH = F.relu(query_1BH)
        # q · (h Wk) = (q Wkᵀ) · h: one product with Wk for all experts. Stacked weights are [out, in], W transposed.
        query_1BH = self.query(query_1BH) @ self.key.weight
        score_MB = torch.linalg.vecdot(query_1BH, hidden_MBH)
        return full_precision(score_MB.T / math.sqrt(hidden_MBH.shape[-1])).softmax(-1)
