"""Fine-tuning runs on the ranks of a test."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.config import ConfigError, load
from s2moe.config.finetune import FinetuneConfig
from s2moe.data import ByteTokenizer, CorpusError, Tokenizer
from s2moe.finetuning import run as runs
from s2moe.training.processes import Processes
from s2moe.training.signals import catch_stop_signals


def language_model(directory: Path, tokenizer: Tokenizer | None = None, experts_per_token: int = 1) -> None:
    """What a pre-training run leaves in hf/: a small model with S2MoE layers, of bytes, not trained at all.

    With all four experts for every token no choice depends on rounding.
    """
    tokenizer = tokenizer or ByteTokenizer()
    torch.manual_seed(0)
    config = S2MoEConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.05,
        max_position_embeddings=64,
        moe={
            "method": "s2moe",
            "num_experts": 4,
            "expert_hidden": 32,
            "experts_per_token": experts_per_token,
            "stochastic": {"samples": 16},
        },
    )
    S2MoEForCausalLM(config).save_pretrained(directory)
    tokenizer.save(directory)


def run(config_path: str, settings: dict[str, Any], stop_at: int | None = None) -> dict[str, Any]:
    """Fine-tune on this rank; rank 1 gets a signal to stop in the given step."""
    config = load(FinetuneConfig, config_path, [f"{key}={value}" for key, value in settings.items()])
    rank, world = dist.get_rank(), dist.get_world_size()
    catch_stop_signals()
    if stop_at is not None and rank == world - 1:
        original = runs.StopCallback.on_step_end

        def stopping(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop_at:
                os.kill(os.getpid(), signal.SIGUSR1)
            original(self, args, state, control, **kwargs)

        runs.StopCallback.on_step_end = stopping  # type: ignore[method-assign]
    try:
        result = runs.finetune(config, Processes(rank, rank, world, torch.device("cpu")))
    except (ConfigError, CorpusError) as error:
        return {"error": str(error)}
    return {"step": result.step, "results": result.results}
