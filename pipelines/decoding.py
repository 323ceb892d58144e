"""A decoder's file beside `generate` on the merged checkpoint: the same tokens, and the time of one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from rewriter import SubspanError
from rewriter.data import load_rows
from rewriter.export.latency import bound, interleaved
from rewriter.export.verify import has_cache, open_file
from rewriter.export.writing import of_file
from rewriter.folder import spec_of
from rewriter.greedy import Ids, greedy

PROMPT = 16


@torch.inference_mode()
def same_tokens(run: Path, prompts: int, tokens: int) -> tuple[int, int]:
    """How many prompts go on by the same tokens as `generate`'s, and of how many: the first tokens of validation rows,
    padded on the left, all in one batch; the end of a text stops none."""
    spec, session = spec_of(run), _opened(run)
    model = getattr(transformers, spec.task.auto).from_pretrained(run / "merged").float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "merged", padding_side="left")
    texts = load_rows(spec, []).validation[spec.data.columns["text"]][:prompts]
    lengths = [PROMPT - i % (PROMPT // 2) for i in range(len(texts))]
    cut = [{"input_ids": tokenizer(text)["input_ids"][:length]} for text, length in zip(texts, lengths, strict=True)]
    batch = tokenizer.pad(cut, return_tensors="pt", return_attention_mask=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    ends = torch.from_numpy(np.ravel(model.generation_config.eos_token_id or []).astype(int))
    following, starts = of_file(session)([one["input_ids"] for one in cut])

    def endless(new: Ids) -> Tensor:
        return following(new).index_fill(1, ends, -torch.inf)

    found = greedy(endless, starts, (), tokens)
    return sum(one.ids == wanted for one, wanted in zip(found, expected.tolist(), strict=True)), len(texts)


def step_times(run: Path, length: int) -> dict[str, float]:
    """Milliseconds of a token after all others of a sequence: with their keys and values, and by reading all again."""
    session = _opened(run)
    ids, mask = torch.ones(1, length, dtype=torch.long), torch.ones(1, length, dtype=torch.long)
    batches = {"with the cache": {"input_ids": ids[:, -1:]}, "without": {"input_ids": ids}}
    return interleaved({name: bound(session, one | {"attention_mask": mask}, -1) for name, one in batches.items()})


def _opened(run: Path) -> Any:
    session = open_file(run / "onnx" / "model.onnx")
    if not has_cache(session):
        raise SubspanError(f"{run / 'onnx' / 'model.onnx'} has no cache: export.json says why")
    return session
