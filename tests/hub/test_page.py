"""docs/huggingface.md: its Python runs, top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from s2moe.data import ByteTokenizer
from s2moe.hub import save_tokenizer
from tests.models.decoder import tiny
from tests.pages import blocks


def test_the_page_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hf = tmp_path / "runs" / "quickstart" / "hf"
    tiny("s2moe", vocab_size=256).save_pretrained(hf)
    save_tokenizer(ByteTokenizer(), hf)
    page = "docs/huggingface.md"
    names: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    assert (tmp_path / "model.pt2").is_file()
    assert (tmp_path / "mixtral" / "config.json").is_file()
    assert isinstance(names["logits"], torch.Tensor)
