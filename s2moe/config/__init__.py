"""Typed run configuration: YAML files, dotted overrides, checks with clear messages."""

from s2moe.options import option

from .loader import load, to_dict, to_yaml
from .options import ConfigError

__all__ = ["ConfigError", "load", "option", "to_dict", "to_yaml"]
