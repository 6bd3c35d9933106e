"""The plan's memory against real allocation: what autograd saves, peaks, and what DeepSpeed's engine holds.

Tolerances: state of the parameters 1 %, what is kept for the backward pass 6 %, the peak of forward and backward
15 % (work space of single operations comes and goes), buffers 1 %.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.config import load
from s2moe.config.run import RunConfig
from s2moe.models.sizes import model_sizes
from s2moe.moe.methods import METHODS
from s2moe.planning import memory as planned_memory
from s2moe.planning.activations import MicroBatch, activations
from tests.distributed_harness import run_distributed

from .jobs import VOCABULARY, peak_bytes, saved_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
SEQUENCES, LENGTH = 2, 256
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"moe": {"method": "smoe", "first_dense": 3}},
    "dense_mlp": {"moe": {"method": "smoe", "first_dense": 3, "expert_form": "mlp"}},
    "grouped_queries": {"moe": {"method": "smoe"}, "num_key_value_heads": 1},
    "smoe": {"moe": {"method": "smoe"}},
    "smoe_mlp": {"moe": {"method": "smoe", "expert_form": "mlp"}},
    "shared": {"moe": {"method": "smoe", "shared_experts": 2, "every": 2}},
    "dropout": {"moe": {"method": "smoe"}, "hidden_dropout": 0.1},
    "s2moe": {"moe": {"method": "s2moe", "experts_per_token": 2}},
    "large_vocabulary": {"moe": {"method": "smoe"}, "vocab_size": 4096},
}
# Where the kept assignments are fewer than k, the estimate is what they can be: a schedule of k, a random second
# expert, a capacity, and competitions that this step did not hold.
UPPER_BOUNDS = {"smoe_dropout", "gshard", "switch", "vmoe", "compete_smoe"}
# Auxiliary objectives keep samples that do not grow with the tokens and are not counted.
SAMPLES = {"simsmoe": 0.5, "snnl_smoe": 0.8, "similarity_aware": 0.8, "attention_aware": 0.8}


def build(precision: str = "fp32", checkpointing: bool = False, **options: Any) -> tuple[S2MoEConfig, S2MoEForCausalLM]:
    sizes = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    moe = {"num_experts": 8, "expert_hidden": 256, **options.pop("moe")}
    config = S2MoEConfig(**{**sizes, "intermediate_size": 512, **options, "moe": moe})
    model = S2MoEForCausalLM(config)
    if precision == "bf16":
        model = model.bfloat16()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return config, model.train()


def kept(config: S2MoEConfig, precision: str = "fp32", checkpointing: bool = False) -> float:
    """What autograd's hooks can see of the estimate: with the log-softmax, without the indices that layers hold."""
    found = activations(config, MicroBatch(SEQUENCES, LENGTH, precision, fused=False, checkpointing=checkpointing))
    return found.kept + SEQUENCES * LENGTH * config.vocab_size * 4


def draw(config: S2MoEConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (SEQUENCES, LENGTH + 1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_for_the_backward_pass(name: str, precision: str) -> None:
    config, model = build(precision, **MODELS[name])
    assert kept(config, precision) == pytest.approx(saved_bytes(model, draw(config)), rel=0.06)


@pytest.mark.parametrize("name", ["dense", "s2moe"])
def test_what_is_kept_with_activation_checkpointing(name: str) -> None:
    config, model = build(checkpointing=True, **MODELS[name])
    assert kept(config, checkpointing=True) == pytest.approx(saved_bytes(model, draw(config)), rel=0.06)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    config, model = build(moe={"method": method})
    ratio = kept(config) / saved_bytes(model, draw(config))
    if method in UPPER_BOUNDS:
        assert 1.0 <= ratio < 2.5
    else:
        assert SAMPLES.get(method, 0.94) <= ratio <= 1.06


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["dense", "smoe", "s2moe", "large_vocabulary"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_forward_and_backward(name: str, precision: str, checkpointing: bool) -> None:
    config, model = build(precision, checkpointing, **MODELS[name])
    found = activations(config, MicroBatch(SEQUENCES, LENGTH, precision, fused=False, checkpointing=checkpointing))
    assert found.largest == pytest.approx(peak_bytes(model, draw(config)), rel=0.15)


def test_fused_kernels_keep_what_autograd_saves_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """grouped_mm runs on the CPU too: what it adds to the loop's rows is what the estimate of a GPU adds."""
    from s2moe.moe import expert_product

    for form in ("gated", "mlp"):
        config, model = build(moe={"method": "smoe", "expert_form": form})
        tokens = draw(config)
        loop = saved_bytes(model, tokens)
        with monkeypatch.context() as patch:
            patch.setattr(expert_product, "has_grouped_kernel", lambda rows: True)
            grouped = saved_bytes(model, tokens)
        fused, unfused = (activations(config, MicroBatch(SEQUENCES, LENGTH, "fp32", fused=f)) for f in (True, False))
        assert fused.experts - unfused.experts == pytest.approx(grouped - loop, rel=0.05)


def test_dispatch_grows_with_imbalance() -> None:
    config = S2MoEConfig(moe={"method": "smoe", "num_experts": 8})
    even, uneven = (
        activations(config, MicroBatch(4, 128, "bf16", expert_parallel=4, imbalance=ratio)) for ratio in (1.0, 1.5)
    )
    assert uneven.experts == pytest.approx(1.5 * even.experts)
    assert even.dispatch < uneven.dispatch < 1.5 * even.dispatch
    alone = activations(config, MicroBatch(4, 128, "bf16", imbalance=1.5))
    assert alone == activations(config, MicroBatch(4, 128, "bf16"))


def settings(directory: Path, *shape: str) -> tuple[str, list[str]]:
    from tests.training.jobs import tiny_run

    path, common = tiny_run(directory)
    large = ("model.hidden_size=256", "model.moe.expert_hidden=512", "model.moe.num_experts=8")
    return path, [*common, *large, "training.micro_batch=1", "model.hidden_dropout=0", *shape]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "degree", "precision"),
    [
        (1, 2, "bf16"),
        pytest.param(1, 1, "fp32", marks=pytest.mark.slow),
        pytest.param(1, 2, "fp32", marks=pytest.mark.slow),
        pytest.param(2, 1, "fp32", marks=pytest.mark.slow),
        pytest.param(2, 2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, 1, "bf16", marks=pytest.mark.slow),
        pytest.param(3, 2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, 2, "fp32", marks=pytest.mark.slow),
    ],
)
def test_state_and_buffers_of_the_engine(tmp_path: Path, stage: int, degree: int, precision: str) -> None:
    shape = (f"training.zero_stage={stage}", f"training.expert_parallel={degree}", f"training.precision={precision}")
    path, overrides = settings(tmp_path, *shape)
    found = run_distributed("tests.planning.jobs:engine_memory", 2, path, overrides, timeout=280)[0]
    config = load(RunConfig, path, overrides)
    model = config.model_config(VOCABULARY)
    sizes = model_sizes(model)
    plan = planned_memory.memory(config, model, sizes, 2, 1.0, on_gpu=False)
    assert found["weights"] == pytest.approx(plan.weights, rel=0.01)
    assert found["optimizer"] == pytest.approx(plan.optimizer, rel=0.01)
    # What ZeRO 3 gathers comes and goes with the layers.
    bucket = plan.buffers - (planned_memory.gathered(sizes, degree, precision) if stage == 3 else 0)
    assert found["buffers"] == pytest.approx(bucket, rel=0.01, abs=1)
    # ZeRO 1 in fp32 adds up all gradients, which is counted, and after the last backward holds only its share.
    gradients = 4 * sizes.total / 2 if (stage, precision) == (1, "fp32") else plan.gradients
    assert found["gradients"] == pytest.approx(gradients, rel=0.03)
