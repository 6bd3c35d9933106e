"""Everything that touches DeepSpeed's inside. Nothing else in the project may.

DeepSpeed recognises a mixture-of-experts layer by ``isinstance(layer, AutoEPMoELayer)``, not by
parameter attributes: a module of one's own with only tagged parameters crashes at ZeRO 0-2 and trains
wrongly without an error at ZeRO 3. So the layer subclasses it, skips its constructor, and supplies
what the engine, ZeRO, the checkpoint writer and the universal converter look up by name. These names
are nearly private: ``check_version`` refuses an untried release, and tests/distributed checks the
contract itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from s2moe.parallel.expert_parallel import ExpertParallel

TRIED_VERSIONS = ("0.19.8",)

# Without a GPU DeepSpeed says at every import that it takes the CPU: no news, and noise above our own messages.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

try:
    import deepspeed
    from deepspeed.checkpoint.autoep_affine import (
        autoep_experts_for_rank,
        autoep_placement_to_affine_map,
        legacy_uniform_autoep_placement_descriptor,
    )
    from deepspeed.checkpoint.constants import (
        AFFINE_MAP,
        AUTOEP_EXPERT_PLACEMENT,
        AUTOEP_PARAM_EP_RANK,
        AUTOEP_PARAM_LOCAL_EXPERTS,
        AUTOEP_PARAM_LOGICAL_SHAPE,
        DS_AUTOEP_UC_META,
    )
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.utils import groups
except ImportError:  # inference and plain PyTorch training need no DeepSpeed
    deepspeed = None
    AutoEPMoELayer = nn.Module


def check_version() -> None:
    """Raise RuntimeError unless DeepSpeed is installed in a release that was tried."""
    if deepspeed is None:
        raise RuntimeError(f"training on the DeepSpeed engine needs it: pip install deepspeed=={TRIED_VERSIONS[-1]}")
    if deepspeed.__version__ not in TRIED_VERSIONS:
        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} was never tried with this project, which relies on its inside, "
            f"and a mismatch can train wrongly without an error: pip install deepspeed=={TRIED_VERSIONS[-1]}"
        )


def init_distributed(backend: str, timeout: timedelta) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    ``timeout`` is for the others to join, and for each collective, unless ``set_timeout`` says otherwise afterwards.
    """
    check_version()
    leave_out_shared_memory()
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, dist_init_required=True, timeout=timeout
    )


def leave_out_shared_memory() -> None:
    """Joining a process group, DeepSpeed shall not compile, for a minute, an all-reduce for inference on the CPU."""
    if deepspeed is not None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_timeout(timeout: timedelta) -> None:
    """Set how long each collective of the joined process group, and each question to its store, may take."""
    dist.distributed_c10d._set_pg_timeout(timeout)
    dist.distributed_c10d._get_default_store().set_timeout(timeout)


class CheckpointFileError(RuntimeError):
    """A file is no checkpoint file, or would run code that a checkpoint has no use for."""


def _plain_classes() -> list[Any]:
    """What DeepSpeed's checkpoint files hold besides tensors, numbers and containers. None does anything when made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, torch.torch_version.TorchVersion]


def load_file(path: Path | str, mmap: bool = True) -> Any:
    """What a checkpoint file holds, on the CPU. Only tensors, containers and a few known classes are ever made.

    Args:
        mmap: read tensors when they are used, and only the part that is; the file must then stay as it is.

    Raises:
        CheckpointFileError: it would run other code, or is no file that torch.save wrote.
    """
    try:
        with torch.serialization.safe_globals(_plain_classes()):
            return _torch_load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        told = " ".join(str(error).split())[-300:]
        raise CheckpointFileError(f"{path} is not loaded, as it is not a plain checkpoint file: {told}") from error


_torch_load = torch.load


@contextlib.contextmanager
def _safe_loading(mmap: bool, progress: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within it, DeepSpeed reads and writes files as ``load_file`` does and says after each that it goes on.

    It asks for ``weights_only=False`` everywhere itself.
    """
    save = torch.save

    def loading(path: Any, map_location: Any = None, **_: Any) -> Any:
        progress()
        return load_file(path, mmap)

    def saving(value: Any, path: Any, **options: Any) -> None:
        temporary = f"{path}.tmp"  # never into a file that is being read through memory
        save(value, temporary, **options)
        os.replace(temporary, path)
        progress()

    with mock.patch.object(torch, "load", loading), mock.patch.object(torch, "save", saving):
        yield


@contextlib.contextmanager
def _plain_path(path: Path) -> Iterator[Path]:
    """A path to the same directory without characters that DeepSpeed, for want of escaping, takes for patterns."""
    if re.fullmatch(r"[\w./=,:@%~ -]*", str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="s2moe-") as folder:
        link = Path(folder, "checkpoint")
        link.symlink_to(path.resolve(), target_is_directory=True)
        yield link


def load_checkpoint(engine: Any, path: Path) -> None:
    """Load a checkpoint that an engine of the same shape wrote. Collective.

    Options of the optimizer and clipping stay those that the engine was built with; DeepSpeed would bring back the
    saved ones.
    """
    with _plain_path(path) as plain, _safe_loading(mmap=False), _keeping_settings(engine):
        loaded, _ = engine.load_checkpoint(str(plain.parent), tag=plain.name)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load the checkpoint {path}")


# --- universal checkpoints: one folder a parameter, for every number of processes, expert-parallel degree and stage --

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
        _plain_path(checkpoint) as source,
        _plain_path(output) as target,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        _safe_loading(mmap=True, progress=progress),
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
        _plain_path(path) as plain,
        mock.patch.object(engine._config, "load_universal_checkpoint", True),
        _safe_loading(mmap=True),
        _keeping_settings(engine),
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


@contextlib.contextmanager
def _keeping_settings(engine: Any) -> Iterator[None]:
    """Within it, loading does not change what the engine was built with: options of the optimizer and clipping."""
    options = [
        {name: value for name, value in group.items() if name != "params"} for group in engine.optimizer.param_groups
    ]
    clip = getattr(engine.optimizer, "clip_grad", None)
    yield
    for group, values in zip(engine.optimizer.param_groups, options, strict=True):
        group.update(values)
    if clip is not None:
        engine.optimizer.clip_grad = clip


class EngineMoELayer(AutoEPMoELayer):
    """Base of the SMoE layer: a module that DeepSpeed takes for one of its own expert layers.

    A subclass calls ``super().__init__()``, sets ``router`` and ``experts`` (with parameters w1, w2,
    w3 of shape [L, ., .]) and then calls ``bind_engine``.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def bind_engine(self, num_experts: int, parallel: ExpertParallel) -> None:
        """Set the attributes by which engine and checkpoint writer know the layer."""
        self.parallel = parallel
        self.num_experts = num_experts
        self.num_local_experts = len(parallel.local_experts(num_experts))
        self.ep_size, self.ep_rank = parallel.size, parallel.rank
        self.ep_group_name = f"ep_size_{parallel.size}"  # DeepSpeed parses the number out of the name
        self.ep_group = parallel.group
        self.folding_group_handles = None
        if deepspeed is not None:
            self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
                num_experts, self.num_local_experts, parallel.size
            )

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
    ) -> None:
        """Called by the engine before it builds the optimizer."""
        if folding_group_handles is not None:
            raise RuntimeError("tensor parallelism folded into expert parallelism is not supported")
        if self.ep_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.ep_group = groups._get_expert_parallel_group(self.ep_group_name)
        tag_parameters(self)


def stacked_experts(layer: EngineMoELayer) -> Any:
    """The layer's experts (moe/experts.py), inside of what PEFT may have wrapped around them."""
    experts: Any = layer.experts
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    return experts


def tag_parameters(model: nn.Module) -> None:
    """Mark every expert parameter of ``model`` as DeepSpeed wants it. Idempotent.

    Not done once at construction, because loading a checkpoint may replace the parameter objects.
    """
    for layer in model.modules():
        if not isinstance(layer, EngineMoELayer):
            continue
        placement = layer.expert_placement_descriptor
        experts = stacked_experts(layer)
        for parameter in (experts.w1, experts.w2, experts.w3):
            if hasattr(parameter, DS_AUTOEP_UC_META):
                continue
            parameter.allreduce = False
            parameter.group_name = layer.ep_group_name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = layer.ep_group_name
            parameter.is_expert_group = True
            logical_shape = [layer.num_experts, *parameter.shape[1:]]
            metadata = {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, logical_shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
                AUTOEP_PARAM_EP_RANK: layer.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, layer.ep_rank)),
            }
            setattr(parameter, DS_AUTOEP_UC_META, metadata)
        for name, parameter in layer.named_parameters():
            if not name.startswith("experts."):
                parameter.ds_zero_placement_family = "replicated"


def expert_parallel(size: int) -> ExpertParallel:
    """The expert-parallel groups of this run, made by DeepSpeed: consecutive ranks share the experts.

    Call after ``deepspeed.init_distributed`` and before building the model, with the same size on
    every rank.

    Raises:
        ValueError: if ``size`` does not divide the number of processes.
    """
    check_version()
    world = dist.get_world_size()
    if size < 1 or world % size:
        raise ValueError(
            f"expert-parallel degree {size} does not divide the {world} processes: "
            f"choose one of {[n for n in range(1, world + 1) if world % n == 0]}"
        )
    name = f"ep_size_{size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    return ExpertParallel(
        size=size,
        rank=groups._get_expert_parallel_rank(name),
        group=groups._get_expert_parallel_group(name),
        data_group=dist.group.WORLD if world > 1 else None,
    )


def ulysses_attention(name: str, config: Any, group: Any, micro_batch: int, sequence_length: int) -> None:
    """Register with transformers, as ``name``, attention over sequences that are dealt to the ranks of ``group``."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    heads, key_value_heads, width = config.attention_shape()
    attention = UlyssesSPAttentionHF(
        attn=ALL_ATTENTION_FUNCTIONS["sdpa"],
        batch_size=micro_batch,
        attn_head_count=heads,
        attn_head_size=width,
        kv_head_count=key_value_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=group,
        local_seq_length=sequence_length // dist.get_world_size(group),
        global_seq_length=sequence_length,
        disable_in_eval=True,
    )

    def attend(module: nn.Module, *inputs: Any, **options: Any) -> Any:
        groups = module.num_key_value_groups  # DeepSpeed changes it for good where it repeats keys and values
        try:
            return attention(module, *inputs, **options)
        finally:
            module.num_key_value_groups = groups

    ALL_ATTENTION_FUNCTIONS.register(name, attend)


def expert_replicas(model: nn.Module) -> Any:
    """The process group of the ranks that hold the same experts as this one. All layers share one."""
    layer = next(layer for layer in model.modules() if isinstance(layer, EngineMoELayer))
    return groups._get_expert_data_parallel_group(layer.ep_group_name)


FROZEN = "frozen"  # key of the optimizer groups whose learning rate stays zero


def optimizer_groups(
    model: nn.Module,
    weight_decay: float,
    lr_factor: Callable[[str], float] | None = None,
    decay_all: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for a client optimizer: decayed and not, experts apart, as ZeRO needs them.

    Decayed are matrices, embeddings included. Biases, norms, vectors and temperatures are not; nor is the
    mlp form's expert bias [L, 1, F].

    Frozen experts have to stay in the optimizer: ZeRO 1 and 2 refuse a model with expert layers and no group of
    experts, and ZeRO 3 cannot save experts that need no gradient. They are told to need one, get none, as their
    layers detach them (moe/experts.py), and stand in a group FROZEN without learning rate and decay. The price is
    the memory of their optimizer state.

    Args:
        lr_factor: what a parameter's learning rate is to be multiplied with, by its name. Each factor has groups of
            its own, which hold it as ``lr_factor``, highest first.
        decay_all: decay every parameter.
    """
    tag_parameters(model)
    held = frozen_experts(model)
    held_ids = {id(parameter) for parameter in held}
    parts: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held_ids:
            is_bias = parameter.squeeze().dim() < 2 or (parameter.dim() == 3 and parameter.shape[1] == 1)
            factor = 1.0 if lr_factor is None else lr_factor(name)
            parts.setdefault(("plain" if is_bias and not decay_all else "decayed", -factor), []).append(parameter)
    for parameter in held:
        parameter.requires_grad_(True)
    parameter_groups: list[dict[str, Any]] = []
    for (kind, negative), parameters in sorted(parts.items(), key=lambda item: item[0]):
        group = {"params": parameters, "weight_decay": weight_decay if kind == "decayed" else 0.0, "name": kind}
        if lr_factor is not None:
            group |= {"name": f"{kind}, learning rate x {-negative:g}", "lr_factor": -negative}
        parameter_groups.append(group)
    if held:
        parameter_groups.append({"params": held, "weight_decay": 0.0, "lr": 0.0, FROZEN: True, "name": "frozen"})
    split = split_params_into_different_moe_groups_for_optimizer(parameter_groups)
    return [group for group in split if group["params"]]


def frozen_experts(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the experts that moe/freezing.py froze."""
    stacks = [stacked_experts(layer) for layer in model.modules() if isinstance(layer, EngineMoELayer)]
    return [parameter for experts in stacks if experts.frozen for parameter in experts.parameters()]
