"""A loop of one's own under `accelerate launch` with DeepSpeed: docs/finetuning.md's script, on two processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s2moe import S2MoEForSequenceClassification
from s2moe.data import ByteTokenizer
from s2moe.data.classification import Examples
from s2moe.data.encoding import EncodedTexts, collate
from s2moe.finetuning.loading import load_pretrained
from s2moe.finetuning.optimizer import parameter_groups
from s2moe.finetuning.trainer import COMPLETE
from s2moe.moe.routing import RoutingContext
from tests.distributed_harness import run_distributed
from tests.models.decoder import tiny
from tests.pages import blocks

from .accelerated_jobs import REFUSED, adapter_run, refusals
from .trainer_jobs import pretrained, weights

pytestmark = pytest.mark.distributed

Figures = list[tuple[int, float, float]]  # step, loss, gradient norm
Run = Callable[[int, int], Figures]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Starts the script in tmp_path, which has a pre-trained model with selection biases."""
    torch.manual_seed(2)
    tiny("loss_free", {"balance_loss": 0.0}, vocab_size=256).save_pretrained(tmp_path / "runs" / "quickstart" / "hf")
    (script,) = [block for block in blocks("docs/finetuning.md") if "Accelerator()" in block]
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    outside = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = outside | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def start(degree: int, stage: int) -> Figures:
        source = script.replace("expert_parallel(2)", f"expert_parallel({degree})")
        (tmp_path / "train.py").write_text(source, encoding="utf-8")
        command = [*launcher, "--use_deepspeed", "--zero_stage", str(stage), "train.py"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        printed = re.findall(r"step (\d+): loss ([\d.]+), gradient norm ([\d.]+)", done.stdout)
        return [(int(step), float(loss), float(norm)) for step, loss, norm in printed]

    return start


def reference(directory: Path) -> tuple[Figures, dict[str, Tensor]]:
    """The script's training with both processes' batches in one process: the first one's losses, and the weights."""
    torch.manual_seed(1)
    source = directory / "runs" / "quickstart" / "hf"
    model = load_pretrained(S2MoEForSequenceClassification, source, changes={"num_labels": 2}).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.1))
    texts = Examples(["a fine film", "a superb cast", "a dull plot", "an awful bore"] * 16, [1, 1, 0, 0] * 16)
    rows = list(EncodedTexts(texts, ByteTokenizer(), length=64))
    figures = []
    for step in range(8):
        routing, losses = [], []
        for rank in range(2):
            batch = collate(rows[8 * step + 4 * rank :][:4])
            output = model(**batch, context=RoutingContext(seed=1, step=step, steps=8, microbatch=rank))
            (output.loss / 2).backward()
            routing.append(output.routing)
            losses.append(output.loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers(routing)
        figures.append((step, losses[0], norm.item()))
    return figures, model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(("degree", "stage"), [(1, 2), (2, 2), (2, 3)])
def test_two_processes_equal_one_and_continue(run: Run, tmp_path: Path, degree: int, stage: int) -> None:
    """Losses, norms (in which the routers' gradients are) and weights of all experts; a state continues to the bit."""
    whole = run(degree, stage)
    expected, expected_weights = reference(tmp_path)
    assert [step for step, _, _ in whole] == list(range(8))
    for found, wanted in zip(whole, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=2e-4)
    tuned = weights(tmp_path / "tuned")
    for name, value in tuned.items():
        torch.testing.assert_close(value, expected_weights[name], rtol=1e-3, atol=5e-5, msg=name)
    assert S2MoEForSequenceClassification.from_pretrained(tmp_path / "tuned").model.layers[0].moe.router.bias_E.any()

    shutil.rmtree(tmp_path / "tuned")
    (tmp_path / "states" / "state-8" / COMPLETE).unlink()  # as if it was killed while it wrote it
    assert run(degree, stage) == whole[4:]
    assert all(value.equal(tuned[name]) for name, value in weights(tmp_path / "tuned").items())


def test_what_would_go_wrong_is_refused(tmp_path: Path) -> None:
    source = pretrained(tmp_path / "source")
    for found in run_distributed(refusals, 2, str(source), str(tmp_path)):
        assert found.keys() == REFUSED.keys()
        for name, message in REFUSED.items():
            assert message in found[name], name


def test_adapters(tmp_path: Path) -> None:
    """Of the attention they train, with half of the experts on each rank; of experts they are refused."""
    source = str(pretrained(tmp_path / "source"))
    first, second = run_distributed(adapter_run, 2, source, False)
    assert first == second
    assert first[-1] < first[0]
    for said in run_distributed(adapter_run, 2, source, True):
        assert "LoRA on experts" in said
