"""`accelerate launch` with the script of docs/huggingface.md: two processes come to what one computes for both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2moe import S2MoEForCausalLM
from s2moe.moe.routing import RoutingContext
from tests.models.decoder import tiny
from tests.pages import blocks


def reference(model: S2MoEForCausalLM) -> list[float]:
    """The script's training with both processes' batches in one process; the first one's losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts = torch.randint(256, (64, 32), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(8):
        routing = []
        for rank in range(2):
            ids = texts[8 * step + 4 * rank :][:4]
            context = RoutingContext(seed=1, step=step, steps=8, microbatch=rank)
            output = model(input_ids=ids, labels=ids, context=context)
            (output.loss / 2).backward()
            routing.append(output.routing)
            losses += [output.loss.item()] if rank == 0 else []
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers(routing)
    return losses


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("method", ["s2moe", "loss_free"])
def test_the_page_s_script_on_two_processes(tmp_path: Path, method: str) -> None:
    (script,) = [block for block in blocks("docs/huggingface.md") if "Accelerator()" in block]
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    torch.manual_seed(2)
    model = tiny(method, {"balance_loss": 0.0}, vocab_size=256)  # which counts both processes' loads in one product
    model.save_pretrained(tmp_path / "runs" / "quickstart" / "hf")
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    outside = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*command, "train.py"],
        cwd=tmp_path,
        env=outside | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"process 0 of (\d), step (\d): ([\d.]+)", done.stdout)
    assert [(int(world), int(step)) for world, step, _ in printed] == [(2, step) for step in range(8)]
    losses = reference(model)
    assert [float(loss) for _, _, loss in printed] == pytest.approx(losses, abs=2e-4)
    tuned = S2MoEForCausalLM.from_pretrained(tmp_path / "tuned").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            tuned[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name} {text}"
        )
    if method == "loss_free":  # which learns from the load of both
        assert tuned["model.layers.0.moe.router.bias_E"].any()
