"""Universal checkpoints, one folder a parameter: for every number of processes, expert parallelism and ZeRO stage."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from s2moe.parallel.deepspeed_compat.files import keeping_settings, load_file, plain_path, safe_loading
from s2moe.parallel.deepspeed_compat.release import deepspeed

_HEADERS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # of stages 1-2, and of 3
REST = "rest.pt"  # what has no optimizer state: buffers and weights that are not trained
_WEIGHTS = ("module", "frozen_param_fragments")  # in a header file
_SCALING = ("loss_scaler", "dynamic_loss_scale", "overflow")  # of fp16, in the optimizer's state


def to_universal(checkpoint: Path, output: Path, progress: Callable[[], None] = lambda: None) -> None:
    """Write a checkpoint directory of any shape in DeepSpeed's universal form to the empty directory ``output``.

    ``output``/zero has a folder for each trained parameter with its float32 weights and both moments, experts whole;
    ``output``/rest.pt what is not trained. DeepSpeed's converter writes other files for stage 3 than for 1 and 2, which
    its loader of the other stages cannot read, and loses buffers: both are mended here. ``progress`` is called after
    every file read or written.
    """
    from deepspeed.checkpoint import ds_to_universal

    output.mkdir(parents=True, exist_ok=True)
    with (
        plain_path(checkpoint) as source,
        plain_path(output) as target,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        safe_loading(mmap=True, progress=progress),
        _layer_by_layer(ds_to_universal),
    ):
        arguments = argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
        ds_to_universal.main(arguments)
        (target.parent / "latest_universal").unlink(missing_ok=True)
        _unify(source, target)


def _layer_by_layer(converter: Any) -> contextlib.AbstractContextManager[Any]:
    """Within it, stage 3's experts are put together one layer at a time, not all of them in memory at once."""
    everything, information = converter._consolidate_zero3_autoep_expert_states, converter._autoep_expert_param_info

    def consolidate(output: str, model_files: list[str], optimizer_files: list[str]) -> None:
        names = information(converter._get_autoep_metadata(torch.load(model_files[0])))
        for layer in sorted({name.rpartition(".")[0] for name in names}):

            def of_layer(metadata: Any, prefix: str = f"{layer}.") -> dict[str, Any]:
                return {name: entry for name, entry in information(metadata).items() if name.startswith(prefix)}

            with mock.patch.object(converter, "_autoep_expert_param_info", of_layer):
                everything(output, model_files, optimizer_files)

    return mock.patch.object(converter, "_consolidate_zero3_autoep_expert_states", consolidate)


def _unify(checkpoint: Path, output: Path) -> None:
    """Make of the converter's files of one ZeRO stage those that the loaders of all stages read."""
    header_file = min(output.glob("*mp_rank_00_model_states.pt"))
    partitioned = header_file.name.partition("zero_pp_rank")[1] != ""  # stage 3
    header = torch.load(header_file)
    shapes = _merged(header["param_shapes"])
    zero = output / "zero"
    optimizer = torch.load(zero / "optimizer_state.pt")
    if partitioned:
        step = optimizer["optimizer_state_dict"]["state"][0]["step"]
        for name, shape in shapes.items():
            for file in (zero / name).glob("*.pt"):
                _wrap_flat(file, shape)
            torch.save(step, zero / name / "step.pt")
    else:
        step = torch.load(zero / next(iter(shapes)) / "step.pt")
    options = optimizer["param_groups"]
    common = {name: optimizer[name] for name in _SCALING if name in optimizer} | {"ds_version": header["ds_version"]}
    inner = {"state": {0: {"step": step}}, "param_groups": options}
    torch.save({**common, "param_groups": options, "optimizer_state_dict": inner}, zero / "optimizer_state.pt")

    rest = _frozen_partitions(checkpoint) if partitioned else {}
    aliases = header["shared_params"] or {}
    for name, tensor in header["module"].items():
        if name in header["buffer_names"] or not (partitioned or name in shapes or name in aliases):
            rest[name] = tensor.clone()
    torch.save(rest, output / REST)
    for folder in zero.iterdir():  # the converter's float32 copies of what is not trained
        if folder.is_dir() and folder.name not in shapes:
            shutil.rmtree(folder)
    for file in output.glob("*model_states.pt"):
        file.unlink()
    for name in _HEADERS:
        torch.save({key: value for key, value in header.items() if key not in _WEIGHTS} | {"module": {}}, output / name)


def _merged(groups_: Any) -> dict[str, Any]:
    """One dictionary of those of the optimizer's groups."""
    return {name: shape for group in groups_ for name, shape in group.items()}


def _wrap_flat(file: Path, shape: Any) -> None:
    """Stage 3's dense weights are written flat and bare; experts come whole and as the other stages'."""
    tensor = torch.load(file)
    if not isinstance(tensor, dict):
        torch.save({"param": tensor.reshape(shape), "cat_dim": 0}, file)


def _frozen_partitions(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Stage 3: weights that are not trained, which the converter leaves out; every process' file holds a slice."""
    pattern = "*zero_pp_rank_*_mp_rank_00_model_states.pt"
    files = sorted(checkpoint.glob(pattern), key=lambda file: int(file.name.split("pp_rank_")[1].split("_")[0]))
    states = [torch.load(file) for file in files]
    shapes = states[0]["frozen_param_shapes"] or {}
    return {
        name: torch.cat([state["frozen_param_fragments"][name] for state in states])[: math.prod(shape)].view(shape)
        for name, shape in shapes.items()
    }


def universal_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and float32 values of the trained weights in what ``to_universal`` wrote, experts whole."""
    for file in sorted(path.glob("zero/*/fp32.pt")):
        yield file.parent.name, load_file(file)["param"]


def load_universal(engine: Any, path: Path) -> None:
    """Load what ``to_universal`` wrote into an engine of any shape. Collective.

    Beside DeepSpeed's own loading, this
    - gives every group of ZeRO 3 a `step` of its own: they share one tensor, which each of them would advance;
    - leaves the optimizer's options as the engine was built with: ZeRO 3 gives all groups those of the first, ZeRO 1
      and 2 the saved groups' by position, names of expert groups included;
    - loads buffers and frozen weights, which it leaves as they were initialised.
    """
    with (
        plain_path(path) as plain,
        mock.patch.object(engine._config, "load_universal_checkpoint", True),
        safe_loading(mmap=True),
        keeping_settings(engine),
    ):
        loaded, _ = engine.load_checkpoint(str(plain.parent), tag=plain.name)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load the universal checkpoint {path}")
    for state in engine.optimizer.optimizer.state.values():  # of the optimizer that ZeRO steps
        state["step"] = state["step"].clone()
    _load_rest(engine.module, load_file(path / REST), path)


@torch.no_grad()
def _load_rest(module: nn.Module, rest: dict[str, torch.Tensor], path: Path) -> None:
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in module.state_dict()}
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    if rest.keys() != {*buffers, *frozen}:
        different = sorted(rest.keys() ^ {*buffers, *frozen})
        raise RuntimeError(f"{path} does not fit the model: only one of them has {different}")
    for name, buffer in buffers.items():
        buffer.copy_(rest[name])
    for name, parameter in frozen.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(rest[name])
