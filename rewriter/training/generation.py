"""What a model writes of validation rows, and how like it is to what they say."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SpecError
from ..greedy import Ids, Said
from ..spec import Spec
from ..tasks import Question
from ..tuned import TunedModel
from .evaluation import autocast
from .parallel import processes, share, together

# A tuned model in eval mode, and rows -> what goes on them.
Write = Callable[[TunedModel, Ids], list[Said]]
_LIBRARIES = {"rouge-score": "rouge_score", "sacrebleu": "sacrebleu"}


@dataclass(frozen=True)
class Asked:
    """Questions with their answers, what writes, and the tokenizer."""

    questions: Sequence[Question]
    write: Write
    processor: Any


def check_libraries(spec: Spec) -> None:
    """What measures is installed, for a spec by which something is written.

    Raises:
        SpecError: saying what to install.
    """
    for name, module in _LIBRARIES.items() if spec.writing else ():
        if importlib.util.find_spec(module) is None:
            place = ("train", "generate" if spec.train.generate else "metric")
            raise SpecError(f"{name} is not installed: pip install {' '.join(_LIBRARIES)}", place)


def measures(expected: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """exact_match, the share of equal texts; rouge, the mean F1 of ROUGE-L; bleu of all of them together, 0 to 100.

    Whitespace around a text does not count.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    wanted, said = [one.strip() for one in expected], [one.strip() for one in found]
    scorer, pairs = RougeScorer(["rougeL"]), list(zip(wanted, said, strict=True))
    return {
        "exact_match": sum(one == other for one, other in pairs) / len(pairs),
        "rouge": sum(scorer.score(one, other)["rougeL"].fmeasure for one, other in pairs) / len(pairs),
        "bleu": float(BLEU(force=True).corpus_score(said, [wanted]).score),
    }


def _plain(processor: Any, text: str) -> str:
    """A text as what is written is read: without special tokens."""
    ids = processor(text, add_special_tokens=False, verbose=False)["input_ids"]
    special = set(processor.all_special_ids) - {processor.unk_token_id}
    return processor.decode(ids, skip_special_tokens=True) if special & set(ids) else text


def generate(model: TunedModel, spec: Spec, asked: Asked) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The measures of what a model writes, with `stopped`, the share of answers that ended by themselves and not at the
    most tokens; and samples of it: prompt, expected, answer, and whether it `stopped`. The model is left in train mode,
    and generators as they were."""
    device, settings = processes().device, spec.writing
    own = share(range(len(asked.questions)))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        with autocast(spec.train, device):
            said = asked.write(model, [asked.questions[i].ids for i in own]) if own else []
        model.train()
    table = torch.full((len(own), 2 + settings.tokens), -1, dtype=torch.float64, device=device)
    for row, number, one in zip(table, own, said, strict=True):
        row[: 2 + len(one.ids)] = torch.tensor([number, one.ended, *one.ids], dtype=torch.float64)
    every = together(table).long().cpu()
    lines = every[every[:, 0].argsort()][:, 1:].tolist()
    decode = lambda ids: asked.processor.decode([one for one in ids if one >= 0], skip_special_tokens=True)  # noqa: E731
    answers = [decode(ids) for _, *ids in lines]
    samples = [
        {
            "prompt": asked.processor.decode(question.ids),
            "expected": question.answer,
            "answer": answer,
            "stopped": bool(ended),
        }
        for question, answer, (ended, *_) in zip(asked.questions, answers, lines, strict=True)
    ]
    found = measures([_plain(asked.processor, one.answer) for one in asked.questions], answers)
    return found | {"stopped": sum(one["stopped"] for one in samples) / len(samples)}, samples[: settings.samples]
