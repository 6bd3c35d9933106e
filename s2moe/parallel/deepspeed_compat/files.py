"""Reading a checkpoint's files without running anything that is in them, and loading one of the same shape.

``load_file`` is the one reader of pickles in checkpoints, whoever wrote them: DeepSpeed, transformers' Trainer or
accelerate. Their own code reads through it within ``safe_loading``.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch


class CheckpointFileError(RuntimeError):
    """A file is no checkpoint file, or would run code that a checkpoint has no use for."""


def _plain_classes() -> list[Any]:
    """What checkpoint files hold besides tensors, numbers and containers. None does anything when made.

    DeepSpeed's own classes, and for the states of random generators numpy's arrays.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    arrays = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]  # type: ignore[attr-defined]
    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, torch.torch_version.TorchVersion, *arrays]


def load_file(path: Path | str, mmap: bool = True) -> Any:
    """What a checkpoint file holds, on the CPU. Only tensors, containers and a few known classes are ever made.

    Args:
        mmap: read tensors when they are used, and only the part that is; the file must then stay as it is.

    Raises:
        CheckpointFileError: it would run other code, or is no file that torch.save wrote.
    """
    try:
        with torch.serialization.safe_globals(_plain_classes()):
            return _torch_load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # arbitrary bytes bring an unpickler to errors of every kind
        text = " ".join(str(error).split())
        told = (text.partition("WeightsUnpickler error: ")[2] or text).partition(" Please use ")[0][:200]
        raise CheckpointFileError(f"{path} is not loaded, as it is not a plain checkpoint file: {told}") from error


_torch_load = torch.load


@contextlib.contextmanager
def safe_loading(mmap: bool, progress: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within it, torch.load is ``load_file``, whatever its caller asks for, and ``progress`` is called for each file.

    DeepSpeed asks for ``weights_only=False`` everywhere, accelerate in one place.
    """
    save = torch.save

    def loading(path: Any, map_location: Any = None, **_: Any) -> Any:
        progress()
        return load_file(path, mmap)

    def saving(value: Any, path: Any, **options: Any) -> None:
        temporary = f"{path}.tmp"  # never into a file that is being read through memory
        save(value, temporary, **options)
        os.replace(temporary, path)
        progress()

    with mock.patch.object(torch, "load", loading), mock.patch.object(torch, "save", saving):
        yield


@contextlib.contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """A path to the same directory without characters that DeepSpeed, for want of escaping, takes for patterns."""
    if re.fullmatch(r"[\w./=,:@%~ -]*", str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="s2moe-") as folder:
        link = Path(folder, "checkpoint")
        link.symlink_to(path.resolve(), target_is_directory=True)
        yield link


def load_checkpoint(engine: Any, path: Path) -> None:
    """Load a checkpoint that an engine of the same shape wrote. Collective.

    Options of the optimizer and clipping stay those that the engine was built with; DeepSpeed would bring back the
    saved ones.
    """
    with plain_path(path) as plain, safe_loading(mmap=False), keeping_settings(engine):
        loaded, _ = engine.load_checkpoint(str(plain.parent), tag=plain.name)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load the checkpoint {path}")


@contextlib.contextmanager
def keeping_settings(engine: Any) -> Iterator[None]:
    """Within it, loading does not change what the engine was built with: options of the optimizer and clipping."""
    options = [
        {name: value for name, value in group.items() if name != "params"} for group in engine.optimizer.param_groups
    ]
    clip = getattr(engine.optimizer, "clip_grad", None)
    yield
    for group, values in zip(engine.optimizer.param_groups, options, strict=True):
        group.update(values)
    if clip is not None:
        engine.optimizer.clip_grad = clip
