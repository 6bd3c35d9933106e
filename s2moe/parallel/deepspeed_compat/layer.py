"""The base class of the SMoE layer, by which DeepSpeed knows it, and the marks on its parameters.

DeepSpeed recognises a mixture-of-experts layer by ``isinstance(layer, AutoEPMoELayer)``, not by parameter attributes:
a module of one's own with only tagged parameters crashes at ZeRO 0-2 and trains wrongly without an error at ZeRO 3. So
the layer subclasses it, skips its constructor, and supplies what the engine, ZeRO, the checkpoint writer and the
universal converter look up by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from s2moe.parallel.deepspeed_compat.release import deepspeed
from s2moe.parallel.expert_parallel import ExpertParallel

if deepspeed is not None:
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
    from deepspeed.utils import groups
else:
    AutoEPMoELayer = nn.Module


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


def expert_replicas(model: nn.Module) -> Any:
    """The process group of the ranks that hold the same experts as this one. All layers share one."""
    layer = next(layer for layer in model.modules() if isinstance(layer, EngineMoELayer))
    return groups._get_expert_data_parallel_group(layer.ep_group_name)
