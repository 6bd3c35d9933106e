"""The sparse mixture-of-experts layer: route, dispatch to the experts, combine.

Legend: B batch, S sequence, T = B S tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from s2moe.moe.config import MoEConfig
from s2moe.moe.dispatch import combine_outputs, dispatch, expert_outputs
from s2moe.moe.expert_product import ACTIVATION_FUNCTIONS
from s2moe.moe.experts import Experts
from s2moe.moe.regularisers import Regularisers, is_any_on
from s2moe.moe.routers import ROUTERS
from s2moe.moe.routing import LayerStatistics, Routing, RoutingContext
from s2moe.parallel import ExpertParallel
from s2moe.parallel.deepspeed_compat import EngineMoELayer


class DenseMLP(nn.Module):
    """The MLP of dense layers and shared experts: the experts' form at another width. [.., D] to [.., D]."""

    def __init__(self, hidden_size: int, width: int, form: str, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(hidden_size, width, bias=form != "gated")
        self.gate = nn.Linear(hidden_size, width, bias=False) if form == "gated" else None
        self.down = nn.Linear(width, hidden_size, bias=form == "mlp_biases")

    def forward(self, hidden: Tensor) -> Tensor:
        act = ACTIVATION_FUNCTIONS[self.activation]
        if self.gate is None:
            return self.down(act(self.up(hidden)))
        return self.down(act(self.gate(hidden)) * self.up(hidden))


class SMoELayer(EngineMoELayer):
    """A router and experts in place of a Transformer block's MLP.

    Works in one process without any process group, and under the DeepSpeed engine at every
    expert-parallel degree that divides the experts; only this rank's experts are ever built.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, layer: int, parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        parallel = parallel or ExpertParallel()
        self.config = config
        self.layer = layer
        self.router = ROUTERS[config.router["name"]](
            hidden_size, config.num_experts, config.experts_per_token, config.router_options()
        )
        self.experts = Experts(
            parallel.local_experts(config.num_experts),
            hidden_size,
            config.expert_hidden,
            config.expert_form,
            config.activation,
            layer,
            config.expert_dropout,
            config.shared_start,
        )
        shared_width = config.shared_experts * config.expert_hidden
        self.shared = (
            DenseMLP(hidden_size, shared_width, config.expert_form, config.activation) if shared_width else None
        )
        options = config.regularisers
        self.regularisers = Regularisers(options, hidden_size, config.num_experts) if is_any_on(options) else None
        self.bind_engine(config.num_experts, parallel)

    def forward(self, hidden_BSD: Tensor, context: RoutingContext | None = None) -> tuple[Tensor, LayerStatistics]:
        """[B, S, D] to [B, S, D] and what the router reports of it."""
        sequences = hidden_BSD.shape[0]
        context = replace(
            context or RoutingContext(),
            layer=self.layer,
            sequences=sequences,
            group=self.parallel.data_group,
            first_pass={},
        )
        hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        out_TD, routing, values = self.mix(hidden_TD, context)
        if self.shared is not None:
            out_TD = out_TD + self.shared(hidden_TD)
        losses = list(routing.losses.values())
        loss = torch.stack(losses).sum() if losses else out_TD.new_zeros((), dtype=torch.float32)
        values = {**routing.stats, **values}
        statistics = LayerStatistics(self.layer, loss, routing.load_E, values, routing.feedback)
        return out_TD.view_as(hidden_BSD), statistics

    def mix(self, hidden_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Routing, dict[str, Tensor]]:
        """The experts' mixture for each token, the routing behind it, and figures beyond the router's."""
        routing = self.router(hidden_TD, context)
        if context.probe is not None:
            context.probe.record(self, hidden_TD, routing, context)
        out_TD, rows_ND = self.compute(hidden_TD, routing, context)
        return out_TD, routing, self.regularise(hidden_TD, routing, rows_ND, context, routing.losses)

    def compute(self, hidden_TD: Tensor, routing: Routing, context: RoutingContext) -> tuple[Tensor, Tensor | None]:
        """The experts' mixture for each token [T, D], and each assignment's own output [N, D] where it is wanted."""
        if not self.training or self.regularisers is None or not self.regularisers.wants_outputs:
            return dispatch(hidden_TD, routing, self.experts, self.parallel, self.dropout_key(context)), None
        rows_ND = expert_outputs(hidden_TD, routing, self.experts, self.parallel, self.dropout_key(context))
        return combine_outputs(rows_ND, routing), rows_ND

    def dropout_key(self, context: RoutingContext) -> int | None:
        """Of this micro-batch's dropout within experts; None where there is none."""
        if not self.training or not self.config.expert_dropout:
            return None
        return context.generator(torch.device("cpu"), "expert dropout").initial_seed()

    def regularise(
        self,
        hidden_TD: Tensor,
        routing: Routing,
        rows_ND: Tensor | None,
        context: RoutingContext,
        losses: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Add the regularisers' losses of these tokens to ``losses``, and return what they report."""
        if not self.training or self.regularisers is None:
            return {}
        found, values = self.regularisers(hidden_TD, routing, rows_ND, context)
        losses.update(found)
        return values


def build_layer(config: MoEConfig, hidden_size: int, layer: int, parallel: ExpertParallel | None = None) -> SMoELayer:
    """The SMoE layer that ``config`` describes."""
    from s2moe.moe.competition import CompetitiveSMoELayer  # they are subclasses of this file's layer
    from s2moe.moe.stochastic import StochasticSMoELayer

    cls = SMoELayer
    if config.stochastic.enabled:
        cls = StochasticSMoELayer
    elif config.competition.enabled:
        cls = CompetitiveSMoELayer
    return cls(config, hidden_size, layer, parallel)


def expert_degree(model: nn.Module) -> int:
    """Over how many processes the model's experts are dealt."""
    return max((layer.parallel.size for layer in model.modules() if isinstance(layer, SMoELayer)), default=1)
