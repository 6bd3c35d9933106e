"""Options of the SMoE layers, as configuration files and ``config.json`` hold them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from s2moe.moe.expert_product import ACTIVATIONS
from s2moe.moe.experts import FORMS
from s2moe.moe.methods import METHODS
from s2moe.moe.routers import ROUTERS
from s2moe.options import deep_merge, nearest, option


@dataclass(kw_only=True)
class StochasticOptions:
    """S2MoE (Do et al. 2025): learning from a noisy copy of every token. See moe/stochastic.py."""

    enabled: bool = option(False, "learn from a noisy copy of every token as well (S2MoE)")
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
    )
    contrast_loss: float = option(0.05, "coefficient of InfoNCE; 0 switches it off")
    temperature: float = option(0.1, "temperature of InfoNCE")
    samples: int = option(
        256, "tokens of each rank that InfoNCE compares, drawn anew each step; its cost grows with the square"
    )
    symmetric: bool = option(False, "average InfoNCE over both directions")
    gather_negatives: bool = option(False, "compare with the samples of all ranks, with gradient")
    inference: str = option(
        "clean",
        "clean: the sparse mixture of the clean token alone; gated: that times the gate, the output of some "
        "implementations, smaller than in training",
        choices=("clean", "gated"),
    )

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError("temperature must be positive")
        if self.samples < 2:
            raise ValueError("samples must be at least 2: InfoNCE needs a negative")


@dataclass(kw_only=True)
class MoEConfig:
    """The SMoE layers of a model."""

    method: str = option("s2moe", "a published method: sets defaults below", choices=tuple(METHODS))
    num_experts: int = option(16, "experts of a layer")
    experts_per_token: int = option(2, "k: experts of a token")
    expert_hidden: int = option(512, "hidden width of an expert")
    expert_form: str = option("gated", "gated: W2(act(W1 x) * W3 x); mlp: W2 act(W1 x + b)", choices=FORMS)
    activation: str = option("silu", "activation of the experts", choices=ACTIVATIONS)
    shared_experts: int = option(0, "experts every token sees besides its own, as one MLP of so many times the width")
    every: int = option(1, "every n-th layer is an SMoE layer, the others are dense")
    first_dense: int = option(0, "so many first layers are dense")
    router: dict[str, Any] = option(factory=dict, help="the router's name, and its options")
    stochastic: StochasticOptions = option(factory=StochasticOptions, help="S2MoE's noisy second path")

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must lie in 1..num_experts ({self.num_experts}), got {self.experts_per_token}"
            )
        for name, least in (("expert_hidden", 1), ("every", 1), ("shared_experts", 0), ("first_dense", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def is_sparse(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) is an SMoE layer: every n-th after the first dense ones."""
        after = layer - self.first_dense
        return after >= 0 and (after + 1) % self.every == 0

    def router_options(self) -> Any:
        """The dataclass of the chosen router's options."""
        options = {key: value for key, value in self.router.items() if key != "name"}
        return build(ROUTERS[self.router["name"]].Options, options, "router")


def resolve_moe(given: dict[str, Any] | None) -> MoEConfig:
    """The layers' options from a (partial) dictionary: the method's settings, overridden by the given ones.

    Raises:
        ValueError: on an unknown key (naming the nearest known one), method, router or impossible value.
    """
    given = dict(given or {})
    method = given.get("method", MoEConfig.__dataclass_fields__["method"].default)
    if method not in METHODS:
        raise ValueError(f"method: unknown method {method!r}{nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    for section in ("router", *SECTIONS):
        if not isinstance(given.get(section) or {}, dict):
            raise ValueError(
                f"{section}: expected a section of settings, got {given[section]!r}; e.g. router.name=topk"
            )
    num_experts = given.get("num_experts", MoEConfig.__dataclass_fields__["num_experts"].default)
    merged = deep_merge(METHODS[method].defaults(num_experts), given)
    router = dict(merged.get("router") or {})
    router.setdefault("name", "topk")
    if router["name"] not in ROUTERS:
        known = ", ".join(sorted(ROUTERS))
        raise ValueError(
            f"router.name: unknown router {router['name']!r}{nearest(router['name'], ROUTERS)}; known: {known}"
        )
    config = typed_moe({**merged, "router": router})
    config.router = {"name": router["name"], **asdict(config.router_options())}
    refusal = ROUTERS[router["name"]].refuses_noise
    if config.stochastic.enabled and refusal:
        raise ValueError(
            f"stochastic.enabled (S2MoE) cannot use the router {router['name']!r}: {refusal}. Set "
            "stochastic.enabled=false, or another router.name"
        )
    return config


SECTIONS: dict[str, type[Any]] = {"stochastic": StochasticOptions}  # fields of MoEConfig with options of their own


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
