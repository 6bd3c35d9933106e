"""Activation checkpointing of models with SMoE layers: without reentrance, which would lose their losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel as _Base
else:
    _Base = object


class WithoutReentrance(_Base):
    """Put before a ``PreTrainedModel``: its layers hand statistics on, with auxiliary losses among them."""

    def _activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True would drop the gradient of the auxiliary losses without an error, since it "
                "does not see tensors inside a layer's statistics: use use_reentrant=False, the default"
            )
        super()._activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)
