"""MomentumSMoE's state between blocks under the engine: ZeRO's stages, expert parallelism, recomputed activations."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.moe.routing import RoutingContext
from s2moe.parallel import deepspeed_compat
from tests.distributed_harness import reset_groups, run_distributed
from tests.ties import everywhere, on_clear_data, watch

pytestmark = pytest.mark.distributed

WAYS = [(1, 1, False), (1, 3, False), (1, 3, True), (2, 3, True), (2, 2, True)]  # degree, ZeRO stage, recomputed


def train(momentum: dict[str, Any]) -> list[tuple[list[float], list[float]]]:
    """Losses and gradient norms of three steps, for each of WAYS; two SMoE layers between dense ones."""
    data, first = on_clear_data(lambda data: train_one_way(momentum, WAYS[0], data, watched=True))
    others = [train_one_way(momentum, way, data, watched=False) for way in WAYS[1:]]
    return [(found["losses"], found["norms"]) for found in (first, *others)]


def train_one_way(momentum: dict[str, Any], way: tuple[int, int, bool], data: int, watched: bool) -> dict[str, Any]:
    """On the data of a seed; ``clear`` of ties between experts, on all ranks."""
    degree, stage, recomputed = way
    reset_groups()
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    moe = {"method": "smoe", "num_experts": 4, "expert_hidden": 16, "every": 2, "momentum": momentum}
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = S2MoEConfig(**sizes, intermediate_size=16, initializer_range=0.3, moe=moe)
    model = S2MoEForCausalLM(config, parallel=deepspeed_compat.expert_parallel(degree))
    if recomputed:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(deepspeed_compat.optimizer_groups(model, 0.0), lr=0.05, momentum=0.9)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    generator = torch.Generator().manual_seed(data)
    clear = watch(model) if watched else []
    losses, norms = [], []
    for step in range(3):
        ids = torch.randint(0, 32, (world, 2, 12), generator=generator)[rank]
        output = engine(input_ids=ids, labels=ids, context=RoutingContext(step=step, microbatch=rank))
        engine.backward(output.loss)
        engine.step()
        losses.append(output.loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    return {"losses": losses, "norms": norms, "clear": everywhere(all(clear))}


@pytest.mark.parametrize(
    "momentum",
    [
        {"kind": "robust"},
        pytest.param({"kind": "adam", "adam_layers": "all", "epsilon": 1e-2}, marks=pytest.mark.slow),
        pytest.param({"kind": "heavy_ball", "legacy_double_residual": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_does_not_depend_on_how_the_state_is_kept(momentum: dict[str, Any]) -> None:
    for results in run_distributed(train, 2, momentum):
        losses, norms = results[0]
        assert len(set(losses)) == 3
        for way, (found_losses, found_norms) in zip(WAYS[1:], results[1:], strict=True):
            assert found_losses == pytest.approx(losses, rel=2e-5), way
            assert found_norms == pytest.approx(norms, rel=2e-4), way
