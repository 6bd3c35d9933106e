"""StableMoE: learn to route, distil it into a router of token ids, freeze that one.

Dai et al. 2022, "StableMoE: Stable Routing Strategy for Mixture of Experts". A token whose expert keeps changing
trains many experts of which inference uses one. In the first tenth of training (stage 1), with centroids E ∈ R^{E×D},

    s_t  = E h_t                                   scores of a token's hidden state
    a_t  = argmax_i s_ti                           its expert
    y_t  = σ(s_{t,a_t}) · expert_{a_t}(h_t)
    L_bal = α/T Σ_i (|A_i| − n)/n Σ_{t ∈ A_i} σ(s_ti)              A_i the tokens of expert i, n the mean of |A_i|
    L_dis = −1/T Σ_t log softmax(ŝ_t)_{a_t},   ŝ_t = Ê D(x_t)      Ê ∈ R^{E×C}, C = 50; the targets a_t are given

with a light router ŝ that sees nothing but the tokens' ids x. Then (stage 2) D and Ê are frozen, and

    a_t  = argmax_i ŝ_ti,   y_t = σ(s_{t,a_t}) · expert_{a_t}(h_t)

where E still learns, from the task alone: no further losses. D(x_t) is

    word     a row of a table of V rows
    bigram   the mean of the rows of this token and the one before (the first token: its own row)
    cnn      Σ_j κ_j · row(x_{t−j}), j = 0..4: a causal convolution, one weight a position, as the published code has it

Losses are means over tokens, as the cross-entropy is (the published code sums all of them). |A_i| is counted over
all ranks (``balance_scope``) and constant for the gradient; σ is averaged over this rank's tokens, and ranks are
averaged as their task losses are: together that is the formula over the global batch, where ranks have as many
tokens each. Only (|A_i| − n)/n enters, which does not depend on the batch's size.

The paper sets one expert per token. With k > 1 (our extension) a token takes the k best, each with its own σ(s);
A_i counts all of them, and L_dis is the mean over a token's k targets. The paper inserts its layer between blocks, as
experts with residual sub-layers of their own; here, as with every method, it replaces the blocks' MLP.

Freezing. Adam's momentum and weight decay go on moving parameters whose gradient is zero. So the first forward pass
of stage 2 copies the trained D and Ê into float32 buffers, which decide from then on; the parameters still get a zero
gradient (ZeRO expects one of each on every rank) and have no effect any more. Copying twice changes nothing: a flag
beside the buffers says that they hold, so recomputed activations, accumulated micro-batches, resumed runs and exported
models agree. Once set, it also decides the stage: lengthening a run does not return to stage 1.

Inference: ŝ routes, in stage 1 too, as in the published code: by the live D and Ê until they are frozen. Causal: ŝ
sees a token's id and, in bigram and cnn, ids before it, which cached decoding keeps. Causal in training too.

Legend: B sequences, S new positions, T = B S tokens, D model, E experts, C width of D(x), K choices per token,
V vocabulary, W tokens that D looks at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2moe.moe.assignments import load_of, per_token
from s2moe.moe.history import recent
from s2moe.moe.routers.base import Router, register
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.objectives.balance import masked_mean
from s2moe.options import Checked, option
from s2moe.parallel.expert_parallel import all_reduce_sum
from s2moe.precision import full_precision, linear

TOKENS = {"word": 1, "bigram": 2, "cnn": 5}  # W of each form of the distilled router
GAIN = 0.1  # of the orthogonal initial centroids


@dataclass(kw_only=True)
class StableMoEOptions(Checked):
    """Options of ``router.name: stablemoe``."""

    stage1_fraction: float = option(
        0.1, "part of the training steps after which the distilled router is frozen", least=0, most=1
    )
    schedule_steps: int | None = option(
        None, "training steps that stage1_fraction is a fraction of; null: all of the run", least=1
    )
    distilled: str = option(
        "word",
        "what the distilled router sees. word: the token's id; bigram: also the id before; cnn: a convolution over "
        "the last five. With a vocabulary of bytes word is very coarse",
        choices=tuple(TOKENS),
    )
    distilled_width: int = option(50, "width of the distilled router's token embedding", least=1, most=2**20)
    balance_loss: float = option(0.3, "coefficient of the balance loss in stage 1; 0 switches it off", least=0)
    balance_scope: str = option(
        "global",
        "over which tokens an expert's share is counted: global: the micro-batches of all ranks; local: this rank's",
        choices=("global", "local"),
        needs="balance_loss",
    )
    distill_loss: float = option(
        1.0, "coefficient of the distillation loss in stage 1 (the paper: 1; the published command: 0.3)", above=0
    )
    vocab_size: int | None = option(None, "rows of the distilled router's table; null: the model's vocab_size", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distill_loss <= 0:
            raise ValueError(
                f"distill_loss must be positive, got {self.distill_loss}: without it the router that decides after "
                "stage 1 stays random"
            )


@register("stablemoe")
class StableMoERouter(Router):
    """Routes by hidden state in stage 1 of training, else by token id."""

    Options = StableMoEOptions
    options: StableMoEOptions
    keeps_history = True
    refuses_noise = (
        "once it is frozen it routes by the token's identity, which does not see the noise, so that both passes "
        "go to the same experts"
    )
    in_stage2: Tensor

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, options: StableMoEOptions) -> None:
        super().__init__(hidden_size, num_experts, experts_per_token, options)
        if options.vocab_size is None:
            raise ValueError("the router stablemoe needs the size of the vocabulary: set its option vocab_size")
        width = options.distilled_width
        self.centroid_ED = nn.Parameter(torch.empty(num_experts, hidden_size))
        # The distilled router's parameters are this module's own, since ZeRO-3 gathers them only for the forward of
        # the module that has them, and stage 2 begins with reading them here.
        self.distilled_centroid_EC = nn.Parameter(torch.empty(num_experts, width))
        self.table_VC = nn.Parameter(torch.empty(options.vocab_size, width))
        self.distilled_names = ["distilled_centroid_EC", "table_VC"]
        if options.distilled == "cnn":
            self.kernel_W = nn.Parameter(torch.empty(TOKENS["cnn"]))
            self.distilled_names.append("kernel_W")
        for name in self.distilled_names:
            shape = getattr(self, name).shape
            self.register_buffer(f"frozen_{name}", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("in_stage2", torch.zeros(1, dtype=torch.bool))
        self.reset_parameters(0.02)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """As in the published code, whatever ``std``: orthogonal centroids, normal rows, a uniform kernel."""
        _orthogonal(self.centroid_ED, GAIN)
        _orthogonal(self.distilled_centroid_EC, GAIN)
        nn.init.normal_(self.table_VC)
        if self.options.distilled == "cnn":
            bound = len(self.kernel_W) ** -0.5
            nn.init.uniform_(self.kernel_W, -bound, bound)
        for name in ("in_stage2", *(f"frozen_{name}" for name in self.distilled_names)):
            nn.init.zeros_(getattr(self, name))

    def forward(self, hidden_TD: Tensor, context: RoutingContext) -> Routing:
        choices = self.choices(context)
        if self.training and not self.frozen and context.step >= self._boundary(context):
            self._freeze()
        # A copy: a later micro-batch may write the flag, which the backward pass of this one still needs.
        frozen = self.in_stage2.clone()
        score_TE = linear(hidden_TD, self.centroid_ED)
        distilled_TE = self._distilled_scores(context, frozen)
        if not self.training:
            expert_TK = distilled_TE.topk(choices, dim=-1).indices
            weight_TK = score_TE.gather(-1, expert_TK).sigmoid()
            return per_token(expert_TK, weight_TK, distilled_TE.softmax(-1), context)

        learned_TK = score_TE.topk(choices, dim=-1).indices
        distilled_TK = distilled_TE.topk(choices, dim=-1).indices
        expert_TK = torch.where(frozen, distilled_TK, learned_TK)
        weight_TK = score_TE.gather(-1, expert_TK).sigmoid()
        load_E = load_of(expert_TK, self.num_experts, context.mask_T)
        raw = {
            "balance_loss": self._balance(expert_TK, weight_TK, load_E, context),
            "distill_loss": masked_mean(-distilled_TE.log_softmax(-1).gather(-1, learned_TK).mean(-1), context.mask_T),
        }
        stage1 = (~frozen[0]).to(score_TE.dtype)  # both losses end with it
        agreement_T = (distilled_TK[:, 0] == learned_TK[:, 0]).to(score_TE.dtype)
        stats = {name: loss.detach() for name, loss in raw.items()}
        stats |= {"distilled_agreement": masked_mean(agreement_T, context.mask_T), "stage": 2 - stage1}
        return per_token(
            expert_TK,
            weight_TK,
            torch.where(frozen, distilled_TE, score_TE).softmax(-1),
            context,
            {name: getattr(self.options, name) * stage1 * loss for name, loss in raw.items()},
            stats,
            load_E,
        )

    def _balance(self, expert_TK: Tensor, weight_TK: Tensor, load_E: Tensor, context: RoutingContext) -> Tensor:
        """L_bal / α: each token's σ(s), the more weighed the more tokens its expert has; negative where it has few."""
        group = context.group if self.options.balance_scope == "global" else None
        load_E = all_reduce_sum(load_E, group).to(weight_TK.dtype)
        excess_E = load_E * self.num_experts / load_E.sum().clamp(min=1) - 1
        return masked_mean((excess_E[expert_TK] * weight_TK).sum(-1), context.mask_T)

    def _distilled_scores(self, context: RoutingContext, frozen: Tensor) -> Tensor:
        """ŝ, [T, E], by the frozen router where ``frozen``. Only L_dis has a gradient of it."""
        if context.token_T is None:
            raise ValueError(
                "the router stablemoe routes by token id: give the model input_ids instead of inputs_embeds, and a "
                "layer that is used alone RoutingContext(token_T=...)"
            )
        centroid_EC = self._distilled("distilled_centroid_EC", frozen)
        form = self.options.distilled
        if form == "word":
            return linear(self._rows(context.token_T, frozen), centroid_EC)
        token_BS = context.token_T.view(context.sequences, -1)
        token_BSW, seen_BSW = recent(token_BS, TOKENS[form], context.history, context.attention_mask)
        row_BSWC = self._rows(token_BSW, frozen)
        if form == "bigram":
            before_BS = seen_BSW[..., 1].to(row_BSWC.dtype) / 2
            kernel_BSW = torch.stack((1 - before_BS, before_BS), -1)
        else:
            kernel_BSW = self._distilled("kernel_W", frozen) * seen_BSW
        feature_BSC = (kernel_BSW[..., None] * row_BSWC).sum(2)
        return linear(feature_BSC.flatten(0, 1), centroid_EC)

    def _rows(self, token: Tensor, frozen: Tensor) -> Tensor:
        """The table's rows for tokens of any shape. Looked up in both tables, which may be large, then chosen."""
        live = full_precision(F.embedding(token, self.table_VC))
        return torch.where(frozen, F.embedding(token, self.get_buffer("frozen_table_VC")), live)

    def _distilled(self, name: str, frozen: Tensor) -> Tensor:
        """A parameter of the distilled router, or its frozen copy; chosen on the device, without waiting for it."""
        return torch.where(frozen, self.get_buffer(f"frozen_{name}"), full_precision(getattr(self, name)))

    def _boundary(self, context: RoutingContext) -> int:
        """The first step of stage 2."""
        steps = context.total_steps(self.options.schedule_steps, "the end of StableMoE's first stage")
        return round(self.options.stage1_fraction * steps)

    @torch.no_grad()
    def _freeze(self) -> None:
        """Copy the distilled router into the buffers unless they hold already.

        At every forward pass of stage 2, since only the device knows; as cheap as the zero gradient of the table.
        """
        for name in self.distilled_names:
            buffer = self.get_buffer(f"frozen_{name}")
            buffer.copy_(self._distilled(name, self.in_stage2))
        self.in_stage2.fill_(True)

    @torch.no_grad()
    def add_tokens(self, rows: int) -> None:
        """New rows are the mean of the others, so that a new token goes where most do."""
        frozen_VC = self.get_buffer("frozen_table_VC")
        table_VC = nn.Parameter(_with_mean_rows(self.table_VC, rows), self.table_VC.requires_grad)
        self.table_VC, self.frozen_table_VC = table_VC, _with_mean_rows(frozen_VC, rows)

    def expert_embeddings(self) -> Tensor:
        return self.centroid_ED

    def macs_per_token(self) -> int:
        taps = 0 if self.options.distilled == "word" else TOKENS[self.options.distilled]
        return (
            self.num_experts * (self.hidden_size + self.options.distilled_width) + taps * self.options.distilled_width
        )


def _with_mean_rows(table_VC: Tensor, rows: int) -> Tensor:
    return torch.cat((table_VC, table_VC.mean(0, keepdim=True).expand(rows - len(table_VC), -1)))


def _orthogonal(parameter: Tensor, gain: float) -> None:
    """Orthogonal rows, made in float32, as lower precisions have no QR decomposition."""
    if parameter.is_meta or getattr(parameter, "_is_hf_initialized", False):
        return  # without storage, or loaded by from_pretrained
    value = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    parameter.copy_(nn.init.orthogonal_(value, gain))
