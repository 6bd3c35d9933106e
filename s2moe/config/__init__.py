"""Typed run configuration: YAML files, dotted overrides, checks with clear messages."""

from .loader import load, to_dict, to_yaml
from .options import ConfigError, option

__all__ = ["ConfigError", "load", "option", "to_dict", "to_yaml"]
