"""Passes: small pure functions from graph to graph, one a file."""

from .copy_contiguous import copy_contiguous
from .follow_device import follow_device
from .remove_checks import remove_checks
from .remove_dead import remove_dead

__all__ = ["copy_contiguous", "follow_device", "remove_checks", "remove_dead"]
