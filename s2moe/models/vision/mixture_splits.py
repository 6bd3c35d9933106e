"""Preset splits of the classes among experts (Krishnamurthy et al. 2023, section 4.2), and how they are written.

A split is text: experts separated by commas, an expert's classes by hyphens, "0-7,1-9,2-4,3-8,5-6".
"""

from __future__ import annotations

MNIST_SPLITS = (
    "0-7,1-9,2-4,3-8,5-6",
    "4-6,1-7,2-9,3-8,0-5",
    "4-7,0-6,3-8,1-2,5-9",
    "5-8,6-9,1-3,0-2,4-7",
    "2-8,3-6,0-5,4-7,1-9",
)
# Of FashionMNIST's classes 0-5 and MNIST's digits 4-9, which follow as classes 6-11.
FMNIST_MNIST_SPLITS = (
    "0-1,2-3,4-5,6-7,8-9,10-11",
    "0-3,1-4,2-5,6-9,7-11,8-10",
    "0-5,1-2,3-4,6-8,7-10,9-11",
)


def owners(split: str, classes: int, experts: int) -> list[int]:
    """The expert that each class belongs to.

    Raises:
        ValueError: unless every class belongs to exactly one of the experts, and no expert goes without.
    """
    try:
        parts = [[int(name) for name in part.split("-")] for part in split.split(",")]
    except ValueError:
        raise ValueError(f"preset_split: expected classes as in {MNIST_SPLITS[0]!r}, got {split!r}") from None
    if len(parts) != experts:
        raise ValueError(f"preset_split: {split!r} is for {len(parts)} experts, num_experts is {experts}")
    if sorted(name for part in parts for name in part) != list(range(classes)):
        raise ValueError(f"preset_split: {split!r} does not give each of the classes 0 to {classes - 1} to one expert")
    return [next(expert for expert, part in enumerate(parts) if name in part) for name in range(classes)]
