"""What is timed beside the files."""

import torch

from rewriter.export.choose import timed
from tests.architectures import traced


def test_a_traced_decoder_has_no_step_to_time_beside_the_files():
    """As a prefix ships, which merges into no weights: it has no cache of its own."""
    model = traced("llama")[2].eval()
    ids = torch.ones(1, 8, dtype=torch.long)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = timed([], model, {"1x8": whole, "1x8 step": whole | {"input_ids": ids[:, -1:]}}, "cpu")
    assert found["eager"].keys() == {"1x8"}
