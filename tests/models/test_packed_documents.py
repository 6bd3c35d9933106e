"""Several documents packed into one row, told apart by their positions: none sees another, whatever the router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from s2moe import S2MoEConfig, S2MoEForCausalLM
from s2moe.moe.routers import ROUTERS

CASES: list[tuple[str, dict[str, Any]]] = [
    ("similarity_aware", {}),
    ("similarity_aware", {"window": 3, "chunk": 4}),
    ("attention_aware", {}),
    ("stablemoe", {"distilled": "word"}),
    ("stablemoe", {"distilled": "bigram"}),
    ("stablemoe", {"distilled": "cnn"}),
    ("s2moe", {}),
]
FIRST, SECOND = 12, 10
POSITIONS = torch.cat((torch.arange(FIRST), torch.arange(SECOND)))[None]


def ids(seed: int, length: int) -> Tensor:
    return torch.randint(64, (1, length), generator=torch.Generator().manual_seed(seed))


def test_every_router_that_looks_back_is_tried() -> None:
    looks_back = {name for name, router in ROUTERS.items() if router.wants_attention or router.keeps_history}
    assert looks_back <= {method for method, _ in CASES}


@pytest.mark.parametrize(("method", "router"), CASES)
def test_a_document_is_read_as_if_it_were_alone(method: str, router: dict[str, Any]) -> None:
    torch.manual_seed(1)
    moe = {"method": method, "num_experts": 4, "expert_hidden": 16, "router": router}
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = S2MoEForCausalLM(S2MoEConfig(**sizes, moe=moe)).double().eval()
    second, read = ids(3, SECOND), {}
    with torch.no_grad():
        for weight in model.parameters():  # such that documents that leak change what is routed where
            weight.add_(0.05 * torch.randn(weight.shape, dtype=weight.dtype))
        alone = model(second, use_cache=False).logits
        for positions in (POSITIONS, None):
            rows = [torch.cat((ids(seed, FIRST), second), 1) for seed in (1, 2)]
            read[positions is None] = [model(row, position_ids=positions, use_cache=False).logits for row in rows]
    for logits in read[False]:
        torch.testing.assert_close(logits[:, FIRST:], alone, rtol=1e-9, atol=1e-9)
    assert (read[True][0] - read[True][1])[:, FIRST:].abs().max() > 1e-6  # without positions it is one document
