"""What the ranks of the distributed tests do. Every function runs on each rank of a gloo group."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.moe.config import resolve_moe
from s2moe.moe.dispatch import dispatch
from s2moe.moe.freezing import freeze_named
from s2moe.moe.layer import build_layer
from s2moe.moe.routing import Routing, RoutingContext
from s2moe.moe.rows import count
from s2moe.parallel import ExpertParallel, deepspeed_compat
from tests.distributed_harness import reset_groups
from tests.ties import everywhere, on_clear_data, watch

VOCABULARY = 64


def tiny_config(**moe: Any) -> S2MoEConfig:
    """Two layers, four experts."""
    options = {"method": "s2moe", "num_experts": 4, "expert_hidden": 32, **moe}
    return S2MoEConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, moe=options)


def full_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, ZeRO-3's gathered; experts are this rank's."""
    state = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            state[name] = parameter.detach().clone().float()
    return state


def train(
    degree: int,
    stage: int,
    steps: int,
    moe: dict[str, Any],
    ds_config: dict[str, Any] | None = None,
    freeze: str = "none",
    data: int = 1,
    watched: bool = False,
) -> dict[str, Any]:
    """Train on random data of seed ``data``; returns losses, gradient norms, expert rank and final parameters.

    Where it is ``watched``, also whether all choices of experts, on all ranks, were clear of ties.
    """
    reset_groups()
    world, rank = dist.get_world_size(), dist.get_rank()
    parallel = deepspeed_compat.expert_parallel(degree)
    torch.manual_seed(0)
    model = S2MoEForCausalLM(tiny_config(**moe), parallel=parallel)
    freeze_named(model, freeze)
    clear = watch(model) if watched else []
    # Plain SGD with momentum: an error of scale in a gradient, which Adam would hide, shows in the weights.
    optimizer = torch.optim.SGD(deepspeed_compat.optimizer_groups(model, 0.1), lr=0.05, momentum=0.9)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **(ds_config or {}),
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    generator = torch.Generator().manual_seed(data)
    losses, norms = [], []
    for step in range(steps):
        routing = []
        for accumulation in range(2):
            tokens = torch.randint(0, VOCABULARY, (world, 2, 17), generator=generator)[rank]
            context = RoutingContext(step=step, steps=steps, microbatch=accumulation * world + rank)
            output = engine(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous(), context=context)
            engine.backward(output.loss)
            routing.append(output.routing)
            loss = output.loss.detach().clone()
            dist.all_reduce(loss)
            losses.append(loss.item() / world)
            engine.step()
        engine.module.update_routers(routing)
        norms.append(float(engine.get_global_grad_norm()))
    state = full_state(engine.module)
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    return {
        "losses": losses,
        "norms": norms,
        "expert_rank": parallel.rank,
        "state": state,
        "buffers": buffers,
        "clear": everywhere(all(clear)),
    }


def train_shapes(
    shapes: list[tuple[int, int]],
    steps: int,
    moe: dict[str, Any],
    ds_config: dict[str, Any] | None = None,
    freeze: str = "none",
) -> dict[tuple[int, int], Any]:
    """``train`` for each (expert-parallel degree, ZeRO stage).

    In float32, on the first data whose choices are clear of ties at the first shape: the shapes round differently.
    """
    first, *others = shapes
    watched = bool(others) and ds_config is None
    data, found = on_clear_data(lambda data: train(*first, steps, moe, ds_config, freeze, data, watched))
    return {first: found} | {shape: train(*shape, steps, moe, ds_config, freeze, data) for shape in others}


def layer_against_single_process(moe: dict[str, Any], assignment: str) -> dict[str, float]:
    """Largest differences between the layer spread over all ranks and the whole layer on this rank.

    Every rank holds the whole layer too and feeds it its own tokens; gradients of the shared experts
    are compared after summing the whole layer's over ranks.

    Args:
        assignment: "routed": the layer's own routing; "one_rank": every token to expert 0;
            "empty_rank": rank 0 has no assignments; "ragged": a token has 0 to 3 experts.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    config = resolve_moe({"method": "smoe", "num_experts": 4, "expert_hidden": 16, **moe})
    group = dist.group.WORLD
    layers = {}
    for name, parallel in (("whole", ExpertParallel()), ("spread", ExpertParallel(world, rank, group))):
        torch.manual_seed(0)
        layer = build_layer(config, 8, 0, parallel).double()
        torch.nn.init.normal_(layer.router.scores.weight, generator=torch.Generator().manual_seed(2))
        layer.experts.reset_parameters(0.5)
        layers[name] = layer
    generator = torch.Generator().manual_seed(10 + rank)
    inputs = torch.randn(2, 5 + rank, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
    results = {}
    for name, layer in layers.items():
        hidden = inputs.clone().requires_grad_()
        if assignment == "routed":
            out = layer(hidden)[0]
        else:
            routing = forced_routing(assignment, hidden.shape[0] * hidden.shape[1], rank)
            out = dispatch(hidden.view(-1, 8), routing, layer.experts, layer.parallel).view_as(hidden)
        (out * target).sum().backward()
        results[name] = (out.detach(), hidden.grad, [w.grad for w in layer.experts.parameters()])
    (whole, whole_input, whole_weights), (spread, spread_input, spread_weights) = results.values()
    own = layers["spread"].experts.local_experts
    weights = 0.0
    for ours, theirs in zip(spread_weights, whole_weights, strict=True):
        dist.all_reduce(theirs)
        weights = max(weights, (ours - theirs[own.start : own.stop]).abs().max().item())
    return {
        "output": (whole - spread).abs().max().item(),
        "input_gradient": (whole_input - spread_input).abs().max().item(),
        "weight_gradient": weights,
        "size": whole.abs().max().item(),
    }


def forced_routing(kind: str, tokens: int, rank: int) -> Routing:
    """A routing made by hand, see ``layer_against_single_process``."""
    if kind == "empty_rank" and rank == 0:
        token_N = expert_N = torch.zeros(0, dtype=torch.int64)
    elif kind == "ragged":
        token_N = torch.arange(tokens).repeat_interleave(torch.arange(tokens) % 4)
        expert_N = (torch.arange(len(token_N)) * 7 + rank) % 4
    else:
        token_N = torch.arange(tokens)
        expert_N = torch.zeros(tokens, dtype=torch.int64)
    weight_N = torch.linspace(0.5, 1.5, len(token_N), dtype=torch.float64)
    counts_E = count(expert_N, 4)
    return Routing(token_N, expert_N, weight_N, counts_E, counts_E, {}, {}, tokens, None)


def local_parameters(degree: int, num_experts: int) -> int:
    """Number of parameters of the experts this rank built."""
    reset_groups()
    parallel = deepspeed_compat.expert_parallel(degree)
    layer = build_layer(resolve_moe({"num_experts": num_experts, "expert_hidden": 16}), 8, 0, parallel)
    return sum(parameter.numel() for parameter in layer.experts.parameters())


def refused_degree(degree: int) -> str:
    """The error of an expert-parallel degree that does not divide the processes."""
    reset_groups()
    try:
        deepspeed_compat.expert_parallel(degree)
    except ValueError as error:
        return str(error)
    return ""


def frozen_restore(stage: int, directory: str) -> dict[str, bool]:
    """Which weights of a frozen xmoe model are the same, to the bit, in a new engine that loads its checkpoint.

    The saved model's weights are not those that the new one begins with.
    """
    states = []
    for seed in (1, 2):
        reset_groups()
        parallel = deepspeed_compat.expert_parallel(2)
        torch.manual_seed(seed)
        model = S2MoEForCausalLM(tiny_config(method="xmoe"), parallel=parallel)
        freeze_named(model, "routers_and_experts")
        optimizer = torch.optim.AdamW(deepspeed_compat.optimizer_groups(model, 0.1))
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        if seed == 1:
            engine.save_checkpoint(directory, tag="tag", save_latest=False)
        else:
            engine.load_checkpoint(directory, tag="tag")
        states.append(full_state(engine.module))
    return {name: weight.equal(states[1][name]) for name, weight in states[0].items()}


def engine_view(stage: int, directory: str) -> dict[str, Any]:
    """What the engine makes of our model at expert-parallel degree 2, and a checkpoint in ``directory``/tag."""
    reset_groups()
    model = S2MoEForCausalLM(tiny_config(), parallel=deepspeed_compat.expert_parallel(2))
    optimizer = torch.optim.AdamW(deepspeed_compat.optimizer_groups(model, 0.1))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine.save_checkpoint(directory, tag="tag", save_latest=False)
    named = {name for name, parameter in engine.module.named_parameters() if not getattr(parameter, "allreduce", True)}
    groups = deepspeed.utils.groups
    expert_data_parallel = {
        name: dist.get_process_group_ranks(groups._get_expert_data_parallel_group(name))
        for name in groups._get_expert_parallel_group_dict()
    }
    return {
        "has_moe_layers": engine.has_moe_layers,
        "num_experts": engine.num_experts,
        "expert_names": named,
        "groups": expert_data_parallel,
    }
