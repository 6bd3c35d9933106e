"""A pre-trained model with another head, other settings, or experts dealt to several processes.

``from_pretrained`` reads all experts into every process. Here each process reads its own, at every expert-parallel
degree, and under ZeRO 3 too, where transformers would build the model in its own way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers.integrations import deepspeed as hf_deepspeed

from s2moe.config.options import ConfigError
from s2moe.models.configuration import S2MoEConfig
from s2moe.models.modeling import S2MoEPreTrainedModel
from s2moe.options import deep_merge
from s2moe.parallel import ExpertParallel
from s2moe.training.export import expert_parameters, gather_state
from s2moe.training.quiet import no_progress_bars
from s2moe.training.weights import Weights, checkpoint_config, checkpoint_state, find_weights

Model = TypeVar("Model", bound=S2MoEPreTrainedModel)
Read = Callable[[range | None], Tensor]  # a tensor, or these rows of it

HEADS = ("lm_head.", "score.")  # each belongs to its own class of model


def load_pretrained(
    cls: type[Model],
    path: Path | str,
    parallel: ExpertParallel | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Model:
    """The model in a Hugging Face directory, run directory or checkpoint as a `cls`, in float32 on the CPU.

    What `cls` has no place for of the other head is left out; a head of its own that was not saved is new, drawn
    from torch's generator. Every other weight must be there.

    Args:
        parallel: where the experts live; None for a single process.
        changes: of the configuration, nested ones included, e.g. {"num_labels": 5, "moe": {"router":
            {"balance_loss": 0.0}}, "hidden_dropout": 0.1}.

    Raises:
        ConfigError: no weights, weights that do not fit, an impossible change.
    """
    weights = find_weights(Path(path))
    config = changed_config(weights, changes or {})
    with without_zero3():
        model = cls(config, parallel)
    tensors = dict(_tensors(weights))
    missing, unexpected = _load(model, tensors)
    gates = {name for name in unexpected if ".mix_gate." in name}
    stochastic = config.moe_config().stochastic
    if gates and not stochastic.enabled:
        if stochastic.inference == "gated":
            raise ConfigError(
                f"{weights.description} uses S2MoE's gate at inference (stochastic.inference=gated): without the "
                "noise the gate is gone too, which would change what it computes. Keep the noise"
            )
        unexpected -= gates
    if config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    missing = {name for name in missing if not name.startswith("score.")}
    unexpected = {name for name in unexpected if not name.startswith(HEADS)}
    if missing or unexpected:
        raise ConfigError(
            f"{weights.description} does not fit a {cls.__name__} of its configuration: "
            f"missing {sorted(missing)}, unexpected {sorted(unexpected)}"
        )
    model.tie_weights()
    return model


def changed_config(weights: Weights, changes: Mapping[str, Any]) -> S2MoEConfig:
    """The configuration of these weights with changes. Raises ConfigError for what is impossible."""
    if weights.hf is not None:
        values = S2MoEConfig.get_config_dict(weights.hf)[0]
    else:
        assert weights.checkpoint is not None
        values = checkpoint_config(weights.checkpoint).to_dict()
    kind = values.get("model_type")
    if kind != S2MoEConfig.model_type:
        raise ConfigError(f"{weights.description} is a model of type {kind!r}, not {S2MoEConfig.model_type!r}")
    try:
        return S2MoEConfig.from_dict(deep_merge(values, changes))
    except ValueError as error:
        raise ConfigError(f"{weights.description} with {dict(changes)}: {error}") from error


@torch.no_grad()
def _load(model: S2MoEPreTrainedModel, tensors: Mapping[str, Read]) -> tuple[set[str], set[str]]:
    """Copy what has a place in the model; names that only the model has, and that only the tensors have."""
    experts = expert_parameters(model)
    counts = {
        f"{path}.experts.{weight}": layer.num_experts
        for path, layer in model.named_modules()
        if hasattr(layer, "num_local_experts")
        for weight in ("w1", "w2", "w3")
    }
    places = model.state_dict()
    for name in places.keys() & tensors.keys():
        rows = experts[name].local_experts(counts[name]) if name in experts else None
        tensor = tensors[name](rows)
        if tensor.shape != places[name].shape:
            raise ConfigError(
                f"{name} is {list(tensor.shape)} in the weights, {list(places[name].shape)} in the model: "
                "they are not of the same sizes"
            )
        places[name].copy_(tensor)
    return places.keys() - tensors.keys(), tensors.keys() - places.keys()


def _tensors(weights: Weights) -> Iterator[tuple[str, Read]]:
    """Every saved tensor's name, and how to read it."""
    if weights.hf is None:
        assert weights.checkpoint is not None
        for name, tensor in checkpoint_state(weights.checkpoint).items():
            yield name, partial(_rows, tensor)
        return
    files = sorted(weights.hf.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{weights.hf} has no weights: expected *.safetensors beside config.json")
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            yield name, partial(_read, path, name)


def _rows(tensor: Tensor, rows: range | None) -> Tensor:
    return tensor if rows is None else tensor[rows.start : rows.stop]


def _read(path: Path, name: str, rows: range | None) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows.start : rows.stop]


def save_pretrained(model: S2MoEPreTrainedModel, directory: Path | str) -> None:
    """Write the whole model for ``from_pretrained``, experts of all processes and what ZeRO 3 cut up included.

    For loops of one's own; S2MoETrainer does it by itself. Collective; process 0 writes.
    """
    state = gather_state(model)
    if state is not None:
        with no_progress_bars():
            model.save_pretrained(directory, state_dict=state)
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Within it, transformers does not know of ZeRO 3, and initialises a model as it always does, on every process.

    With TrainingArguments(deepspeed=...) of stage 3 in scope only rank 0 would. The engine cuts the weights up later.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        config = reference() if reference is not None else None
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)
