"""Specs: their models, how they are read, and what is said of mistakes in them."""

from .data import Data, Turns, filled
from .limits import Limits
from .models import Model, Onnx, Passes, Quantise, Rule, Spec, Train, link_model
from .read import decisive, differing, dump_spec, is_dump, load_spec, load_specs, located, warned

__all__ = [
    "Data",
    "Limits",
    "Model",
    "Onnx",
    "Passes",
    "Quantise",
    "Rule",
    "Spec",
    "Train",
    "Turns",
    "decisive",
    "differing",
    "dump_spec",
    "filled",
    "is_dump",
    "link_model",
    "load_spec",
    "load_specs",
    "located",
    "warned",
]
