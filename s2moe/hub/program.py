"""A model's inference form as one program of torch.export, with neither this package nor transformers in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel


class Logits(nn.Module):
    """Token ids and mask [B, S] to logits [B, S, V], all positions at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
def export_program(model: PreTrainedModel) -> ExportedProgram:
    """The model in evaluation, for any number of sequences and positions: ``program.module()(ids, mask)``.

    Each token's row passes through every expert and keeps its own ones' outputs, as the shapes of a program cannot
    depend on the routing; see ``s2moe/moe/expert_product.py``. ``torch.export.save`` writes it.
    """
    was_training = model.training
    ids = torch.zeros(2, 4, dtype=torch.int64, device=model.device)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        return torch.export.export(
            Logits(model.eval()),
            (ids, torch.ones_like(ids)),
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            strict=False,
        )
    finally:
        model.train(was_training)
