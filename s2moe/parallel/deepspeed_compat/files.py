"""Reading a checkpoint's files without running anything that is in them, and loading one of the same shape."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch


class CheckpointFileError(RuntimeError):
    """A file is no checkpoint file, or would run code that a checkpoint has no use for."""


def _plain_classes() -> list[Any]:
    """What DeepSpeed's checkpoint files hold besides tensors, numbers and containers. None does anything when made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, torch.torch_version.TorchVersion]


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
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        told = " ".join(str(error).split())[-300:]
        raise CheckpointFileError(f"{path} is not loaded, as it is not a plain checkpoint file: {told}") from error


_torch_load = torch.load


@contextlib.contextmanager
def safe_loading(mmap: bool, progress: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within it, DeepSpeed reads and writes files as ``load_file`` does and says after each that it goes on.

    It asks for ``weights_only=False`` everywhere itself.
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
