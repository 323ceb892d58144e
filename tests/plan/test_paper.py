"""Tables II to IV of arXiv 2407.05417v2: 171 rows planned from configs alone, against closed formulas and the print."""

from pathlib import Path

import pytest

from pipelines.validate import Format, Level, check_all
from rewriter import SubspanError, load_spec, load_specs

pytestmark = pytest.mark.slow

PAPER = Path(__file__).parents[2] / "specs" / "paper"
RANKS = (2, 4, 8, 16)
# Layers, width, nominal millions, then the print in thousandths: rows 2 to 6, and for ranks 2, 4, 8, 16 HAdapter,
# PAdapter, the nine from PA to AdaLoRA, FLoRA, DoRA.
TABLES = {
    "II": (
        "roberta-base", 12, 768, 125, (0.44, 0.44, 0.22, 0.66, 0.82),
        ((2.50, 2.43, 2.65, 2.65, 3.32), (4.87, 4.80, 5.31, 5.31, 5.97), (9.59, 9.52, 10.62, 10.64, 11.28), (19.03, 18.96, 21.24, 21.38, 21.90)),
    ),
    "III": (
        "deberta-v3-base", 12, 768, 184, (0.30, 0.30, 0.15, 0.45, 0.54),
        ((1.68, 1.63, 1.79, 1.79, 2.23), (3.32, 3.26, 3.61, 3.61, 4.06), (6.63, 6.41, 7.23, 7.24, 7.66), (12.93, 12.88, 14.43, 14.52, 14.87)),
    ),
    "IV": (
        "roberta-large", 24, 1024, 355, (0.42, 0.42, 0.21, 0.62, 0.76),
        ((2.35, 2.29, 2.49, 2.49, 3.12), (4.57, 4.50, 4.98, 4.99, 5.61), (9.00, 8.93, 9.97, 9.98, 10.59), (17.87, 17.80, 19.94, 19.98, 20.56)),
    ),
}  # fmt: skip


def rule(row, layers, d, deberta):
    """TRANSFORMS' count of a row, and where in a group of ranks it stands."""
    f = 4 * d
    linears = [(d, d)] * 4 + [(d, f), (f, d)]
    three = [(d, d), (d, d), (d, f)]
    if row <= 6:
        biases = layers * (sum(m for _, m in linears) + 2 * d) + d + d * deberta
        return {
            2: layers * sum(min(n, m) for n, m in linears),
            3: layers * sum(m for _, m in three),
            4: layers * sum(n for n, _ in three),
            5: layers * sum(n + m for n, m in three),
            6: biases,
        }[row]
    group, i = divmod(row - 7, 13)
    r = RANKS[group]
    width = 4 * r if i == 0 else 8 * r
    if i <= 1:
        return (2 - i) * layers * (2 * d * width + width + d)
    extra = {7: r, 8: r, 9: r, 10: r, 11: r * r}.get(i, 0)
    return layers * sum(r * (n + m) + (m if i == 12 else extra) for n, m in linears)


def printed(row, singles, groups):
    if row <= 6:
        return singles[row - 2]
    group, i = divmod(row - 7, 13)
    return groups[group][i if i < 2 else {11: 3, 12: 4}.get(i, 2)]


def test_every_spec_is_valid_and_every_row_has_the_count_of_its_rule_and_142_the_print():
    """What `subspan validate specs` checks."""
    results = check_all([PAPER.parent], [], Level.plan, Format.json)
    assert not [finding for result in results for finding in result["findings"]]
    near = 0
    for name, layers, d, millions, singles, groups in TABLES.values():
        plans = {
            result["session"].spec.meta["row"]: (result["session"].spec.meta, result["plan"])
            for result in results
            if result["file"] == str(PAPER / f"{name}.yaml")
        }
        assert sorted(plans) == list(range(2, 59))
        for row, (meta, found) in plans.items():
            assert found.trainable_parameters == rule(row, layers, d, name.startswith("deberta")), meta
            assert TABLES[meta["table"]][0] == name
            share = 1000 * found.trainable_parameters / (millions * 1e6)
            near += abs(share - printed(row, singles, groups)) <= 0.01
    assert near == 142


def test_one_row_by_its_number():
    spec = load_spec(f"{PAPER / 'roberta-base.yaml'}#37")
    assert spec.meta == {"table": "II", "row": 37, "method": "LoRA + MPCo", "rank": 8}
    with pytest.raises(SubspanError, match="name one of its variants"):
        load_spec(PAPER / "roberta-base.yaml")


def test_mistakes_in_variants_have_their_place(tmp_path):
    text = (PAPER / "roberta-base.yaml").read_text()
    file = tmp_path / "broken.yaml"
    file.write_text(text.replace("apply: [ssl]", "apply: [ssll]"))
    line = next(i for i, one in enumerate(file.read_text().splitlines(), 1) if "ssll" in one)
    with pytest.raises(SubspanError, match=f"broken.yaml:{line}:.*unknown method 'ssll'"):
        load_specs(file)
    file.write_text(text.replace("rank: [2, 4, 8, 16]}", "rank: [2, 4, 8]}"))
    with pytest.raises(SubspanError, match="lists of equal length"):
        load_specs(file)
