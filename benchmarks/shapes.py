"""The sizes at which layers are timed."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One sparse mixture-of-experts layer and the tokens that go through it at once."""

    tokens: int
    hidden_size: int
    expert_hidden: int
    num_experts: int
    experts_per_token: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``T,D,F,E,K`` as in ``4096,256,512,16,2``.

        Raises:
            ValueError: if it is not five positive integers with 2 ≤ E and K ≤ E.
        """
        try:
            shape = cls(*(int(part) for part in text.split(",")))
        except (TypeError, ValueError):
            raise ValueError(f"a shape is five integers T,D,F,E,K such as 4096,256,512,16,2, not {text!r}") from None
        if min(shape) < 1 or shape.num_experts < 2 or shape.experts_per_token > shape.num_experts:
            raise ValueError(f"a shape needs T, D, F, K of at least 1, E of at least 2, and K within E, not {text!r}")
        return shape

    def __str__(self) -> str:
        """``T 4096  D 256  F 512  E 16  k 2``."""
        return "  ".join(f"{name} {value}" for name, value in zip("TDFEk", self, strict=True))


# Those for which docs and issues quote figures.
QUICK = (
    Shape(4096, 256, 512, 16, 2),
    Shape(4096, 512, 1024, 8, 2),
    Shape(4096, 256, 256, 64, 8),
    Shape(8192, 256, 512, 16, 1),
)

# Tokens 4k to 32k, experts 8, 16 and 64, k 1, 2 and 8.
FULL = (
    *QUICK,
    Shape(16384, 256, 512, 16, 2),
    Shape(32768, 256, 256, 8, 1),
    Shape(32768, 256, 512, 16, 2),
    Shape(8192, 256, 256, 64, 8),
    Shape(4096, 256, 512, 64, 1),
    Shape(16384, 256, 512, 64, 2),
    Shape(8192, 256, 256, 16, 8),
    Shape(32768, 256, 128, 64, 8),
)
