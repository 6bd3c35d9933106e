"""A pre-trained model with another head, other settings, or experts dealt to several processes.

``from_pretrained`` reads all experts into every process. Here each process reads its own, at every expert-parallel
degree, and under ZeRO 3 too, where transformers would build the model in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from s2moe.config.options import ConfigError
from s2moe.hub.reading import read_config, require_config, require_whole
from s2moe.hub.weight_files import WeightFiles
from s2moe.models.zero3 import without_zero3
from s2moe.options import deep_merge
from s2moe.parallel import ExpertParallel
from s2moe.training.export import expert_parameters, gather_state
from s2moe.training.quiet import no_progress_bars
from s2moe.training.weights import Weights, checkpoint_config, checkpoint_state, find_weights

Read = Callable[[range | None], Tensor]  # a tensor, or these rows of it

HEADS = ("lm_head.", "score.")  # each belongs to its own class of model


def load_pretrained(
    cls: Any,
    path: Path | str,
    parallel: ExpertParallel | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """The model in a Hugging Face directory, run directory or checkpoint as a `cls`, in float32 on the CPU.

    What `cls` has no place for of the other head is left out; a head of its own that was not saved is new, drawn
    from torch's generator. Every other weight must be there.

    Args:
        cls: a class of model with SMoE layers, or one of transformers' Auto classes, which finds the weights' own:
            AutoModelForSequenceClassification, AutoModelForCausalLM, AutoModel.
        parallel: where the experts live; None for a single process.
        changes: of the configuration, nested ones included, e.g. {"num_labels": 5, "moe": {"router":
            {"balance_loss": 0.0}}, "hidden_dropout": 0.1}.

    Raises:
        ConfigError: no weights, weights that do not fit, an impossible change.
    """
    weights = find_weights(Path(path))
    config = changed_config(weights, changes or {})
    cls = class_for(cls, config, weights)
    with without_zero3():
        model = cls(config, parallel)
    if weights.hf is not None and model.can_generate() and (weights.hf / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = read_config(GenerationConfig, weights.hf)
    headless = f"{model.base_model_prefix}." if model.base_model is model else ""
    tensors = {name.removeprefix(headless): read for name, read in _tensors(weights)}
    missing, unexpected, others = _load(model, tensors)
    gates = {name for name in unexpected if ".mix_gate." in name}
    stochastic = config.moe_config().stochastic
    if gates and not stochastic.enabled:
        if stochastic.inference == "gated":
            raise ConfigError(
                f"{weights.description} uses S2MoE's gate at inference (stochastic.inference=gated): without the "
                "noise the gate is gone too, which would change what it computes. Keep the noise"
            )
        unexpected -= gates
    missing -= set(model.all_tied_weights_keys)
    missing = {name for name in missing if not name.startswith("score.")}
    unexpected = {name for name in unexpected if not name.startswith(HEADS)}
    changed = f" with other {', '.join(changes)}" if changes else ""
    require_whole(f"{weights.description}, for a {cls.__name__}{changed},", missing, unexpected, others)
    model.tie_weights()
    return model


def class_for(cls: Any, config: PreTrainedConfig, weights: Weights) -> Any:
    """The class of model with this configuration that an Auto class stands for."""
    found = cls._model_mapping.get(type(config), None) if hasattr(cls, "_model_mapping") else cls
    if found is None or found.config_class is not type(config):
        raise ConfigError(
            f"{weights.description} is a model of type {config.model_type!r}, which no {cls.__name__} has: "
            "AutoModelForSequenceClassification and the like find the class that fits"
        )
    return found


def changed_config(weights: Weights, changes: Mapping[str, Any]) -> Any:
    """The configuration of these weights with changes. Raises ConfigError for what is impossible."""
    if weights.hf is not None:
        values = require_config(weights.hf)
    else:
        assert weights.checkpoint is not None
        values = checkpoint_config(weights.checkpoint).to_dict()
    kind = values.get("model_type")
    try:
        cls: Any = CONFIG_MAPPING[kind]  # its `get` knows nothing of what was registered
    except KeyError:
        cls = None
    if not hasattr(cls, "moe_config"):
        raise ConfigError(
            f"{weights.description} is a model of type {kind!r}, which has no SMoE layers of this project: "
            "`python launcher/export.py upcycle` or `import` make one with them"
        )
    try:
        config = cls.from_dict(deep_merge(values, changes))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{weights.description} with {dict(changes)}: {error}") from error
    if config.num_labels < 1:
        raise ConfigError(f"num_labels must be at least 1, got {config.num_labels}")
    unknown = [name for name in changes if not hasattr(cls(), name)]
    if unknown:
        raise ConfigError(f"{weights.description}: a model of type {kind!r} has no {', '.join(unknown)}")
    return config


@torch.no_grad()
def _load(model: PreTrainedModel, tensors: Mapping[str, Read]) -> tuple[set[str], set[str], set[str]]:
    """Copy what has a place in the model; names that only the model has, that only the tensors have, of other sizes."""
    experts = expert_parameters(model)
    counts = {
        f"{path}.experts.{weight}": layer.num_experts
        for path, layer in model.named_modules()
        if hasattr(layer, "num_local_experts")
        for weight in ("w1", "w2", "w3")
    }
    places, others = model.state_dict(), set()
    for name in places.keys() & tensors.keys():
        rows = experts[name].local_experts(counts[name]) if name in experts else None
        tensor = tensors[name](rows)
        if tensor.shape == places[name].shape:
            places[name].copy_(tensor)
        else:
            others.add(name)
    return places.keys() - tensors.keys(), tensors.keys() - places.keys(), others


def _tensors(weights: Weights) -> Iterator[tuple[str, Read]]:
    """Every saved tensor's name, and how to read it."""
    if weights.hf is None:
        assert weights.checkpoint is not None
        for name, tensor in checkpoint_state(weights.checkpoint).items():
            yield name, partial(_rows, tensor)
        return
    files = WeightFiles(weights.hf)
    for name in files.shapes:
        yield name, partial(files.rows, name)


def _rows(tensor: Tensor, rows: range | None) -> Tensor:
    return tensor if rows is None else tensor[rows.start : rows.stop]


def save_pretrained(model: PreTrainedModel, directory: Path | str) -> None:
    """Write the whole model for ``from_pretrained``, experts of all processes and what ZeRO 3 cut up included.

    For loops of one's own; S2MoETrainer does it by itself. Collective; process 0 writes.
    """
    state = gather_state(model)
    if state is not None:
        with no_progress_bars():
            model.save_pretrained(directory, state_dict=state)
    if dist.is_initialized():
        dist.barrier()
