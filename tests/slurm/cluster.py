"""A Slurm cluster of two nodes on this machine, with its own ports and in a directory of its own.

Both nodes are this machine under the loopback addresses 127.0.0.1 and 127.0.0.2: those are their names
too, so that a job finds the first node of its allocation as it would find a host.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))  # Debian has the daemons there
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=1
KillWait=30
MinJobAge=3600
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=1000
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.2 Port={second} CPUs=4 RealMemory=1000
PartitionName=main Nodes=127.0.0.[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Those of Slurm's programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """Use as a context: the daemons run within it, and no job is left behind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        controller, first, second = _free_ports(3)
        (directory / "state").mkdir()
        self._configuration = directory / "slurm.conf"
        self._configuration.write_text(
            CONFIGURATION.format(
                host=socket.gethostname(),
                user=getpass.getuser(),
                directory=directory,
                controller=controller,
                first=first,
                second=second,
            )
        )
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "S2MOE"))}
        self.environment = inherited | {
            "PATH": PATH,
            "SLURM_CONF": str(self._configuration),
            "S2MOE_ROOT": str(REPOSITORY),
            "S2MOE_SITE": "/dev/null",
            "S2MOE_PYTHON": sys.executable,
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start("slurmctld")
            for node in NODES:
                self.start_node(node)
            self.wait(lambda: self._idle() == len(NODES), 60, "both nodes to be idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired, AssertionError):
            self.run("scancel", f"--user={getpass.getuser()}")
            self.wait(lambda: not self.run("squeue", "--noheader").strip(), 60, "the jobs to end")
        for node in NODES:
            self.kill_node(node)
        for daemon in self._daemons.values():
            daemon.terminate()
            daemon.wait(30)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._start("slurmd", "-N", node, key=node)

    def kill_node(self, node: str) -> None:
        """What a power cut does: the node's daemon and everything that it started are gone at once."""
        marks = [f"{name}={node}".encode() for name in ("SLURMD_NODENAME", "TEST_NODE")]
        ours = f"SLURM_CONF={self._configuration}".encode()
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                variables = (process / "environ").read_bytes().split(b"\0")
                if ours in variables and any(mark in variables for mark in marks):
                    os.kill(int(process.name), signal.SIGKILL)
        daemon = self._daemons.pop(node, None)
        if daemon is not None:
            daemon.wait(30)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """The output of one of Slurm's programs."""
        return subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    def submit(self, directory: Path, script: str, options: list[str], arguments: list[str]) -> str:
        """Submit slurm/SCRIPT from `directory`; the job's number."""
        path = str(REPOSITORY / "slurm" / script)
        return self.run("sbatch", "--parsable", *options, path, *arguments, cwd=directory).strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", number)))

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until `condition` holds; fails with the logs of the daemons."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                tails = "\n".join(
                    f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                    for log in sorted(self.directory.glob("*.log"))
                )
                raise AssertionError(f"waited {seconds:g} s for {what}\n{tails}")
            time.sleep(0.2)

    def wait_for_end(self, number: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job (or all elements of an array) is over; its last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.job(number)["JobState"] in over, seconds, f"job {number} to end: {self.job(number)}")
        return self.job(number)

    def _start(self, program: str, *arguments: str, key: str = "controller") -> None:
        path = shutil.which(program, path=PATH)
        assert path is not None
        with open(self.directory / f"{key}.out", "ab") as output:
            self._daemons[key] = subprocess.Popen(
                [path, "-D", "-f", str(self._configuration), *arguments],
                env=self.environment | {"TEST_NODE": key},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )

    def _idle(self) -> int:
        with contextlib.suppress(subprocess.CalledProcessError):
            return self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N %t").count(" idle\n")
        return 0


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.socket()) for _ in range(number)]
        for server in servers:
            server.bind(("", 0))
        return [server.getsockname()[1] for server in servers]
