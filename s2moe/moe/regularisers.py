"""Objectives on what enters and leaves the experts, beside those of the router: options and terms.

    snnl_loss         soft nearest neighbour loss of the hidden states (objectives/snnl.py)
    similarity_loss   sample similarity of hidden states and router (objectives/sample_similarity.py)
    gate_importance_loss   CV² of each expert's summed probability (objectives/balance.py)
    cka_loss          SimSMoE's similarity of experts on the tokens they share (moe/simsmoe.py)

The first three are those of the vision mixtures, on a language model's hidden states as they enter the SMoE layer.
They compare pairs of tokens, so a sample of each rank's tokens is taken.

Legend: T tokens, D model, E experts, N assignments, M sampled tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2moe.moe.routing import Routing, RoutingContext
from s2moe.moe.sampling import sample_tokens
from s2moe.moe.simsmoe import pair_similarity_loss
from s2moe.objectives import sample_similarity, snnl
from s2moe.objectives.balance import importance_loss
from s2moe.options import Checked, option
from s2moe.precision import full_precision


@dataclass(kw_only=True)
class RegulariserOptions(Checked):
    """Auxiliary objectives on hidden states, router and experts; those whose coefficient is not zero are on."""

    samples: int = option(
        256,
        "tokens of each rank that snnl and similarity compare, drawn anew each step",
        least=2,
        needs="snnl_loss or similarity_loss or similarity_different",
    )
    snnl_loss: float = option(
        0.0,
        "coefficient of the soft nearest neighbour loss; positive pulls classes together, negative entangles them",
        needs="SMoE layers",
    )
    snnl_classes: str = option(
        "next_token",
        "classes of the hidden states. next_token: the symbol to be predicted; expert: the router's first choice",
        choices=("next_token", "expert"),
        needs="snnl_loss",
    )
    snnl_distance: str = option(
        "cosine", "cosine: 1 - cos (Agarap); squared_euclidean (Frosst)", choices=snnl.DISTANCES, needs="snnl_loss"
    )
    snnl_form: str = option(
        "exact", "exact, or the public code's with an epsilon of 1e-5", choices=("exact", "eps"), needs="snnl_loss"
    )
    snnl_schedule: str = option(
        "annealed",
        "temperature. fixed: snnl_temperature; annealed: 1 / (1 + i)^0.55, i growing by 1 in snnl_anneal_steps steps; "
        "learned: a parameter that starts at snnl_temperature; optimised: from snnl_temperature, snnl_search_steps "
        "gradient steps towards the lowest loss in each pass",
        choices=("fixed", "annealed", "learned", "optimised"),
        needs="snnl_loss",
    )
    snnl_temperature: float = option(
        1.0, "temperature of fixed; where learned and optimised begin", above=0, needs="snnl_schedule!=annealed"
    )
    snnl_anneal_steps: int = option(
        1000,
        "training steps that stand for one epoch of the annealed temperature",
        least=1,
        needs="snnl_schedule=annealed",
    )
    snnl_search_steps: int = option(
        5, "gradient steps of the optimised temperature", least=0, needs="snnl_schedule=optimised"
    )
    similarity_loss: float = option(
        0.0, "beta_s: coefficient of distance x probability of the same expert", least=0, needs="SMoE layers"
    )
    similarity_different: float = option(
        0.0, "beta_d: coefficient of minus distance x probability of different experts", least=0, needs="SMoE layers"
    )
    similarity_reduction: str = option(
        "pair_mean",
        "pair_mean: means over pairs; repo_sum: the authors' code, which grows with the square of samples",
        choices=sample_similarity.REDUCTIONS,
        needs="similarity_loss or similarity_different",
    )
    similarity_distance: str = option(
        "euclidean",
        "of hidden states",
        choices=sample_similarity.DISTANCES,
        needs="similarity_loss or similarity_different",
    )
    similarity_scale: str = option(
        "batch_max",
        "batch_max: distances over the largest of the sample; none: as they are",
        choices=sample_similarity.SCALES,
        needs="similarity_loss or similarity_different",
    )
    gate_importance_loss: float = option(
        0.0,
        "coefficient of CV^2 of each expert's summed probability (Krishnamurthy et al.; unbiased variance)",
        least=0,
        needs="SMoE layers",
    )
    cka_loss: float = option(
        0.0,
        "coefficient of SimSMoE's similarity of experts that share tokens (the paper: flat between 0.005 and 0.2)",
        least=0,
        needs="SMoE layers",
    )
    cka_form: str = option(
        "published",
        "published: the authors' code: outputs projected by a learned matrix to as many numbers as there are experts, "
        "kernels of width cka_sigma, a pair compared once in cka_shared micro-batches' worth of shared tokens, the "
        "CKAs summed; batch_mean: the outputs themselves, kernels of cka_sigma median distances, in every micro-batch "
        "the mean over pairs with more than cka_shared shared tokens",
        choices=("published", "batch_mean"),
        needs="cka_loss",
    )
    cka_sigma: float = option(
        0.8, "width of its RBF kernel; with batch_mean as a multiple of the median distance", above=0, needs="cka_loss"
    )
    cka_threshold: float = option(0.5, "T*: pairs below this CKA differ enough", needs="cka_loss")
    cka_shared: float | None = option(
        None,
        "f*. published: micro-batches' worth of shared tokens; batch_mean: shared tokens; null: 16, or 4",
        least=0,
        needs="cka_loss",
    )
    cka_pairs: int = option(
        16, "at most so many pairs of experts are compared, those that share most", least=1, needs="cka_loss"
    )
    cka_samples: int = option(64, "at most so many shared tokens of each pair", least=2, needs="cka_loss")

    def shared(self) -> float:
        """f* of the chosen form."""
        if self.cka_shared is not None:
            return self.cka_shared
        return 16 if self.cka_form == "published" else 4


COEFFICIENTS = ("snnl_loss", "similarity_loss", "similarity_different", "gate_importance_loss", "cka_loss")


def is_any_on(options: RegulariserOptions) -> bool:
    """Whether any of the objectives has a coefficient."""
    return any(getattr(options, name) for name in COEFFICIENTS)


class Regularisers(nn.Module):
    """The chosen objectives of one layer. Training only."""

    def __init__(self, options: RegulariserOptions, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.options = options
        self.log_temperature = None
        if options.snnl_loss and options.snnl_schedule == "learned":
            self.log_temperature = nn.Parameter(torch.empty(1))
        self.projection_ED = None
        if options.cka_loss and options.cka_form == "published":
            self.projection_ED = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Start the learned temperature, and SimSMoE's projection."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.options.snnl_temperature))
        if self.projection_ED is not None:
            nn.init.normal_(self.projection_ED, std=std)

    @property
    def wants_outputs(self) -> bool:
        """Whether each expert's own output is needed, beside their mixture."""
        return self.options.cka_loss != 0

    def forward(
        self, hidden_TD: Tensor, routing: Routing, rows_ND: Tensor | None, context: RoutingContext
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted losses, and detached figures for the log, by name.

        Args:
            routing: of these tokens.
            rows_ND: its assignments' expert outputs, where ``wants_outputs``.
        """
        options = self.options
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        assert routing.prob_TE is not None
        index_M, valid_M = sample_tokens(context, len(hidden_TD), options.samples, hidden_TD.device, "regularisers")
        if options.snnl_loss:
            raw = self._snnl(hidden_TD[index_M], routing.prob_TE[index_M], index_M, valid_M, context, stats)
            losses["snnl_loss"], stats["snnl_loss"] = options.snnl_loss * raw, raw.detach()
        if options.similarity_loss or options.similarity_different:
            distance_MM = sample_similarity.sample_distance(
                hidden_TD[index_M], options.similarity_distance, options.similarity_scale, valid_M
            )
            loss = sample_similarity.sample_similarity_loss(
                routing.prob_TE[index_M],
                distance_MM,
                options.similarity_loss,
                options.similarity_different,
                options.similarity_reduction,
                valid_M,
            )
            losses["similarity_loss"], stats["similarity_loss"] = loss, loss.detach()
        if options.gate_importance_loss:
            raw = importance_loss(routing.prob_TE, context.mask_T, unbiased=True)
            losses["gate_importance_loss"] = options.gate_importance_loss * raw
            stats["gate_importance_loss"] = raw.detach()
        if options.cka_loss:
            assert rows_ND is not None
            raw, figures = pair_similarity_loss(
                rows_ND,
                routing,
                context,
                options.cka_sigma,
                options.cka_threshold,
                options.shared(),
                options.cka_pairs,
                options.cka_samples,
                self.projection_ED,
            )
            losses["cka_loss"] = options.cka_loss * raw
            stats |= {"cka_loss": raw.detach(), **figures}
        return losses, stats

    def _snnl(
        self,
        hidden_MD: Tensor,
        prob_ME: Tensor,
        index_M: Tensor,
        valid_M: Tensor | None,
        context: RoutingContext,
        stats: dict[str, Tensor],
    ) -> Tensor:
        options = self.options
        if options.snnl_classes == "expert":
            label_M = prob_ME.argmax(-1)
        else:
            if context.target_T is None:
                raise ValueError(
                    "regularisers.snnl_classes=next_token needs labels in training: give the model labels, or set "
                    "snnl_classes=expert"
                )
            label_M = context.target_T[index_M]
            has_label_M = label_M >= 0
            valid_M = has_label_M if valid_M is None else valid_M & has_label_M
        distance_MM = snnl.pairwise_distance(hidden_MD, options.snnl_distance)
        temperature = self._temperature(distance_MM, label_M, valid_M, context)
        stats["snnl_temperature"] = temperature.detach().float().mean()
        return snnl.entanglement(distance_MM, label_M, temperature, valid_M, options.snnl_form)

    def _temperature(
        self, distance_MM: Tensor, label_M: Tensor, valid_M: Tensor | None, context: RoutingContext
    ) -> Tensor:
        options = self.options
        if self.log_temperature is not None:
            return full_precision(self.log_temperature).exp().clamp(min=1e-3)
        if options.snnl_schedule == "optimised":
            return snnl.optimised_temperature(
                distance_MM,
                label_M,
                options.snnl_temperature,
                options.snnl_search_steps,
                valid_M=valid_M,
                form=options.snnl_form,
            )
        value = options.snnl_temperature
        if options.snnl_schedule == "annealed":
            value = snnl.annealed_temperature(context.step / options.snnl_anneal_steps)
        return distance_MM.new_full((1,), value)
