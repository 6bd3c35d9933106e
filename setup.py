"""What pyproject.toml cannot say: a wheel carries the clone's commands and configurations, inside s2moe.

So that an installation adds one name to everybody's environment, s2moe, launcher/ and data_prep/ are no packages of it.
An editable installation has them as they lie in the clone.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = ("launcher", "data_prep", "configs", "benchmarks/results", "pyproject.toml")  # s2moe/places.py finds them
CACHES = shutil.ignore_patterns("__pycache__", "*.py[cod]")


class BuildWithClone(build_py):
    """Builds the packages, those of the clone as files of s2moe."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        self.packages = self.distribution.packages = [name for name in self.packages if name.split(".")[0] == "s2moe"]
        super().run()
        clone = Path(self.build_lib, "s2moe", "_clone")
        shutil.rmtree(clone, ignore_errors=True)
        for name in CARRIED:
            target = clone / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if Path(name).is_dir():
                shutil.copytree(name, target, ignore=CACHES)
            else:
                shutil.copy2(name, target)


setup(cmdclass={"build_py": BuildWithClone})
