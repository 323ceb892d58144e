"""Subspan, a compiler for parameter-efficient fine-tuning: a method is a matrix expression, the rest follows."""

from .adapters.store import fingerprint, load_adapter, save_adapter
from .data import collator, encode, load_rows
from .errors import SpecError, SubspanError
from .export.merge import merge, merged_weights, rest
from .export.onnx import export_onnx
from .export.verify import batches, differences, onnx_stage, torch_stage
from .graph.traced import Inputs, TracedModel
from .plan import Plan, Site, plan
from .pretrained import Pretrained, example_inputs, for_onnx, load_model, load_processor, save_model
from .report.table import print_plan, print_summary
from .rewrite import rewrite
from .spec import Rule, Spec, dump_spec, load_spec, load_specs
from .trace import trace
from .training.schedules import Budget, allocate, settle
from .training.tune import tune
from .transforms import TRANSFORMS, transform
from .tuned import TunedModel, tuned_parameters

__all__ = [
    "TRANSFORMS",
    "Budget",
    "Inputs",
    "Plan",
    "Pretrained",
    "Rule",
    "Site",
    "Spec",
    "SpecError",
    "SubspanError",
    "TracedModel",
    "TunedModel",
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
