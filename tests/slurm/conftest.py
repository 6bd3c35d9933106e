"""The cluster, started once for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"needs Slurm, and {', '.join(missing)} is not installed (Debian: apt-get install slurm-wlm)")
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
