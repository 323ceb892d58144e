"""Tasks: each is one object in one file, and one line in the table here.

The names are what a spec writes; a task's module is its name with underscores, and is loaded when it is used.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from .base import IGNORED, Criterion, Options, Question, Reading, Role, Task
from .cells import check_readings, check_texts, columns_error, fits, words
from .chat import check_turns, clocked, objects_of, turns_of

# name -> class
TASKS = {
    "sequence-classification": "SequenceClassification",
    "multi-label-classification": "MultiLabelClassification",
    "regression": "Regression",
    "token-classification": "TokenClassification",
    "image-classification": "ImageClassification",
    "sentence-embedding": "SentenceEmbedding",
    "question-answering": "QuestionAnswering",
    "causal-lm": "CausalLM",
    "preference": "Preference",
    "seq2seq-lm": "Seq2SeqLM",
}


def task_of(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of a name, with options that a spec gives.

    Raises:
        KeyError: there is none of that name.
        ValidationError: it has no such option, or not such a value.
    """
    module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    made = getattr(module, TASKS[name])
    return made(name, made.Options.model_validate(dict(options or {})))


__all__ = [
    "IGNORED",
    "TASKS",
    "Criterion",
    "Options",
    "Question",
    "Reading",
    "Role",
    "Task",
    "check_readings",
    "check_texts",
    "check_turns",
    "clocked",
    "columns_error",
    "fits",
    "objects_of",
    "task_of",
    "turns_of",
    "words",
]
