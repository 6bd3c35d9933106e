"""The experts of one layer that live on this rank.

Legend: E experts of the layer, L those on this rank, D model, F hidden, N rows.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from s2moe.moe.expert_dropout import dropout_factors
from s2moe.moe.expert_product import expert_product
from s2moe.parallel.regions import EXPERTS

FORMS = ("gated", "mlp", "mlp_biases")


class Experts(nn.Module):
    """Two- or three-matrix MLPs, held as three stacked parameters: the shape DeepSpeed knows experts by.

    gated: W2 (act(W1 x) ⊙ W3 x), with w1, w3 [L, F, D], w2 [L, D, F] (SwiGLU and its kin).
    mlp: W2 act(W1 x + b), where w3 [L, 1, F] holds the hidden bias b (the form of the papers' sizes).
    mlp_biases: W2 act(W1 x + b1) + b2, where w3 [L, 1, F + D] holds b1 and then b2 (the vision Transformer's).

    Args:
        dropout: probability of dropping a number of an expert's activation, and of its output, in training.
        shared_start: all experts start alike.
    """

    def __init__(
        self,
        local_experts: range,
        hidden_size: int,
        expert_hidden: int,
        form: str,
        activation: str,
        layer: int,
        dropout: float = 0.0,
        shared_start: bool = False,
    ) -> None:
        super().__init__()
        self.local_experts = local_experts
        self.form = form
        self.activation = activation
        self.layer = layer
        self.dropout = dropout
        self.shared_start = shared_start
        self.frozen = False  # see moe/freezing.py
        count = len(local_experts)
        self.w1 = nn.Parameter(torch.empty(count, expert_hidden, hidden_size))
        self.w2 = nn.Parameter(torch.empty(count, hidden_size, expert_hidden))
        w3_shapes = {
            "gated": (expert_hidden, hidden_size),
            "mlp": (1, expert_hidden),
            "mlp_biases": (1, expert_hidden + hidden_size),
        }
        self.w3 = nn.Parameter(torch.empty(count, *w3_shapes[form]))
        self.reset_parameters(0.02)

    @torch.no_grad()
    def reset_parameters(self, std: float, std_out: float | None = None) -> None:
        """Normal weights, zero bias, drawn per global expert: the same at every expert-parallel degree.

        Experts draw from generators of their own, keyed by (torch.initial_seed(), layer, expert), so
        that the global generator advances alike on every rank, however many experts it holds.
        """
        for parameter, scale, name in (
            (self.w1, std, "w1"),
            (self.w2, std_out or std, "w2"),
            (self.w3, std, "w3"),
        ):
            if getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta:
                continue  # loaded by from_pretrained, or without storage
            if name == "w3" and self.form != "gated":
                parameter.zero_()
                continue
            for index, expert in enumerate(self.local_experts):
                key = f"{torch.initial_seed()}/{self.layer}/{'all' if self.shared_start else expert}/{name}"
                digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
                drawn = torch.randn(parameter.shape[1:], generator=generator) * scale
                parameter[index].copy_(drawn)

    @record_function(EXPERTS)
    def forward(
        self, rows_ND: Tensor, counts_L: Tensor, weight_N: Tensor | None = None, seed_N: Tensor | None = None
    ) -> Tensor:
        """Rows sorted by local expert, ``counts_L`` of each, to [N, D] in the dtype of the weights.

        Args:
            seed_N: of each row's dropout; None for none.
        """
        device, dtype = rows_ND.device.type, self.w1.dtype
        if torch.is_autocast_enabled(device):  # which knows nothing of stacked experts
            dtype = torch.get_autocast_dtype(device)
        # Under DeepSpeed even frozen weights require a gradient (optimizer_groups in parallel/deepspeed_compat).
        w1, w2, w3 = (w.detach() if self.frozen else w for w in (self.w1, self.w2, self.w3))
        hidden_factor = None
        if seed_N is not None:
            hidden_factor = dropout_factors(seed_N, w1.shape[1], self.dropout, "activation", dtype)
        out_ND = expert_product(
            rows_ND.to(dtype),
            counts_L,
            weight_N,
            w1.to(dtype),
            w2.to(dtype),
            w3.to(dtype),
            self.form,
            self.activation,
            factor_NF=hidden_factor,
        )
        if seed_N is not None:
            out_ND = out_ND * dropout_factors(seed_N, out_ND.shape[1], self.dropout, "output", dtype)
        return out_ND
