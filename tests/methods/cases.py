"""Every published method, with settings that make its particular steps happen in a short and exact test."""

from __future__ import annotations

from typing import Any

from s2moe.moe.methods import METHODS
from s2moe.moe.routers import ROUTERS

SETTINGS: dict[str, dict[str, Any]] = {
    # In a run of few steps, the rare steps must occur.
    "ssr": {"router": {"probability": 0.5}},
    "compete_smoe": {"competition": {"rate": 0.5}},
    "stablemoe": {"router": {"stage1_fraction": 0.5}},
    "simsmoe": {"regularisers": {"cka_shared": 0, "cka_threshold": 0.0}},
    # Four experts' two dimensions leave some token so near the origin that its angle's gradient has four digits alone.
    "xmoe": {"router": {"dimension": 8}},
    "xmoe_sigmoid": {"router": {"dimension": 8}},
}
# Draws for each token are made for padding too, which moves those of the tokens after it: here without them.
WITHOUT_DRAWS: dict[str, dict[str, Any]] = {
    "switch": {"router": {"noise": "none"}},
    "gshard": {"router": {"second_choice": "always"}},
    "noisy_topk": {"router": {"noise": "none", "load_loss": 0.0}},
    "vmoe": {"router": {"noise": 0.0, "load_loss": 0.0}},
}
CASES = {method: {"method": method, **SETTINGS.get(method, {})} for method in METHODS}

NOISY_ROUTERS = sorted(name for name, router in ROUTERS.items() if not router.refuses_noise)
S2MOE_CASES = {
    f"s2moe with {name}": {
        "method": "s2moe_k2" if name != "base" else "s2moe",  # whose assignment is of one expert a token
        "router": {"name": name, **SETTINGS.get(name, {}).get("router", {})},
    }
    for name in NOISY_ROUTERS
    if name != "topk"
}
