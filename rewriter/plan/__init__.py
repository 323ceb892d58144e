"""The plan: every site with its transform, shapes, counts and costs, before a weight is read."""

from .resolve import plan
from .site import Given, Plan, Site, transformed

__all__ = ["Given", "Plan", "Site", "plan", "transformed"]
