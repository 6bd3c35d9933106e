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
from datetime import timedelta
from pathlib import Path
from typing import Any

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

    ``timeout`` is for the others to join, and for each collective.
    """
    check_version()
    # A shared-memory all-reduce for inference on the CPU: otherwise compiled, for a minute, on the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, dist_init_required=True, timeout=timeout
    )


def to_universal(checkpoint: Path, output: Path) -> None:
    """Convert a checkpoint directory into DeepSpeed's universal form, one folder a parameter, under ``output``/zero."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(output),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


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


def tag_parameters(model: nn.Module) -> None:
    """Mark every expert parameter of ``model`` as DeepSpeed wants it. Idempotent.

    Not done once at construction, because loading a checkpoint may replace the parameter objects.
    """
    for layer in model.modules():
        if not isinstance(layer, EngineMoELayer):
            continue
        placement = layer.expert_placement_descriptor
        for parameter in (layer.experts.w1, layer.experts.w2, layer.experts.w3):
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


def expert_replicas(model: nn.Module) -> Any:
    """The process group of the ranks that hold the same experts as this one. All layers share one."""
    layer = next(layer for layer in model.modules() if isinstance(layer, EngineMoELayer))
    return groups._get_expert_data_parallel_group(layer.ep_group_name)


FROZEN = "frozen"  # key of the optimizer groups whose learning rate stays zero


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for a client optimizer: decayed and not, experts apart, as ZeRO needs them.

    Decayed are matrices, embeddings included. Biases, norms, vectors and temperatures are not; nor is the
    mlp form's expert bias [L, 1, F].

    Frozen experts have to stay in the optimizer: ZeRO 1 and 2 refuse a model with expert layers and no group of
    experts, and ZeRO 3 cannot save experts that need no gradient. They are told to need one, get none, as their
    layers detach them (moe/experts.py), and stand in a group FROZEN without learning rate and decay. The price is
    the memory of their optimizer state.
    """
    tag_parameters(model)
    held = frozen_experts(model)
    held_ids = {id(parameter) for parameter in held}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in held_ids:
            is_bias = parameter.squeeze().dim() < 2 or (parameter.dim() == 3 and parameter.shape[1] == 1)
            (plain if is_bias else decayed).append(parameter)
    for parameter in held:
        parameter.requires_grad_(True)
    parameter_groups = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "name": "plain"},
        {"params": held, "weight_decay": 0.0, "lr": 0.0, FROZEN: True, "name": "frozen"},
    ]
    split = split_params_into_different_moe_groups_for_optimizer([g for g in parameter_groups if g["params"]])
    return [group for group in split if group["params"]]


def frozen_experts(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the experts that moe/freezing.py froze."""
    layers = [layer for layer in model.modules() if isinstance(layer, EngineMoELayer) and layer.experts.frozen]
    return [parameter for layer in layers for parameter in layer.experts.parameters()]
