"""Every setting of a language model, of its SMoE layers and of each router does something.

Another legal value is seen in what a tiny model makes of a few training steps and an evaluation, or is refused. Values
and contexts come from the declarations (cases.py); VALUES and CONTEXTS hold those that a model this small needs.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import pytest
import torch

from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.models import S2MoEForCausalLM
from s2moe.models.configuration import S2MoEConfig
from s2moe.moe.routers import ROUTERS
from s2moe.moe.routing import RoutingContext
from s2moe.options import deep_merge

from .cases import Tree, context, leaves, nested, others

TINY: Tree = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "moe": {"num_experts": 4, "expert_hidden": 8, "method": "smoe"},
}
RUN = ["name=x", "data.dir=x", "training.steps=4", "training.global_batch=4", "training.sequence_length=12"]
CONTEXTS: dict[str, Tree] = {  # besides what the declarations say; by the beginning of a key
    "moe.stochastic.": {"moe.method": "s2moe", "moe.stochastic.samples": 16},
    "moe.competition.": {"moe.method": "compete_smoe", "moe.competition.rate": 0.6},
    "moe.competition.schedule_steps": {"moe.competition.rate": 1.0, "moe.competition.warm_up": 0.5},
    "moe.competition.theta": {"moe.competition.rate": 1.0},
    "moe.momentum.": {"moe.momentum.adam_layers": "all"},
    "moe.momentum.mu": {"moe.momentum.kind": "heavy_ball"},
    "moe.momentum.gamma": {"moe.momentum.kind": "heavy_ball"},
    "moe.momentum.gamma_adaptive": {"moe.momentum.kind": "adam"},
    "moe.momentum.sign": {"moe.momentum.kind": "heavy_ball"},
    "moe.regularisers.": {"moe.regularisers.cka_shared": 2, "moe.regularisers.cka_samples": 8},
    "moe.regularisers.similarity_": {
        "moe.regularisers.similarity_loss": 1.0,
        "moe.regularisers.similarity_different": 0.5,
    },
    "moe.regularisers.snnl_": {"moe.regularisers.snnl_loss": 1.0},
    "moe.regularisers.snnl_temperature": {"moe.regularisers.snnl_schedule": "fixed"},
    "moe.regularisers.cka_": {"moe.regularisers.cka_loss": 1.0, "moe.regularisers.cka_pairs": 3},
    "router.topk.load_loss": {"moe.router.noise": "shazeer"},
    "router.topk.drop_policy": {"moe.router.capacity_factor": 0.6},
    "router.topk.balance_form": {"moe.router.balance_loss": 1.0},
    "router.ssr.": {"moe.router.probability": 1.0},
    "router.ssr.noise": {"moe.router.probability": 0.0},
    "router.ssr.probability": {"moe.router.probability": 0.6},
    "router.ssr.tolerance": {"moe.router.entropy": 0.02, "moe.router.iterations": 40},
    "router.sbase.tolerance": {"moe.router.entropy": 0.02, "moe.router.iterations": 40},
    "router.base.": {"moe.experts_per_token": 1},
    "router.smoe_dropout.": {"moe.experts_per_token": 4},
    "router.stablemoe.": {"moe.router.stage1_fraction": 0.5},
}
VALUES: dict[str, list[Any]] = {  # where the derived value is illegal for this model, or too near
    "vocab_size": [40],
    "hidden_size": [32],
    "num_hidden_layers": [2],
    "num_attention_heads": [4],
    "num_key_value_heads": [1],
    "head_dim": [4],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 10.0}, {"rope_type": "linear", "factor": 4.0}],
    "moe.method": ["s2moe", "xmoe", "switch"],
    "moe.num_experts": [8],
    "moe.experts_per_token": [1, 3],
    "moe.every": [2],
    "moe.competition.enabled": [False],
    "moe.competition.max_layers": [1],
    "moe.competition.schedule_steps": [2],
    "moe.competition.warm_up": [0.5],
    "moe.momentum.rho": [0.75],
    "moe.momentum.condition": [9.0],
    "moe.momentum.epsilon": [1e-3],
    "moe.momentum.bias_correction": [True],
    "moe.regularisers.samples": [8],
    "moe.regularisers.snnl_anneal_steps": [2],
    "moe.regularisers.cka_samples": [4],
    "moe.regularisers.cka_shared": [8],
    "moe.regularisers.cka_pairs": [1],
    "moe.stochastic.samples": [8],
    "router.topk.capacity_factor": [0.6],
    "router.topk.load_loss": [0.3],
    "router.ssr.renormalise": [False],
    "router.ssr.entropy": [0.2],
    "router.ssr.iterations": [1],
    "router.ssr.tolerance": [0.5],
    "router.sbase.iterations": [1],
    "router.sbase.tolerance": [0.5],
    "router.base.epsilon": [0.5],
    "router.base.max_rounds": [1],
    "router.attention_aware.renormalise": [False],
    "router.attention_aware.measure_every": [2],
    "router.similarity_aware.renormalise": [False],
    "router.similarity_aware.window": [3],
    "router.stablemoe.vocab_size": [40],
    "router.stablemoe.schedule_steps": [2],
    "router.smoe_dropout.first_experts": [1],
    "router.smoe_dropout.schedule_steps": [2],
    "router.vmoe.capacity_factor": [0.5],
    "router.vmoe.group_size": [1],
    "router.vmoe.inference_capacity": [1.0],
    "router.xmoe.dimension": [3],
    "router.expert_choice.budget": [1.5],
    "router.expert_choice.max_experts_per_token": [1],
    "router.usmoe.budget": [1.5],
}
ELSEWHERE = {  # where one process, without decoding, cannot show it
    "use_cache": "tests/models/test_generation.py",
    "bos_token_id": "tests/hub/test_tokenizers.py",
    "eos_token_id": "tests/hub/test_generation.py",
    "pad_token_id": "tests/models/test_classification.py",
    "max_position_embeddings": "test_runs.py: how far evaluation looks back",
    "moe.router.name": "every router of this file",
    "moe.stochastic.gather_negatives": "tests/distributed",
    "router.balance_scope": "tests/distributed",
    "router.marginals": "tests/distributed",
    "router.chunk": "memory alone, tests/moe/test_token_graph.py",
    "router.num_attention_heads": "the model's, or refused",
}


def language(settings: Tree) -> str:
    """A digest of what a tiny model makes of four training steps and an evaluation."""
    torch.manual_seed(0)
    model = S2MoEForCausalLM(S2MoEConfig(**deep_merge(TINY, nested(settings))))
    for parameter in model.parameters():  # experts and routers that differ
        parameter.data.mul_(4)
    ids = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(4):
        torch.manual_seed(step)
        out = model.train()(input_ids=ids, labels=ids, context=RoutingContext(seed=1, step=step, steps=4))
        assert out.loss is not None
        assert out.routing is not None
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update_routers([out.routing])
        losses += [float(out.loss), *(float(value) for layer in out.routing for value in layer.values.values())]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    return digest(losses, logits, *model.state_dict().values())


def digest(*parts: Any) -> str:
    """SHA-256 of tensors and numbers."""
    found = hashlib.sha256()
    for part in parts:
        is_tensor = isinstance(part, torch.Tensor)
        found.update(part.detach().double().numpy().tobytes() if is_tensor else repr(part).encode())
    return found.hexdigest()


@functools.cache
def made_of(settings: str) -> str:
    try:
        return language(json.loads(settings))
    except ValueError as error:
        return f"refused: {error}"


def cases() -> list[Any]:
    """(context, another value) of each key of `model:` and of each router."""
    found: dict[str, Any] = {}
    for router in ROUTERS:
        method = "smoe"
        fits = [f"model.moe.experts_per_token={1 if router == 'base' else 2}", f"model.moe.router.name={router}"]
        settings = load(RunConfig, None, [*RUN, f"model.moe.method={method}", *fits]).described()
        for path, known in leaves(settings.section):
            if path[0] != "model":
                continue
            key, base = ".".join(path[1:]), {"moe.experts_per_token": 1 if router == "base" else 2}
            name = key
            if key.startswith("moe.router."):
                name, base = f"router.{router}.{path[-1]}", base | {"moe.router.name": router}
            elif router != "topk":
                continue
            short = f"router.{path[-1]}" if name.startswith("router.") else name
            if name in ELSEWHERE or short in ELSEWHERE or key in ELSEWHERE:
                continue
            derived = {where.removeprefix("model."): value for where, value in context(settings, path).items()}
            extra = [added for start, added in CONTEXTS.items() if name.startswith(start)]
            where = functools.reduce(lambda a, b: a | b, [base, derived, *extra])
            values = VALUES.get(name, others(known))
            assert values, f"{name}: give another value in VALUES, or say in ELSEWHERE which test looks at it"
            for value in values:
                if where.get(key, known.default) != value:
                    found[f"{name}={value}"] = (where, {key: value})
    return [pytest.param(*case, id=name) for name, case in found.items()]


@pytest.mark.parametrize(("where", "other"), cases())
def test_a_setting_of_a_model_changes_it(where: Tree, other: Tree) -> None:
    before, after = made_of(json.dumps(where)), made_of(json.dumps(where | other))
    assert after != before
    if after.startswith("refused: "):
        assert next(iter(other)).rpartition(".")[2] in after  # by name
