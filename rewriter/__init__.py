"""Subspan, a compiler for parameter-efficient fine-tuning: a method is a matrix expression, the rest follows."""

from .adapter import fingerprint, load_adapter, save_adapter
from .allocate import Budget, allocate, settle
from .data import collator, encode, load_rows
from .errors import SpecError, SubspanError
from .merge import merge, merged_weights, rest
from .onnx import export_onnx
from .plan import Plan, Site, plan
from .pretrained import Pretrained, example_inputs, for_onnx, load_model, load_processor, save_model
from .report import print_plan, print_summary
from .rewrite import rewrite, tuned_parameters
from .spec import Rule, Spec, dump_spec, load_spec, load_specs
from .trace import GraphModel, Inputs, trace
from .transforms import METHODS, transform
from .tune import tune
from .verify import batches, differences, onnx_stage, torch_stage

__all__ = [
    "METHODS",
    "Budget",
    "GraphModel",
    "Inputs",
    "Plan",
    "Pretrained",
    "Rule",
    "Site",
    "Spec",
    "SpecError",
    "SubspanError",
    "allocate",
    "batches",
    "collator",
    "differences",
    "dump_spec",
    "encode",
    "example_inputs",
    "export_onnx",
    "fingerprint",
    "for_onnx",
    "load_adapter",
    "load_model",
    "load_processor",
    "load_rows",
    "load_spec",
    "load_specs",
    "merge",
    "merged_weights",
    "onnx_stage",
    "plan",
    "print_plan",
    "print_summary",
    "rest",
    "rewrite",
    "save_adapter",
    "save_model",
    "settle",
    "torch_stage",
    "trace",
    "transform",
    "tune",
    "tuned_parameters",
]
