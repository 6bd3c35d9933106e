"""What the SMoE layers of a model do with a fixed set of tokens: the collapse metrics of s2moe/metrics.

The probe set is the first so many tokens of a split, cut into windows. The model reads them in evaluation mode, every
layer shows a `Recorder` its hidden states and routing, and from those, and from the weights, all figures follow. The
windows are dealt out over the processes, and every process' share of a table or sum is added up, so the figures do
not depend on the number of processes or on where experts live (beyond rounding).

Collective from end to end: every process makes equally many forward passes, and the exchanges after them come layer by
layer. Process 0 alone then computes the figures. They are float32, covariances and what follows from them float64.

Legend: W windows, S tokens of each, T = W S tokens, R of them in one forward pass, M sampled tokens, L local experts
of E, D model width, C classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from s2moe.config.options import ConfigError
from s2moe.metrics.collapse import ClassSums, Moments, collapse
from s2moe.metrics.confidence import margin, token_entropy, weight_entropy
from s2moe.metrics.coselection import coselection_rate, cross_selection, mutual_information, overlap
from s2moe.metrics.load import load_figures
from s2moe.metrics.similarity import SIGMA, cosine, cosine_of, mean_off_diagonal, output_cka, output_cosine
from s2moe.metrics.spectrum import ENOUGH_ROWS, singular_values, singular_values_of, spectrum_figures
from s2moe.moe.layer import SMoELayer
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.parallel.expert_parallel import all_reduce_sum
from s2moe.precision import full_precision

from .export import gather_experts, whole


@dataclass(frozen=True)
class ProbeSet:
    """The tokens that are looked at, [W, S + 1] with each window's last target, and those that all experts compute."""

    token_WS: NDArray[np.int64]
    sample_M: NDArray[np.int64]  # numbers among the T tokens, ascending

    @classmethod
    def take(cls, stream: Any, tokens: int, length: int, samples: int) -> ProbeSet:
        """The whole windows of `length` among the first `tokens` tokens; `samples` of their tokens, evenly spaced.

        Raises:
            ConfigError: not even one window, or samples.
        """
        windows = min(tokens, len(stream) - 1) // length
        if windows < 1:
            raise ConfigError(
                f"probe.tokens: a window takes {length} tokens and the one after; there are {tokens} to probe, in a "
                f"split of {len(stream)}"
            )
        if samples < 2:
            raise ConfigError(f"probe.samples: must be at least 2, got {samples}")
        start_W1 = np.arange(windows)[:, None] * length
        token_WS = np.asarray(stream[: windows * length + 1], dtype=np.int64)[start_W1 + np.arange(length + 1)]
        total, count = windows * length, min(samples, windows * length)
        return cls(token_WS, np.arange(count) * total // count)

    @property
    def tokens(self) -> int:
        return self.token_WS[:, 1:].size

    def fingerprint(self) -> str:
        """Assignments can be compared token by token where this is the same."""
        key = f"{self.token_WS.shape}".encode() + self.token_WS.tobytes()
        return hashlib.blake2b(key, digest_size=8).hexdigest()


@dataclass
class LayerProbe:
    """What one SMoE layer did with the probe set."""

    layer: int
    figures: dict[str, float]  # see `_figures`
    matrix: dict[str, Tensor]  # [E, E] on the CPU, by name, entries within -1 .. 1
    load_E: list[float]  # in units of the mean
    sigma_R: list[float]  # singular values of the hidden states
    selected_TE: Tensor  # bool, on the CPU: which experts a token has
    target_T: Tensor  # int64, on the CPU: the one with the heaviest weight; E for a token without any
    order_TK: Tensor  # int64, on the CPU: a token's experts, heaviest first, -1 where it has fewer than others


def probe(
    model: nn.Module, probe_set: ProbeSet, batch: int, device: torch.device, experts_per_token: int | None = None
) -> list[LayerProbe]:
    """Look at every SMoE layer of `model`, an engine or a plain one, in evaluation mode. Collective.

    Returns the layers in order on process 0, nothing on the others.

    Args:
        batch: windows per process and forward pass.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    recorder = Recorder(probe_set, device)
    windows, length = len(probe_set.token_WS), probe_set.token_WS.shape[1] - 1
    batch = min(batch, math.ceil(windows / world))
    arguments = {} if experts_per_token is None else {"experts_per_token": experts_per_token}
    with torch.no_grad():
        for index in range(math.ceil(windows / (batch * world))):
            window_B = (index * world + rank) * batch + np.arange(batch)
            # Every process makes the pass, with or without windows that are left: its experts are needed.
            recorder.expect(np.where(window_B < windows, window_B, -1))
            token_BS = torch.from_numpy(probe_set.token_WS[window_B % windows, :length]).to(device)
            model(input_ids=token_BS, use_cache=False, context=RoutingContext(probe=recorder), **arguments)
        return list(_layers(recorder, rank == 0))


class Recorder:
    """Keeps this process' share of what layers show: tables over all T tokens, zero for others' tokens, and sums."""

    def __init__(self, probe_set: ProbeSet, device: torch.device) -> None:
        target_WS = probe_set.token_WS[:, 1:]
        classes, number_T = np.unique(target_WS, return_inverse=True)
        self.tokens, self.length, self.device = probe_set.tokens, target_WS.shape[1], device
        self.classes = len(classes)
        self.class_T = torch.from_numpy(number_T.reshape(-1)).to(device)
        self.sample_M = torch.from_numpy(probe_set.sample_M).to(device)
        self.seen: dict[int, Seen] = {}

    def expect(self, window_B: NDArray[np.int64]) -> None:
        """The next pass reads these windows; -1 for one that does not count."""
        position_BS = window_B[:, None] * self.length + np.arange(self.length)
        position_R = torch.from_numpy(np.where(window_B[:, None] < 0, -1, position_BS).reshape(-1))
        self._counted_R = (position_R >= 0).to(self.device)
        self._position_R = position_R[position_R >= 0].to(self.device)

    def record(self, layer: SMoELayer, hidden_TD: Tensor, routing: Routing, context: RoutingContext) -> None:
        """See `s2moe.moe.routing.Probe`."""
        hidden_RD = full_precision(hidden_TD.detach())[self._counted_R]
        if layer.layer not in self.seen:
            self.seen[layer.layer] = Seen.empty(layer, self, hidden_TD.shape[1], routing.prob_TE is not None)
        seen = self.seen[layer.layer]
        pair = (routing.token_N, routing.expert_N)
        table_3RE = hidden_RD.new_zeros(3, routing.num_tokens, layer.num_experts)
        table_3RE[0][pair] = 1
        table_3RE[1][pair] = routing.weight_N.detach().to(table_3RE.dtype)
        if routing.prob_TE is not None:
            table_3RE[2] = routing.prob_TE
        table_3RE = table_3RE[:, self._counted_R]
        seen.table_3TE[:, self._position_R] = table_3RE
        seen.moments.add(hidden_RD)
        seen.by_target.add(hidden_RD, self.class_T[self._position_R])
        seen.by_expert.add(hidden_RD, heaviest(table_3RE[0].bool(), table_3RE[1])[:, 0])
        # Of the sampled tokens, those of this pass: both lists ascend.
        at_M = torch.searchsorted(self._position_R, self.sample_M).clamp(max=max(len(self._position_R) - 1, 0))
        if len(self._position_R):
            here_M = self._position_R[at_M] == self.sample_M
            seen.sample_MD[here_M] = hidden_RD[at_M[here_M]]


@dataclass
class Seen:
    """This process' share of one layer."""

    layer: SMoELayer
    choices: int
    has_prob: bool
    table_3TE: Tensor  # float32: 1 where an expert was chosen, its weight, its probability
    moments: Moments
    by_expert: ClassSums  # the last class is that of tokens without an expert
    by_target: ClassSums
    sample_MD: Tensor

    @classmethod
    def empty(cls, layer: SMoELayer, recorder: Recorder, width: int, has_prob: bool) -> Seen:
        device, experts = recorder.device, layer.num_experts
        return cls(
            layer,
            layer.config.experts_per_token,
            has_prob,
            torch.zeros(3, recorder.tokens, experts, device=device),
            Moments.zero(width, device),
            ClassSums.zero(experts + 1, width, device),
            ClassSums.zero(recorder.classes, width, device),
            torch.zeros(len(recorder.sample_M), width, device=device),
        )

    def add_up(self) -> None:
        """Over all processes. Collective."""
        group = self.layer.parallel.data_group
        self.table_3TE = all_reduce_sum(self.table_3TE, group)
        self.sample_MD = all_reduce_sum(self.sample_MD, group)
        moments = self.moments
        self.moments = Moments(
            *(all_reduce_sum(part, group) for part in (moments.product_DD, moments.sum_D, moments.rows))
        )
        self.by_expert, self.by_target = (
            ClassSums(all_reduce_sum(sums.count_C, group), all_reduce_sum(sums.sum_CD, group))
            for sums in (self.by_expert, self.by_target)
        )


def heaviest(selected_TE: Tensor, weight_TE: Tensor) -> Tensor:
    """Each token's experts, heaviest first, [T, E]; places that it has no expert for hold E."""
    experts = selected_TE.shape[1]
    order_TE = weight_TE.masked_fill(~selected_TE, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    place_E = torch.arange(experts, device=order_TE.device)
    return order_TE.masked_fill(place_E >= selected_TE.sum(-1, keepdim=True), experts)


def _layers(recorder: Recorder, is_main: bool) -> Iterator[LayerProbe]:
    """Add up and exchange, layer by layer, alike on every process; then the figures, on process 0."""
    for _, seen in sorted(recorder.seen.items()):
        seen.add_up()
        router_EX = _router_rows(seen.layer)
        weight_EE = _weight_products(seen.layer)
        out_EMD = _common_outputs(seen.layer, seen.sample_MD)
        if is_main:
            yield _look(seen, router_EX, weight_EE, out_EMD)


def _router_rows(layer: SMoELayer) -> Tensor | None:
    """By what the router knows each expert, [E, X], where it has such rows. Collective."""
    with whole(*layer.router.parameters()):
        row_EX = layer.router.expert_embeddings()
        return None if row_EX is None else row_EX.detach().clone()


def _weight_products(layer: SMoELayer) -> Tensor:
    """Inner products of the experts' flattened weights, float64 [E, E]. Collective; whole one matrix at a time."""
    total_EE = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64, device=layer.experts.w1.device)
    for parameter in layer.experts.parameters():
        with whole(parameter):
            row_EX = full_precision(gather_experts(parameter.detach(), layer.parallel)).flatten(1)
            total_EE += (row_EX @ row_EX.T).double()
    return total_EE


def _common_outputs(layer: SMoELayer, sample_MD: Tensor) -> Tensor:
    """What every expert makes of the same tokens, [E, M, D]. Collective."""
    local, (samples, width) = len(layer.experts.local_experts), sample_MD.shape
    with whole(*layer.experts.parameters()):
        count_L = torch.full((local,), samples, device=sample_MD.device)
        # Not layer.experts(...): ZeRO-3 would take the call for part of a forward pass.
        out_ND = layer.experts.forward(sample_MD.repeat(local, 1), count_L)
    return gather_experts(full_precision(out_ND).view(local, samples, width), layer.parallel)


def _look(seen: Seen, router_EX: Tensor | None, weight_EE: Tensor, out_EMD: Tensor) -> LayerProbe:
    selected_TE, weight_TE, prob_TE = seen.table_3TE[0].bool(), seen.table_3TE[1], seen.table_3TE[2]
    count_E = selected_TE.sum(0).double()
    order_TE = heaviest(selected_TE, weight_TE)
    matrix = {"coselection": coselection_rate(selected_TE), "weight_cosine": cosine_of(weight_EE)}
    if router_EX is not None:
        matrix["router_cosine"] = cosine(router_EX)
    matrix["output_cosine"] = output_cosine(out_EMD)
    matrix["output_linear_cka"] = output_cka(out_EMD)
    matrix["output_rbf_cka"] = output_cka(out_EMD, SIGMA)
    sigma_R = singular_values_of(seen.moments.covariance(), len(selected_TE))
    figures = load_figures(count_E.tolist())
    if seen.has_prob:
        figures["token_entropy"] = float(token_entropy(prob_TE))
        figures["margin"] = float(margin(prob_TE, selected_TE.sum(-1)))
    figures["weight_entropy"] = float(weight_entropy(weight_TE))
    figures["collapse_by_expert"] = float(collapse(seen.moments, seen.by_expert))
    figures["collapse_by_target"] = float(collapse(seen.moments, seen.by_target))
    figures |= _named("hidden", spectrum_figures(sigma_R))
    figures |= _named("output", _mean_spectrum(out_EMD))
    pooled = Moments.zero(out_EMD.shape[-1], out_EMD.device)
    pooled.add(out_EMD.flatten(0, 1))
    pooled_R = singular_values_of(pooled.covariance(), out_EMD.shape[:2].numel())
    figures |= _named("pooled_output", spectrum_figures(pooled_R))
    figures |= {name: float(mean_off_diagonal(matrix[name])) for name in matrix if name != "coselection"}
    choices = int((order_TE < len(count_E)).sum(-1).max())
    order_TK = order_TE[:, :choices]
    return LayerProbe(
        seen.layer.layer,
        figures,
        {name: value.float().cpu() for name, value in matrix.items()},
        (count_E / count_E.mean().clamp(min=1e-12)).tolist(),
        sigma_R.tolist(),
        selected_TE.cpu(),
        order_TE[:, 0].cpu(),
        order_TK.masked_fill(order_TK == len(count_E), -1).cpu(),
    )


def _named(what: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{what}_{name}": value for name, value in figures.items()}


def _mean_spectrum(out_EMD: Tensor) -> dict[str, float]:
    """Of each expert's outputs, averaged over experts."""
    every = [spectrum_figures(sigma_R) for sigma_R in singular_values(out_EMD)]
    return {name: sum(figures[name] for figures in every) / len(every) for name in every[0]}


def cross_layer(layers: list[LayerProbe]) -> dict[str, Tensor]:
    """Between each pair of SMoE layers, [layers, layers]: `information` of targets, `overlap` of experts' numbers.

    Layers with different numbers of experts do not occur in one model.
    """
    targets = [torch.nn.functional.one_hot(at.target_T, at.selected_TE.shape[1] + 1)[:, :-1] for at in layers]
    information = [[float(mutual_information(cross_selection(one, two))) for two in targets] for one in targets]
    shared = [[float(overlap(one.selected_TE, two.selected_TE)) for two in layers] for one in layers]
    return {"information": torch.tensor(information), "overlap": torch.tensor(shared)}


def warnings(layers: list[LayerProbe], probe_set: ProbeSet, width: int) -> list[str]:
    """What to keep in mind of these figures."""
    rows, samples, found = probe_set.tokens, len(probe_set.sample_M), []
    if rows < ENOUGH_ROWS * width:
        found.append(
            f"spectra and collapse of hidden states are from {rows} tokens, fewer than {ENOUGH_ROWS} x the width "
            f"{width}: ranks are underestimated; probe at least {ENOUGH_ROWS * width} tokens"
        )
    if samples < ENOUGH_ROWS * width:
        found.append(
            f"spectra of each expert's outputs are from {samples} tokens, fewer than {ENOUGH_ROWS} x the width {width}:"
            " ranks are underestimated, and comparable at the same number of samples only"
        )
    return found
