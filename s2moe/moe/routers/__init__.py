"""One file a routing method. Every module of this package is imported, and registers its router."""

from importlib import import_module
from pkgutil import iter_modules

from s2moe.moe.routers.base import ROUTERS, LinearScores, Router, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["ROUTERS", "LinearScores", "Router", "register"]
