"""V-MoE on the ranks of the distributed tests. Every function runs on each rank of a gloo group."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from s2moe.models.vision.vit import VMoEForImageClassification
from s2moe.models.vision.vit_config import VMoEConfig
from s2moe.moe.feedback import update_routers
from s2moe.moe.routing import RoutingContext
from s2moe.parallel import deepspeed_compat
from tests.distributed.jobs import full_state
from tests.distributed_harness import reset_groups
from tests.ties import watch

IMAGES = 4  # of a micro-batch


def vision_config(**given: Any) -> VMoEConfig:
    """Four blocks, two of them with four experts, on 8 x 8 images."""
    moe = {"num_experts": 4, **given.pop("moe", {})}
    return VMoEConfig(size="digits/2", image_size=8, num_classes=6, **given, moe=moe)


def train(degree: int, stage: int, steps: int, given: dict[str, Any], data: int) -> dict[str, Any]:
    """Train on random images of seed ``data``; losses, gradient norms, what was dropped, and final parameters."""
    reset_groups()
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = VMoEForImageClassification(vision_config(**given), parallel=deepspeed_compat.expert_parallel(degree))
    # Plain SGD with momentum: an error of scale in a gradient, which Adam would hide, shows in the weights.
    optimizer = torch.optim.SGD(deepspeed_compat.optimizer_groups(model, 0.1), lr=0.05, momentum=0.9)
    config = {
        "train_micro_batch_size_per_gpu": IMAGES,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    generator = torch.Generator().manual_seed(data)
    losses, norms, dropped = [], [], []
    for step in range(steps):
        routing = []
        for accumulation in range(2):
            pixels = torch.randn(world, IMAGES, 1, 8, 8, generator=generator)[rank]
            labels = torch.randint(6, (world, IMAGES), generator=generator)[rank]
            context = RoutingContext(step=step, steps=steps, microbatch=accumulation * world + rank)
            output = engine(pixels, labels, context=context)
            engine.backward(output.loss)
            routing.append(output.routing)
            loss = output.loss.detach().clone()
            dist.all_reduce(loss)
            losses.append(loss.item() / world)
            dropped += [layer.values.get("dropped_fraction", torch.zeros(())).item() for layer in output.routing]
            engine.step()
        update_routers(engine.module, routing)
        norms.append(float(engine.get_global_grad_norm()))
    return {"losses": losses, "norms": norms, "dropped": dropped, "state": full_state(engine.module)}


def train_shapes(
    shapes: list[tuple[int, int]], steps: int, given: dict[str, Any], data: int
) -> dict[tuple[int, int], Any]:
    """``train`` for each (expert-parallel degree, ZeRO stage)."""
    return {shape: train(*shape, steps, given, data) for shape in shapes}


def whole_initial_state(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a single process builds."""
    torch.manual_seed(0)
    return dict(VMoEForImageClassification(vision_config(**given)).state_dict())


def one_process(steps: int, given: dict[str, Any], world: int, data: int) -> dict[str, Any]:
    """The same training without DeepSpeed and without any other process: all ranks' micro-batches one by one.

    It also says whether all choices of experts were clear of ties.
    """
    torch.manual_seed(0)
    model = VMoEForImageClassification(vision_config(**given))
    clear = watch(model)
    optimizer = torch.optim.SGD(deepspeed_compat.optimizer_groups(model, 0.1), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(data)
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        for accumulation in range(2):
            pixels = torch.randn(world, IMAGES, 1, 8, 8, generator=generator)
            labels = torch.randint(6, (world, IMAGES), generator=generator)
            total = 0.0
            for rank in range(world):
                context = RoutingContext(step=step, steps=steps, microbatch=accumulation * world + rank)
                loss = model(pixels[rank], labels[rank], context=context).loss
                (loss / (2 * world)).backward()
                total += loss.item() / world
            losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    return {"losses": losses, "norms": norms, "state": dict(model.state_dict()), "clear": all(clear)}
