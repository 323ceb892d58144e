"""The loop's parts."""

from rewriter.training.checkpoint import checkpoints


def test_checkpoints_are_in_the_order_of_steps(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", ".unfinished-1"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert checkpoints(tmp_path / "nowhere") == []
