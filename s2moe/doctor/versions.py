"""Versions of what a run stands on."""

from __future__ import annotations

import platform
import tomllib
from importlib import metadata

import torch
from packaging.requirements import Requirement

from s2moe.places import ROOT

from .finding import Finding, judge

SHOWN = ("torch", "deepspeed", "transformers", "accelerate")
PROJECT = ROOT / "pyproject.toml"


def check_versions() -> list[Finding]:
    """Python and the packages that pyproject.toml asks for; the important ones one by one."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    least = project["requires-python"]
    findings = [
        judge(
            "python",
            Requirement(f"python{least}").specifier.contains(platform.python_version()),
            platform.python_version(),
            f"this project needs Python {least}",
        )
    ]
    others = []
    for text in project["dependencies"]:
        wanted = Requirement(text)
        finding = _package(wanted)
        if wanted.name in SHOWN:
            findings.append(finding)
        elif finding.status != "ok":
            others.append(finding)
    findings += others or [Finding("other packages", "ok", "as pyproject.toml asks")]
    cuda = torch.version.cuda or "none: a build for CPUs"
    findings.append(Finding("torch's CUDA", "ok", cuda))
    return [_alike(finding) for finding in findings]


def _package(wanted: Requirement) -> Finding:
    remedy = f"pip install '{wanted.name}{wanted.specifier}', or install requirements.lock"
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Finding(wanted.name, "fail", "not installed", remedy)
    return judge(wanted.name, wanted.specifier.contains(version, prereleases=True), version, remedy)


def _alike(finding: Finding) -> Finding:
    return Finding(finding.check, finding.status, finding.value, finding.remedy, alike=True)
