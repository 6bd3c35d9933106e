"""All settings of a pre-training run as text, the options of every router included."""

from __future__ import annotations

from s2moe.moe.methods import METHODS
from s2moe.moe.routers import ROUTERS

from .help import help_text, section_text
from .model import router_section
from .run import RunConfig


def explain() -> str:
    """Every key with its type, default and meaning; then the methods, then each router's options."""
    methods = "".join(f"  {line}\n" for line in list_methods().splitlines())
    routers = "".join(
        section_text(router_section(name), "model.moe.router", f"with model.moe.router.name={name}") for name in ROUTERS
    )
    return f"{help_text(RunConfig)}\nmodel.moe.method  (a name for a set of defaults)\n{methods}{routers}"


def list_methods() -> str:
    """One line for each published method: its name for model.moe.method, and what it is."""
    width = max(map(len, METHODS))
    return "\n".join(f"{name:{width}}  {method.summary}" for name, method in METHODS.items())
