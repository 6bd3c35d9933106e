"""GPUs and the links between them, as the cost model needs them.

Peak FLOP/s come from training/hardware.py. Memory is what nvidia-smi shows; bandwidths are the vendors' figures,
of one direction, a GPU's share. What of them collectives and kernels reach is in cost.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from s2moe.config.options import ConfigError
from s2moe.options import nearest
from s2moe.training.hardware import peak_flops_of


@dataclass(frozen=True)
class Machine:
    """A GPU in a machine of a cluster. Bytes, bytes per second, FLOP/s, seconds."""

    name: str
    device: str  # part of the device's name, as training/hardware.py and benchmark results have it
    memory: float
    memory_bandwidth: float
    link: float  # to the other GPUs of its machine
    network: float  # to other machines
    peaks: tuple[float, float] | None = None  # half precision and fp32, where hardware.py does not know the device
    link_latency: float = 4e-6  # of a collective's message within the machine
    network_latency: float = 12e-6
    host_seconds_per_layer: float = 1.5e-3  # to queue a layer's kernels, forward and backward, from Python

    def peak(self, precision: str) -> float:
        """FLOP/s of dense matrix products."""
        if self.peaks is not None:
            return self.peaks[1] if precision == "fp32" else self.peaks[0]
        peak = peak_flops_of(self.device, precision)
        assert peak is not None
        return peak


GIB = 2**30
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("h100", "H100", 79.6 * GIB, 3.35e12, 450e9, 50e9),
        Machine("h200", "H200", 140.4 * GIB, 4.8e12, 450e9, 50e9),
        Machine("b200", "B200", 179.0 * GIB, 8.0e12, 900e9, 50e9),
        Machine("gh200", "GH200", 95.6 * GIB, 4.0e12, 450e9, 50e9),
        Machine("a100-80", "A100", 79.3 * GIB, 2.04e12, 300e9, 25e9),
        Machine("a100-40", "A100", 39.6 * GIB, 1.56e12, 300e9, 25e9),
        Machine("l40s", "L40S", 44.7 * GIB, 0.86e12, 25e9, 12.5e9),
        # Processes with one core of a server's CPU each; the speed is calibrated, see calibration.py.
        Machine("cpu", "CPU", 8.0 * GIB, 10e9, 2e9, 1e9, (30e9, 30e9), 200e-6, 400e-6, 0.0),
    )
}


def machine(name: str, memory_gib: float | None = None, network_gbit: float | None = None) -> Machine:
    """The machine called `name`, with another size of memory or speed of its network where given.

    Raises:
        ConfigError: unknown.
    """
    if name not in MACHINES:
        raise ConfigError(f"--gpu: unknown {name!r}{nearest(name, MACHINES)}; known: {', '.join(MACHINES)}")
    found = MACHINES[name]
    if memory_gib is not None:
        found = replace(found, memory=memory_gib * GIB)
    if network_gbit is not None:
        found = replace(found, network=network_gbit * 1e9 / 8)
    return found
