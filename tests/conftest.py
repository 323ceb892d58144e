import gc
import os
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For models this small, filling torch's cache of shapes takes longer than working them out: a fifth of each trace.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
os.environ["SUBSPAN_CACHE"] = tempfile.mkdtemp(prefix="subspan-cache-")

import pytest
import torch

# A trace makes millions of small objects that live: looking through them for garbage was a tenth of the time.
gc.set_threshold(200_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """An export collects garbage; what is imported or kept by now is not looked through for it, a third of its time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """The tests of a file stay in one process, and so do files that share traced models."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Latencies are measured no longer than it takes to have some."""
    if "rewriter.export.latency" in sys.modules:
        monkeypatch.setattr("rewriter.export.latency.SECONDS", 0.1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
