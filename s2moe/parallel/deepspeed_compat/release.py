"""Which release of DeepSpeed this project works with. Inference and plain PyTorch training need none."""

from __future__ import annotations

import logging

# Without a GPU DeepSpeed says at every import that it takes the CPU: no news, and noise above our own messages.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

try:
    import deepspeed
    import deepspeed.checkpoint.autoep_affine
    import deepspeed.module_inject.auto_ep_layer
except ImportError:  # there is none, or one from before its expert parallelism
    deepspeed = None

TRIED_VERSIONS = ("0.19.8",)


def check_version() -> None:
    """Raise RuntimeError unless DeepSpeed is installed in a release that was tried."""
    if deepspeed is None:
        raise RuntimeError(f"training on the DeepSpeed engine needs it: pip install deepspeed=={TRIED_VERSIONS[-1]}")
    if deepspeed.__version__ not in TRIED_VERSIONS:
        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} was never tried with this project, which relies on its inside, "
            f"and a mismatch can train wrongly without an error: pip install deepspeed=={TRIED_VERSIONS[-1]}"
        )
