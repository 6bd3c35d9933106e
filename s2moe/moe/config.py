"""Options of the SMoE layers, as configuration files and ``config.json`` hold them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import comb
from typing import Any

from s2moe.moe.expert_product import ACTIVATIONS
from s2moe.moe.experts import FORMS
from s2moe.moe.methods import METHODS
from s2moe.moe.momentum import MomentumOptions
from s2moe.moe.regularisers import RegulariserOptions
from s2moe.moe.routers import ROUTERS
from s2moe.options import LARGEST, Checked, deep_merge, nearest, option

DEFAULT_METHOD = "s2moe"


@dataclass(kw_only=True)
class StochasticOptions(Checked):
    """S2MoE (Do et al. 2025): learning from a noisy copy of every token. See moe/stochastic.py."""

    enabled: bool = option(False, "learn from a noisy copy of every token as well (S2MoE)", needs="SMoE layers")
    statistics: str = option(
        "token_batch",
        "over what mean and deviation of the noise are taken: token_batch: per feature over this rank's micro-batch; "
        "sequence: per feature over each sequence; token: over each token's own features (strictly causal)",
        choices=("token_batch", "sequence", "token"),
    )
    spread: str = option("std", "scale of the noise: the features' std or their variance", choices=("std", "variance"))
    reroute: bool = option(True, "route the noisy copy anew; false reuses the clean token's experts and weights")
    contrast: str = option(
        "outputs",
        "operands of InfoNCE: outputs: what the experts made of clean and noisy token; inputs: the tokens themselves",
        choices=("outputs", "inputs"),
        needs="contrast_loss",
    )
    contrast_loss: float = option(0.05, "coefficient of InfoNCE; 0 switches it off", least=0)
    temperature: float = option(0.1, "temperature of InfoNCE", above=0, needs="contrast_loss")
    samples: int = option(
        256,
        "tokens of each rank that InfoNCE compares, drawn anew each step; its cost grows with the square",
        least=2,
        needs="contrast_loss",
    )
    symmetric: bool = option(False, "average InfoNCE over both directions", needs="contrast_loss")
    gather_negatives: bool = option(
        False, "compare with the samples of all ranks, with gradient", needs="contrast_loss"
    )
    inference: str = option(
        "clean",
        "clean: the sparse mixture of the clean token alone; gated: that times the gate, the output of some "
        "implementations, smaller than in training",
        choices=("clean", "gated"),
    )


@dataclass(kw_only=True)
class CompetitionOptions(Checked):
    """CompeteSMoE (Nguyen et al. 2025): on some steps all experts compete for each token. See moe/competition.py."""

    enabled: bool = option(False, "hold competitions, from which the router learns (CompeteSMoE)", needs="SMoE layers")
    rate: float = option(0.07, "probability that a layer holds a competition in a training step", least=0, most=1)
    warm_up: float = option(0.0, "fraction of the training steps before the first competition", least=0, below=1)
    schedule_steps: int | None = option(
        None, "training steps that warm_up is a fraction of; null: all of the run", least=1, needs="warm_up"
    )
    max_layers: int = option(3, "at most so many layers hold a competition in one step", least=1)
    combine: str = option(
        "normalised",
        "a winner's weight: normalised: its affinity over the sum of the winners' (at k=1 always 1; the scale of a "
        "router with renormalise=true); softmax: its value of the softmax over all affinities (the scale of a router "
        "with renormalise=false)",
        choices=("normalised", "softmax"),
    )
    distillation_loss: float = option(
        0.001, "coefficient of the router's squared distance from the softmax of the affinities", least=0
    )
    theta: float = option(
        0.2,
        "share of the winners' own squared distance, beside that over all experts",
        least=0,
        needs="distillation_loss",
    )
    diversity_loss: float = option(0.005, "coefficient of the mean cosine between the winners' outputs", least=0)
    affinity_balance_loss: float = option(
        0.005, "coefficient of the balance loss on the softmax of the affinities", least=0
    )

    def layers_per_step(self, sparse: int) -> float:
        """How many of ``sparse`` layers hold a competition in a training step, on average over the run."""
        if not self.enabled:
            return 0.0
        chance = [comb(sparse, n) * self.rate**n * (1 - self.rate) ** (sparse - n) for n in range(sparse + 1)]
        return (1 - self.warm_up) * sum(min(n, self.max_layers) * c for n, c in enumerate(chance))


@dataclass(kw_only=True)
class MoEConfig(Checked):
    """The SMoE layers of a model."""

    method: str = option(
        DEFAULT_METHOD,
        "a published method: sets defaults below. Where router.name alone is given, smoe: that router and no more",
        choices=tuple(METHODS),
    )
    num_experts: int = option(16, "experts of a layer", least=1, most=LARGEST, needs="SMoE layers")
    experts_per_token: int = option(2, "k: experts of a token", least=1, needs="SMoE layers")
    expert_hidden: int = option(512, "hidden width of an expert", least=1, most=LARGEST, needs="SMoE layers")
    expert_form: str = option(
        "gated",
        "gated: W2(act(W1 x) * W3 x); mlp: W2 act(W1 x + b); mlp_biases: W2 act(W1 x + b1) + b2",
        choices=FORMS,
        needs="SMoE layers",
    )
    activation: str = option("silu", "activation of the experts", choices=ACTIVATIONS, needs="SMoE layers")
    expert_dropout: float = option(
        0.0, "dropout of an expert's activation and output, in training", least=0, below=1, needs="SMoE layers"
    )
    shared_start: bool = option(
        False, "all experts of a layer start with the same weights (V-MoE)", needs="SMoE layers"
    )
    shared_experts: int = option(
        0,
        "experts every token sees besides its own, as one MLP of so many times the width",
        least=0,
        needs="SMoE layers",
    )
    every: int = option(1, "every n-th layer is an SMoE layer, the others are dense", least=1)
    first_dense: int = option(0, "so many first layers are dense", least=0)
    router: dict[str, Any] = option(factory=dict, help="the router's name, and its options", needs="SMoE layers")
    stochastic: StochasticOptions = option(
        factory=StochasticOptions, help="S2MoE's noisy second path", needs="stochastic.enabled"
    )
    competition: CompetitionOptions = option(
        factory=CompetitionOptions, help="CompeteSMoE's competitions of experts", needs="competition.enabled"
    )
    regularisers: RegulariserOptions = option(
        factory=RegulariserOptions, help="objectives on hidden states, router and experts"
    )
    momentum: MomentumOptions = option(
        factory=MomentumOptions,
        help="MomentumSMoE's velocity from layer to layer",
        needs="momentum.kind!=none or momentum.legacy_double_residual",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must lie in 1..num_experts ({self.num_experts}), got {self.experts_per_token}"
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) is an SMoE layer: every n-th after the first dense ones."""
        after = layer - self.first_dense
        return after >= 0 and (after + 1) % self.every == 0

    def title(self) -> str:
        """The method, and the router where it is not the method's own, for people: ``s2moe, router xmoe``."""
        own = METHODS[self.method].defaults(self.num_experts)["router"]["name"]
        return self.method if self.router["name"] == own else f"{self.method}, router {self.router['name']}"

    def router_options(self) -> Any:
        """The dataclass of the chosen router's options."""
        options = {key: value for key, value in self.router.items() if key != "name"}
        return build(ROUTERS[self.router["name"]].Options, options, "router")


def resolve_moe(given: dict[str, Any] | None) -> MoEConfig:
    """The layers' options from a (partial) dictionary: the method's settings, overridden by the given ones.

    Raises:
        ValueError: on an unknown key (naming the nearest known one), method, router or impossible value, and on a
            router beside a method that is a way of routing itself.
    """
    given = dict(given or {})
    for section in ("router", *SECTIONS):
        if not isinstance(given.get(section) or {}, dict):
            raise ValueError(
                f"{section}: expected a section of settings, got {given[section]!r}; e.g. router.name=topk"
            )
    if is_resolved(given) and "cka_form" not in (given.get("regularisers") or {}):
        given = deep_merge(given, {"regularisers": {"cka_form": "batch_mean"}})  # the only form there was
    method = given["method"] = method_of(given, DEFAULT_METHOD)
    num_experts = given.get("num_experts", MoEConfig.__dataclass_fields__["num_experts"].default)
    defaults = METHODS[method].defaults(num_experts)
    own = defaults["router"]["name"]
    name = (given.get("router") or {}).get("name", own)
    if not isinstance(name, str) or name not in ROUTERS:
        known = ", ".join(sorted(ROUTERS))
        raise ValueError(f"router.name: unknown router {name!r}{nearest(name, ROUTERS)}; known: {known}")
    if name != own:
        if not METHODS[method].any_router and not is_resolved(given):
            raise ValueError(
                f"method={method} is itself a way of routing, by the router {own!r}, and router.name={name} is another "
                f"one: leave out one of the two, or set a method that takes any router ({', '.join(OPEN_METHODS)})"
            )
        defaults = {**defaults, "router": {}}  # what it sets there is for its own
    merged = deep_merge(defaults, given)
    router = {**(merged.get("router") or {}), "name": name}
    config = typed_moe({**merged, "router": router})
    if config.competition.enabled and router["name"] != "topk":
        raise ValueError(
            "competition.enabled (CompeteSMoE) distils the experts' affinities into the logits of a linear router, "
            f"which the router {router['name']!r} has not: set router.name=topk, or competition.enabled=false"
        )
    config.router = {"name": router["name"], **asdict(config.router_options())}
    refusal = ROUTERS[router["name"]].refuses_noise
    if config.stochastic.enabled and refusal:
        raise ValueError(
            f"stochastic.enabled (S2MoE) cannot use the router {router['name']!r}: {refusal}. Set "
            "stochastic.enabled=false, or another router.name"
        )
    if config.competition.enabled and config.stochastic.enabled:
        raise ValueError(
            "competition.enabled (CompeteSMoE) and stochastic.enabled (S2MoE) exclude each other: a competition would "
            "have to run all experts on clean and noisy tokens, and no method says which of the two the router is to "
            "learn from. Set one of them to false"
        )
    if config.competition.enabled and config.regularisers.cka_loss:
        raise ValueError(
            "competition.enabled (CompeteSMoE) and regularisers.cka_loss (SimSMoE) exclude each other: competitions "
            "have a diversity loss of their own. Set one of them to false, or 0"
        )
    pairwise = ("similarity_loss", "similarity_different", "gate_importance_loss")
    if config.num_experts < 2 and any(getattr(config.regularisers, name) for name in pairwise):
        raise ValueError(
            "regularisers.similarity_loss and gate_importance_loss compare experts, of which there is one: set "
            "num_experts=2 or more, or these coefficients to 0"
        )
    if config.regularisers.cka_loss and config.experts_per_token < 2:
        raise ValueError(
            "regularisers.cka_loss (SimSMoE) compares experts on tokens they share, of which there are none with "
            "experts_per_token=1: set experts_per_token=2 or more, or cka_loss=0"
        )
    return config


OPEN_METHODS = [name for name, method in METHODS.items() if method.any_router]

# What config.json and a checkpoint have always held of the layers, all of it, and no file that a person writes.
RESOLVED = {
    "num_experts",
    "experts_per_token",
    "expert_hidden",
    "expert_form",
    "activation",
    "shared_experts",
    "every",
    "first_dense",
    "router",
    "stochastic",
}


def is_resolved(given: dict[str, Any]) -> bool:
    """Whether this is a configuration that ``resolve_moe`` made, perhaps in an earlier version, and not a user's."""
    return given.keys() >= RESOLVED


def method_of(given: dict[str, Any], usual: str) -> str:
    """The given method; without one, ``usual``, or the plain mixture where another router than its own is named.

    So ``router.name=random`` alone is that router with nothing around it, though the usual method would take it.

    Raises:
        ValueError: on an unknown method.
    """
    router = given.get("router")
    name = router.get("name") if isinstance(router, dict) else None
    own = METHODS[usual].defaults(1)["router"]["name"]
    alone = name is not None and (METHODS[usual].any_router or name != own)
    method = given.get("method", "smoe" if alone else usual)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: unknown method {method!r}{nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    return method


SECTIONS: dict[str, type[Any]] = {  # fields of MoEConfig with options of their own
    "stochastic": StochasticOptions,
    "competition": CompetitionOptions,
    "momentum": MomentumOptions,
    "regularisers": RegulariserOptions,
}


def typed_moe(values: dict[str, Any]) -> MoEConfig:
    """MoEConfig from plain dictionaries, checked; the router's options are taken as they are."""
    sections = {name: build(cls, values.get(name) or {}, name) for name, cls in SECTIONS.items()}
    return build(MoEConfig, {**values, **sections}, "moe")


def build(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    """``cls(**values)``, with an error that names the section, the key and the nearest known key."""
    known = {f.name: f for f in fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}")
        choices = known[key].metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{where}.{key}: must be one of {', '.join(choices)}, got {value!r}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
