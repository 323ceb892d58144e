"""Subspan, a compiler for parameter-efficient fine-tuning: a method is a matrix expression, the rest follows.

A name is imported when it is first used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.store import load_adapter, save_adapter
    from .adapters.ties import fingerprint
    from .data import encode, load_rows
    from .errors import SpecError, SubspanError
    from .export.merge import merge, merged_weights, rest
    from .export.onnx import export_onnx
    from .export.verify import batches, differences, onnx_stage, torch_stage
    from .graph.traced import Inputs, TracedModel
    from .plan import Plan, Site, plan
    from .pretrained import Pretrained, example_inputs, for_onnx, load_model, load_processor, save_model
    from .report.table import print_plan, print_summary
    from .rewrite import rewrite
    from .session import Session
    from .spec import Rule, Spec, dump_spec, load_spec, load_specs
    from .tasks import TASKS, Task, task_of
    from .trace import trace
    from .training.evaluation import evaluate, objective
    from .training.loop import label_weights, tune
    from .training.schedules import Budget, allocate, settle
    from .transforms import TRANSFORMS, transform
    from .tuned import TunedModel, tuned_parameters

_PLACES = {
    "TASKS": ".tasks",
    "TRANSFORMS": ".transforms",
    "Budget": ".training.schedules",
    "Inputs": ".graph.traced",
    "Plan": ".plan",
    "Pretrained": ".pretrained",
    "Rule": ".spec",
    "Session": ".session",
    "Site": ".plan",
    "Spec": ".spec",
    "SpecError": ".errors",
    "SubspanError": ".errors",
    "Task": ".tasks",
    "TracedModel": ".graph.traced",
    "TunedModel": ".tuned",
    "allocate": ".training.schedules",
    "batches": ".export.verify",
    "differences": ".export.verify",
    "dump_spec": ".spec",
    "encode": ".data",
    "evaluate": ".training.evaluation",
    "example_inputs": ".pretrained",
    "export_onnx": ".export.onnx",
    "fingerprint": ".adapters.ties",
    "for_onnx": ".pretrained",
    "label_weights": ".training.loop",
    "load_adapter": ".adapters.store",
    "load_model": ".pretrained",
    "load_processor": ".pretrained",
    "load_rows": ".data",
    "load_spec": ".spec",
    "load_specs": ".spec",
    "merge": ".export.merge",
    "merged_weights": ".export.merge",
    "objective": ".training.evaluation",
    "onnx_stage": ".export.verify",
    "plan": ".plan",
    "print_plan": ".report.table",
    "print_summary": ".report.table",
    "rest": ".export.merge",
    "rewrite": ".rewrite",
    "save_adapter": ".adapters.store",
    "save_model": ".pretrained",
    "settle": ".training.schedules",
    "task_of": ".tasks",
    "torch_stage": ".export.verify",
    "trace": ".trace",
    "transform": ".transforms",
    "tune": ".training.loop",
    "tuned_parameters": ".tuned",
}


class _Lazy(types.ModuleType):
    """Names are imported when they are first used; a function stands before the module of its name (`plan`, `trace`,
    `rewrite`), which the import system would put in its place."""

    def __getattr__(self, name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_PLACES[name], __name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_PLACES})


sys.modules[__name__].__class__ = _Lazy

__all__ = [
    "TASKS",
    "TRANSFORMS",
    "Budget",
    "Inputs",
    "Plan",
    "Pretrained",
    "Rule",
    "Session",
    "Site",
    "Spec",
    "SpecError",
    "SubspanError",
    "Task",
    "TracedModel",
    "TunedModel",
    "allocate",
    "batches",
    "differences",
    "dump_spec",
    "encode",
    "evaluate",
    "example_inputs",
    "export_onnx",
    "fingerprint",
    "for_onnx",
    "label_weights",
    "load_adapter",
    "load_model",
    "load_processor",
    "load_rows",
    "load_spec",
    "load_specs",
    "merge",
    "merged_weights",
    "objective",
    "onnx_stage",
    "plan",
    "print_plan",
    "print_summary",
    "rest",
    "rewrite",
    "save_adapter",
    "save_model",
    "settle",
    "task_of",
    "torch_stage",
    "trace",
    "transform",
    "tune",
    "tuned_parameters",
]
