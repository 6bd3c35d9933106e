"""Read a checkpoint of the Trainer or of accelerate: nothing in it is executed, and a damaged one is one error.

transformers reads its own files with care, but hands DeepSpeed's to DeepSpeed, which asks torch for
``weights_only=False``; so does accelerate for objects that a loop registered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import transformers.trainer
from transformers import Trainer, TrainerState

from s2moe.config.options import ConfigError
from s2moe.parallel import deepspeed_compat
from s2moe.training.errors import ProcessError

Base: Any = Trainer if TYPE_CHECKING else object  # what the mixin is mixed into
STATE_FILE = "trainer_state.json"
_WHOLE = "deepspeed_load_checkpoint"  # in transformers.trainer: DeepSpeed's part of a checkpoint


@contextlib.contextmanager
def reading(checkpoint: str | Path | None) -> Iterator[None]:
    """Within it, files of a checkpoint are read and none executes anything.

    Raises:
        ProcessError: on the process that reads it, naming the file, or the checkpoint and what is wrong with it.
    """
    try:
        with deepspeed_compat.safe_loading(mmap=False):
            yield
    except ConfigError:
        raise
    except deepspeed_compat.CheckpointFileError as error:
        raise ProcessError(f"{error}. Continue from another checkpoint, or remove this one") from error
    except (
        Exception
    ) as error:  # of json, safetensors, DeepSpeed or torch, whose load_state_dict finds what does not fit
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ProcessError(
            f"{checkpoint} cannot be continued from, it is damaged or of another model ({told}): take another "
            "checkpoint, or remove this one"
        ) from error


class SafeReading(Base):
    """For a Trainer class: whatever it reads of checkpoints, it reads within `reading`."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's.

        Raises:
            ProcessError: the checkpoint cannot be read, or would run code.
        """
        if isinstance(resume_from_checkpoint, str):
            with reading(resume_from_checkpoint):
                TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE_FILE)))
        with mock.patch.object(transformers.trainer, _WHOLE, _within_reading(getattr(transformers.trainer, _WHOLE), 1)):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        with reading(self.state.best_model_checkpoint):
            super()._load_best_model()


def _within_reading(load: Callable[..., Any], place: int) -> Callable[..., Any]:
    """The same function; its argument at `place` is the checkpoint."""

    @wraps(load)
    def loading(*args: Any, **kwargs: Any) -> Any:
        with reading(args[place]):
            return load(*args, **kwargs)

    return loading
