"""What the planning tests measure, on ranks and in their own process."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from s2moe import S2MoEForCausalLM
from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.moe.routing import RoutingContext
from s2moe.training.engine import build_engine
from s2moe.training.processes import start_processes

VOCABULARY = 256
BUCKET = 5e8  # bytes; DeepSpeed's are larger, everything of the tests' models is smaller


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of each distinct storage, by its address."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and not tensor.is_sparse:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _alive(before: dict[int, int]) -> dict[int, int]:
    """Every tensor that Python knows and that was not there before."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    return {address: size for address, size in storages(tensors).items() if address not in before}


def engine_memory(config_path: str, overrides: list[str]) -> dict[str, float]:
    """Bytes of what the engine holds, by kind, in the second of two steps, which has all the state of the first.

    buffers: of the size of DeepSpeed's buckets, while a backward pass goes on.
    gradients: all else after the last backward pass.
    """
    before = _alive({})
    config = load(RunConfig, config_path, overrides)
    processes = start_processes()
    engine = build_engine(config, config.model_config(VOCABULARY), processes)
    accumulation, size = config.accumulation_steps(processes.world_size), config.micro_batch(processes.world_size)
    buffers = [0.0]

    def look(*_: Any) -> None:
        buffers.append(sum(bytes for bytes in _alive(before).values() if bytes >= BUCKET))

    first = engine.module.model.layers[0].attention.q_proj.weight  # whose gradient is among the last
    first.register_hook(look)
    for step in range(2):
        for index in range(accumulation):
            tokens = torch.randint(0, VOCABULARY, (size, config.training.sequence_length + 1))
            context = RoutingContext(step=step, microbatch=index)
            output = engine(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous(), context=context)
            engine.backward(output.loss)
            del output, tokens
            if (step, index) == (1, accumulation - 1):
                after, kinds = _alive(before), _kinds(engine)
            engine.step()
    known = {kind: sum(after.get(address, 0) for address in addresses) for kind, addresses in kinds.items()}
    other = {address: bytes for address, bytes in after.items() if not any(address in own for own in kinds.values())}
    gradients = sum(bytes for bytes in other.values() if bytes < BUCKET)
    return {**known, "buffers": max(buffers), "gradients": gradients}


def _kinds(engine: Any) -> dict[str, set[int]]:
    parameters = list(engine.module.parameters())
    weights = [getattr(parameter, "ds_tensor", parameter.data) for parameter in parameters]
    gathered = set(storages(parameters)) - set(storages(weights))  # ZeRO 3 keeps small ones whole, which is counted
    state = engine.optimizer.optimizer.state  # by the float32 copies of this process' share of the weights
    moments = [value for values in state.values() for value in values.values()]
    return {"weights": set(storages(weights)), "gathered": gathered, "optimizer": set(storages([*state, *moments]))}


def saved_bytes(model: S2MoEForCausalLM, tokens_BS: Tensor) -> int:
    """Bytes that a training forward keeps for its backward, weights and buffers not counted, each storage once."""
    own = set(storages([*model.parameters(), *model.buffers()]))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward(model, tokens_BS)
        found = storages(saved)
    del output
    return sum(size for address, size in found.items() if address not in own)


def peak_bytes(model: S2MoEForCausalLM, tokens_BS: Tensor) -> int:
    """The most that is allocated at once in forward and backward, weights and gradients not counted."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        output = forward(model, tokens_BS)
        output.loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    total = next(size for kind, size in peak.items() if kind == "Total")
    return total - 2 * sum(p.numel() * p.element_size() for p in model.parameters())


def forward(model: S2MoEForCausalLM, tokens_BS: Tensor) -> Any:
    """A training forward pass that predicts each next token."""
    context = RoutingContext(step=5, steps=10)
    return model(input_ids=tokens_BS[:, :-1], shift_labels=tokens_BS[:, 1:].contiguous(), context=context)
