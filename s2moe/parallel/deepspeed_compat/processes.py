"""Process groups that DeepSpeed makes: of all processes, and of those that share the experts or a sequence."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn

from s2moe.parallel.deepspeed_compat.release import check_version, deepspeed
from s2moe.parallel.expert_parallel import ExpertParallel

if deepspeed is not None:
    from deepspeed.utils import groups


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
