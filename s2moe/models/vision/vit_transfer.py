"""A trained vision Transformer for other images and classes: V-MoE's fine-tuning.

Everything is kept but the head, which starts anew, and the tanh layer before it, which goes. Where the number of
patches changes, position embeddings are zoomed: read as a picture of the grid and interpolated (Dosovitskiy et al.
2021).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from s2moe.models.vision.vit import VMoEForImageClassification
from s2moe.models.vision.vit_config import VMoEConfig
from s2moe.parallel import ExpertParallel

POSITIONS = "embedding.positions"
NOT_RESTORED = ("head.", "representation.")


def zoom_positions(positions_1SD: Tensor, patches: int) -> Tensor:
    """Position embeddings [1, 1 + P, D] for another number of patches, [1, 1 + patches, D].

    Linear between the grid's points, its corners staying corners, as in the released code. The class token's stays.

    Raises:
        ValueError: if either number of patches is no square.
    """
    before, after = round((positions_1SD.shape[1] - 1) ** 0.5), round(patches**0.5)
    if before**2 != positions_1SD.shape[1] - 1 or after**2 != patches:
        raise ValueError(f"{positions_1SD.shape[1] - 1} and {patches} patches: both must be squares")
    if before == after:
        return positions_1SD
    class_11D, grid_1PD = positions_1SD[:, :1], positions_1SD[:, 1:]
    grid_1DHW = grid_1PD.transpose(1, 2).unflatten(2, (before, before))
    zoomed_1DHW = F.interpolate(grid_1DHW, (after, after), mode="bilinear", align_corners=True)
    return F.pad(zoomed_1DHW.flatten(2).transpose(1, 2), (0, 0, 1, 0)) + F.pad(class_11D, (0, 0, 0, patches))


def transferred_config(config: VMoEConfig, **changes: Any) -> VMoEConfig:
    """The configuration with other images, classes or any other field, by default without the tanh layer."""
    given = {"representation_size": None, **changes}
    return type(config)(**{**config.to_dict(), **given})


def transferred_state(state: dict[str, Tensor], config: VMoEConfig) -> dict[str, Tensor]:
    """What a model of ``config`` takes over of a trained model's ``state``: all but head and tanh layer."""
    kept = {name: value for name, value in state.items() if not name.startswith(NOT_RESTORED)}
    kept[POSITIONS] = zoom_positions(kept[POSITIONS], config.patches)
    return kept


def transfer(
    source: VMoEForImageClassification, parallel: ExpertParallel | None = None, **changes: Any
) -> VMoEForImageClassification:
    """A new model that begins where ``source`` ended, say ``transfer(model, image_size=56, num_classes=100)``.

    Args:
        parallel: where the new model's experts live: as the source's.
        changes: fields of the configuration.

    Raises:
        ValueError: if the changes need weights that the source has not, or of other shapes.
    """
    config = transferred_config(source.config, **changes)
    model = VMoEForImageClassification(config, parallel)
    try:
        missing, unexpected = model.load_state_dict(transferred_state(source.state_dict(), config), strict=False)
    except RuntimeError as error:
        raise ValueError(f"the model cannot be transferred with {', '.join(changes)}: {error}") from error
    wrong = [name for name in missing if not name.startswith(NOT_RESTORED)] + list(unexpected)
    if wrong:
        raise ValueError(f"the model cannot be transferred with {', '.join(changes)}: weights differ: {wrong}")
    return model
