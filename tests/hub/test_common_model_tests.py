"""transformers' own common model tests, from the source distribution of the installed version, on our models.

Those for `generate` are not in it: see test_generation.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[2]
NOT_IN_THE_DISTRIBUTION = {  # what test_modeling_common.py imports beside itself
    "exporters/test_export.py": "class ExportTesterMixin: pass",
    "generation/test_utils.py": "class GenerationTesterMixin: pass",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}",
}
# The first wants the mixin for `generate`, which is not there; test_generation.py has what it checks. The second wants
# reentrant checkpointing, which our models refuse, since it would lose the auxiliary losses' gradient.
LEFT_OUT = (
    "not test_generation_tester_mixin_inheritance and not test_training_gradient_checkpointing_use_reentrant_true"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package transformers_tests."""
    directory = tmp_path_factory.mktemp("transformers")
    name = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    done = subprocess.run([*command, "-q", "-d", directory, name], capture_output=True, text=True, check=False)
    found = list(directory.glob("*.tar.gz"))
    if not found:
        pytest.skip(f"the source distribution of {name} could not be downloaded: {done.stderr[-300:]}")
    with tarfile.open(found[0]) as archive:
        for member in archive.getmembers():
            if re.fullmatch(r"[^/]+/tests/test_(modeling|configuration)_common\.py", member.name):
                member.name = f"transformers_tests/{Path(member.name).name}"
                archive.extract(member, directory, filter="data")
    for path, source in NOT_IN_THE_DISTRIBUTION.items():
        file = directory / "transformers_tests" / path
        file.parent.mkdir()
        file.write_text(source)
        (file.parent / "__init__.py").touch()
    (directory / "transformers_tests" / "__init__.py").touch()
    return directory


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_our_models_stand_them(folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    file = Path(__file__).with_name("common_models.py")
    done = subprocess.run(
        [*command, "--rootdir", folder, "-c", os.devnull, file],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 600, done.stdout[-300:]
