"""From the spread-out model of a run to one plain Hugging Face directory.

Every process holds some experts (expert parallelism) and perhaps only a slice of each weight
(ZeRO-3). They are gathered one parameter at a time to process 0, which writes `hf/` under another
name and renames it, so that the directory is complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from s2moe.data import Tokenizer
from s2moe.hub.card import write_card
from s2moe.hub.provenance import HF_DIRECTORY
from s2moe.hub.tokenization import save_tokenizer
from s2moe.models import S2MoEForCausalLM
from s2moe.models.configuration import S2MoEConfig
from s2moe.moe.layer import SMoELayer
from s2moe.parallel import ExpertParallel

from .publication import TEMPORARY
from .quiet import no_progress_bars
from .run_directory import ORIGIN_FILE, require_replaceable


def export_engine(engine: Any, run_directory: Path, tokenizer: Tokenizer, step: int) -> Path:
    """Write the engine's model to `run_directory/hf`. Collective; process 0 writes."""
    state = gather_state(engine.module)
    target = run_directory / HF_DIRECTORY
    if state is not None:
        origin = {"run": run_directory.name, "step": step}
        write_hf(engine.module.config, state, target, tokenizer, origin, run_directory)
    if dist.is_initialized():
        dist.barrier()
    return target


def gather_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The whole model's state dict, on the CPU, on process 0; None on the others. Collective."""
    experts = expert_parameters(model)
    keep = not dist.is_initialized() or dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        with whole(parameter), torch.no_grad():
            tensor = parameter.detach()
            if name in experts:
                tensor = gather_experts(tensor, experts[name])
            if keep:
                state[name] = tensor.to("cpu", copy=True)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved and keep:
            state[name] = buffer.detach().to("cpu", copy=True)
    return state if keep else None


def expert_parameters(model: nn.Module) -> dict[str, ExpertParallel]:
    """The names of the parameters that are dealt out over processes, and how."""
    return {
        f"{path}.experts.{name}": layer.parallel
        for path, layer in model.named_modules()
        if isinstance(layer, SMoELayer)
        for name in ("w1", "w2", "w3")
    }


def gather_experts(local: Tensor, parallel: ExpertParallel) -> Tensor:
    """All experts [E, ., .] from the local ones [L, ., .]. Collective over the expert-parallel group."""
    if parallel.size == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(parallel.size)]
    dist.all_gather(parts, local.contiguous(), group=parallel.group)
    return torch.cat(parts)


def write_hf(
    config: S2MoEConfig,
    state: dict[str, Tensor],
    target: Path,
    tokenizer: Tokenizer | None,
    origin: dict[str, Any],
    run_directory: Path | None = None,
) -> None:
    """Write configuration, weights, tokenizer, model card and origin to `target`, replacing an earlier export whole.

    Args:
        run_directory: where the weights were trained, for the card; None: nothing is known of it.

    Raises:
        ConfigError: `target` holds something else.
    """
    with torch.device("meta"):
        model = S2MoEForCausalLM(config)

    def add(directory: Path) -> None:
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory, config.max_position_embeddings)
        write_card(directory, config, origin, run_directory, tokenizer.kind if tokenizer is not None else "")

    write_model(model, state, target, origin, add, run_directory)


def write_model(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    target: Path,
    origin: dict[str, Any],
    add: Callable[[Path], None] = lambda directory: None,
    run_directory: Path | None = None,
) -> None:
    """Write a model with the weights `state`, and its origin, to `target`, replacing an earlier export of the run.

    Args:
        model: on the meta device; its weights do not count.
        add: writes what else belongs into the directory.
        run_directory: of the run; None: it is not known.

    Raises:
        ConfigError: `target` holds something else.
    """
    require_replaceable(target, origin["run"], run_directory)
    temporary = empty_beside(target)
    with no_progress_bars():
        model.to(next(iter(state.values())).dtype).save_pretrained(temporary, state_dict=state)
    add(temporary)
    (temporary / ORIGIN_FILE).write_text(json.dumps(origin), encoding="utf-8")
    put_in_place(temporary, target)


def empty_beside(target: Path) -> Path:
    """The path at which to write what `put_in_place` makes of it: nothing is there, and its parent is."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    return temporary


def put_in_place(temporary: Path, target: Path) -> None:
    """Make the finished directory `target`, which at any moment is the new or the old one, or absent."""
    old = target.with_name(f"{TEMPORARY}old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def whole(*parameters: nn.Parameter) -> AbstractContextManager[Any]:
    """Within it, parameters that ZeRO-3 has cut up are whole. Collective over the ranks that hold their parts."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))
