"""Probing a model under the engine, as functions that a test can start on any number of ranks."""

from __future__ import annotations

from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.moe.routing import RoutingContext
from s2moe.parallel import ExpertParallel, deepspeed_compat
from s2moe.training.probe import LayerProbe, ProbeSet, probe
from tests.distributed_harness import reset_groups

VOCABULARY, LENGTH = 32, 16


def tiny_model(parallel: ExpertParallel | None = None, **moe: Any) -> S2MoEForCausalLM:
    """Two layers, four experts, weights large enough for the experts to differ."""
    options = {"method": "s2moe", "num_experts": 4, "experts_per_token": 2, "expert_hidden": 24, **moe}
    config = S2MoEConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,
        moe=options,
    )
    torch.manual_seed(0)
    return S2MoEForCausalLM(config, parallel)


def tiny_probe_set(tokens: int = 5 * LENGTH + 3, samples: int = 20) -> ProbeSet:
    """Five windows, which two ranks cannot share evenly."""
    stream = np.random.default_rng(0).integers(0, VOCABULARY, 200)
    return ProbeSet.take(stream, tokens, LENGTH, samples)


def everything(layers: list[LayerProbe]) -> dict[str, Any]:
    """All numbers of a probe by name, to be compared."""
    found: dict[str, Any] = {}
    for layer in layers:
        found |= {f"{layer.layer}/{name}": value for name, value in layer.figures.items()}
        found |= {f"{layer.layer}/{name}": matrix.tolist() for name, matrix in layer.matrix.items()}
        found[f"{layer.layer}/load"] = layer.load_E
        found[f"{layer.layer}/sigma"] = layer.sigma_R
        found[f"{layer.layer}/order"] = layer.order_TK.tolist()
    return found


def probe_engine(shapes: list[tuple[int, int]], batch: int, probed: bool) -> dict[tuple[int, int], Any]:
    """For each (expert-parallel degree, ZeRO stage): a probe before and between two steps of training."""
    return {shape: _probe_engine(*shape, batch, probed) for shape in shapes}


def _probe_engine(degree: int, stage: int, batch: int, probed: bool) -> dict[str, Any]:
    reset_groups()
    model = tiny_model(deepspeed_compat.expert_parallel(degree))
    optimizer = torch.optim.SGD(deepspeed_compat.optimizer_groups(model, 0.1), lr=0.05, momentum=0.9)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        # Without the threshold ZeRO-3 would leave parameters of this size whole.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    device, rank, world = torch.device("cpu"), dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    probes, losses = [], []
    for step in range(3):
        if probed:
            engine.eval()
            probes.append(everything(probe(engine, tiny_probe_set(), batch, device)))
        engine.train()
        tokens = torch.randint(0, VOCABULARY, (world, 2, LENGTH + 1), generator=generator)[rank]
        context = RoutingContext(step=step, microbatch=rank)
        output = engine(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous(), context=context)
        engine.backward(output.loss)
        engine.step()
        losses.append(float(output.loss.detach()))
    return {"probes": probes, "losses": losses}
