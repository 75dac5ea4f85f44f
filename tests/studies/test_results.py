"""docs/results.md shows what its rows give: every line of its tables is made again from rows.csv."""

import re

import few_shot_tables
import pytest

from tests.support.paths import ROOT

ROWS = few_shot_tables.Rows(ROOT / "docs" / "few_shot" / "rows.csv")
SEEN = ("SST2", "Subj")


@pytest.mark.parametrize("table", ["scores", "comparison", "halves"])
def test_the_tables_of_the_results_are_those_of_their_rows(table):
    made = {
        "scores": lambda: few_shot_tables.scores_table(ROWS),
        "comparison": lambda: few_shot_tables.comparison_table(ROWS, SEEN),
        "halves": lambda: few_shot_tables.halves_table(ROWS),
    }[table]()
    shown = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    start = shown.index(made[0])
    assert shown[start : start + len(made) + 1] == [*made, ""]


def test_a_table_by_hand(tmp_path):
    """Two tasks, two seeds: means, standard deviations with n - 1, gains of pairs."""
    lines = ["task,method,seed,score,untrained,majority", "A,plain,0,0.5,0.25,0.5", "A,plain,1,0.7,0.35,0.5",
             "A,ptp-rn,0,0.6,0.25,0.5", "A,ptp-rn,1,0.7,0.35,0.5", "A,ptp-adv,0,,0.25,0.5",
             "B,plain,0,0.5,0.25,0.5", "B,plain,1,0.6,0.25,0.5", "B,ptp-rn,0,0.5,0.25,0.5",
             "B,ptp-rn,1,0.8,0.25,0.5"]  # fmt: skip
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = few_shot_tables.Rows(tmp_path / "rows.csv")
    assert few_shot_tables.scores_table(rows)[2:4] == [
        "| A | plain prompt tuning | 2 | 0.600 | 0.141 | 0.500 | 0.300 | 0.500 |",
        "| A | PTP, noise (`--preset ptp-rn`) | 2 | 0.650 | 0.071 | 0.600 | 0.300 | 0.500 |",
    ]
    gains = [
        re.findall(r"^\| (.*?) \| noise \| (\S+) ", line) for line in few_shot_tables.comparison_table(rows, ["A"])
    ]
    assert [found for line in gains for found in line] == [("A", "+0.050"), ("B", "+0.100"), ("its 2 tasks", "+0.075")]
    assert few_shot_tables.halves(rows) == ([0], [1])
