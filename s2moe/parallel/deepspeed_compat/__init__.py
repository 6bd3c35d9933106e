"""Everything that touches DeepSpeed's inside. Nothing else in the project may.

    release      which version, and whether there is one
    processes    process groups, expert-parallel ones among them
    layer        the class by which DeepSpeed knows an SMoE layer
    optimizer    groups of parameters for ZeRO
    files        reading and loading checkpoints
    universal    checkpoints for every shape

What they use is nearly private: ``check_version`` refuses an untried release, and tests/distributed checks the
contract itself.
"""

from s2moe.parallel.deepspeed_compat.files import CheckpointFileError, load_checkpoint, load_file, safe_loading
from s2moe.parallel.deepspeed_compat.layer import EngineMoELayer, expert_replicas, stacked_experts, tag_parameters
from s2moe.parallel.deepspeed_compat.optimizer import FROZEN, frozen_experts, need_no_gradient, optimizer_groups
from s2moe.parallel.deepspeed_compat.processes import (
    expert_parallel,
    init_distributed,
    leave_out_shared_memory,
    set_timeout,
    ulysses_attention,
)
from s2moe.parallel.deepspeed_compat.release import TRIED_VERSIONS, check_version
from s2moe.parallel.deepspeed_compat.universal import REST, load_universal, to_universal, universal_weights

__all__ = [
    "FROZEN",
    "REST",
    "TRIED_VERSIONS",
    "CheckpointFileError",
    "EngineMoELayer",
    "check_version",
    "expert_parallel",
    "expert_replicas",
    "frozen_experts",
    "init_distributed",
    "leave_out_shared_memory",
    "load_checkpoint",
    "load_file",
    "load_universal",
    "need_no_gradient",
    "optimizer_groups",
    "safe_loading",
    "set_timeout",
    "stacked_experts",
    "tag_parameters",
    "to_universal",
    "ulysses_attention",
    "universal_weights",
]
