"""What s2moe/parallel/deepspeed_compat relies on inside DeepSpeed, checked against the installed release."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from s2moe.parallel import deepspeed_compat
from s2moe.parallel.deepspeed_compat import release
from tests.distributed import jobs
from tests.distributed_harness import run_distributed

pytestmark = pytest.mark.distributed


def test_an_untried_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release.deepspeed, "__version__", "0.99.0")
    with pytest.raises(RuntimeError, match=re.escape("pip install deepspeed==0.19.8")):
        deepspeed_compat.check_version()


def test_a_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "deepspeed", None)
    with pytest.raises(RuntimeError, match="pip install deepspeed"):
        deepspeed_compat.check_version()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_engine_takes_our_layers_for_its_own(tmp_path: Path, stage: int) -> None:
    found: list[dict[str, Any]] = run_distributed(jobs.engine_view, 2, stage, str(tmp_path))
    for rank, view in enumerate(found):
        assert view["has_moe_layers"]
        assert view["num_experts"] == [4, 4]
        assert view["expert_names"] == {f"model.layers.{i}.moe.experts.w{j}" for i in (0, 1) for j in (1, 2, 3)}
        assert view["groups"] == {"ep_size_2": [rank % 2]}
    files = {path.name for path in (tmp_path / "tag").iterdir()}
    experts = {f"layer_{i}_expert_{e}_mp_rank_00_model_states.pt" for i in (0, 1) for e in range(4)}
    assert experts <= files if stage < 3 else not experts & files  # ZeRO-3 keeps experts in its own shards
