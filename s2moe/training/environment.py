"""What the starter of a process says in its environment, read with one-line errors.

Read are RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; inside a job step of Slurm, where
RANK and WORLD_SIZE are not set, SLURM_PROCID, SLURM_LOCALID, SLURM_NTASKS and the like in their place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from s2moe.config.options import ConfigError

LARGEST_PORT = 65535


def number(environment: Mapping[str, str], name: str, default: int | None = None, least: int = 0) -> int:
    """A variable that counts something; ``default`` where it is not set, or empty.

    Raises:
        ConfigError: it is no whole number of at least ``least``, or not set and without a default.
    """
    text = environment.get(name)
    if not text and default is not None:
        return default
    if text is None or not re.fullmatch(r"\s*[0-9]+\s*", text) or int(text) < least:
        given = "is not set" if not text else f"is {text!r}"
        raise ConfigError(f"the environment variable {name} {given}, and must be a whole number of at least {least}")
    return int(text)


def refuse_mpirun(environment: Mapping[str, str]) -> None:
    """ConfigError in a process that mpirun started among others: by itself, each would do the whole run."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if number(environment, name, 1) > 1:
            raise ConfigError(
                f"mpirun started {environment[name]} processes, and did not set RANK and WORLD_SIZE: start with "
                "torchrun, deepspeed or srun"
            )


def check_environment(environment: Mapping[str, str]) -> None:
    """ConfigError unless the variables that describe a process can be true."""
    rank, world = number(environment, "RANK"), number(environment, "WORLD_SIZE", least=1)
    number(environment, "LOCAL_RANK")
    number(environment, "LOCAL_WORLD_SIZE", 1, least=1)
    if rank >= world:
        raise ConfigError(f"the environment says RANK={rank} of WORLD_SIZE={world}: ranks are 0 to {world - 1}")
    if not environment.get("MASTER_ADDR"):
        raise ConfigError("RANK and WORLD_SIZE are set but not MASTER_ADDR, where rank 0 is: set it, or unset RANK")
    port = number(environment, "MASTER_PORT")
    if port > LARGEST_PORT:
        raise ConfigError(f"the environment variable MASTER_PORT is {port}, and ports are at most {LARGEST_PORT}")


def missing_hostfile() -> str | None:
    """The hostfile that the `deepspeed` above this process was given and did not find: it then runs here alone."""
    process = os.getppid()
    for _ in range(4):  # deepspeed's runner is the parent of its launcher, which is ours
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
            process = int(re.findall(r"^PPid:\s*(\d+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)[0])
        except (OSError, IndexError):  # another system, or it has ended
            return None
        named = hostfile_of(command)
        if named is not None:
            return None if os.path.isfile(named) else named
    return None


def hostfile_of(command: Sequence[str]) -> str | None:
    """What a command line of `deepspeed` says with -H or --hostfile."""
    if not any(os.path.basename(word) in ("deepspeed", "deepspeed.py", "ds") for word in command[:3]):
        return None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word in ("-H", "--hostfile"):
            return following
        if word.startswith("--hostfile="):
            return word.partition("=")[2]
        if word.endswith(".py") and os.path.basename(word) != "deepspeed.py":
            return None  # what follows is the program's
    return None
