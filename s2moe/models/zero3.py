"""Building models while transformers knows that ZeRO 3 is to come, as it does once TrainingArguments say so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.integrations import deepspeed as hf_deepspeed


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Within it, transformers does not know of ZeRO 3, and initialises a model as it always does, on every process.

    With TrainingArguments(deepspeed=...) of stage 3 in scope only rank 0 would. The engine cuts the weights up later.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        config = reference() if reference is not None else None
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)
