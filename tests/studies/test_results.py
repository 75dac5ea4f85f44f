"""docs/results.md shows what its rows give: every line of its tables is made again from rows.csv."""

import re

import few_shot_tables
import pytest

from ptp_ds.errors import UserError
from tests.support.paths import ROOT

FILE = ROOT / "docs" / "few_shot" / "rows.csv"
FP32 = ROOT / "docs" / "few_shot" / "fp32.csv"
SEEN = ("SST2", "Subj")
METHODS = [method for method in few_shot_tables.Rows(FILE).methods if not method.endswith("-w5")]
PAGES = {
    "results.md": few_shot_tables.Rows(FILE, "plain", METHODS),
    "results_warmup5.md": few_shot_tables.Rows(
        FILE, "plain-w5", [method for method in few_shot_tables.Rows(FILE).methods if method.endswith("-w5")]
    ),
    "results_probabilities.md": few_shot_tables.Rows(FP32),
}


def shown(page: str) -> list[str]:
    return (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("table", ["scores", "comparison", "halves"])
def test_the_tables_of_the_results_are_those_of_their_rows(page, table):
    made = {
        "scores": lambda rows: few_shot_tables.scores_table(rows),
        "comparison": lambda rows: few_shot_tables.comparison_table(rows, SEEN),
        "halves": lambda rows: few_shot_tables.halves_table(rows),
    }[table](PAGES[page])
    start = shown(page).index(made[0])
    assert shown(page)[start : start + len(made) + 1] == [*made, ""]


@pytest.mark.parametrize("page", ["results.md", "results_probabilities.md"])
def test_the_spread_over_seeds_of_one_draw_is_of_the_rows_too(page):
    made = few_shot_tables.draws_table(PAGES[page], 5)
    start = shown(page).index(made[0])
    assert shown(page)[start : start + len(made) + 1] == [*made, ""]


def test_cross_entropies_are_of_the_rows_too():
    made = few_shot_tables.nats_table(PAGES["results_probabilities.md"])
    start = shown("results_probabilities.md").index(made[0])
    assert shown("results_probabilities.md")[start : start + len(made) + 1] == [*made, ""]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_the_command_that_makes_its_tables(page):
    rows, file = PAGES[page], "fp32.csv" if page == "results_probabilities.md" else "rows.csv"
    base = "" if rows.base == "plain" else f" --baseline {rows.base}"
    (command,) = [line for line in shown(page) if f"few_shot_tables.py docs/few_shot/{file}" in line]
    named = sorted(rows.methods, key=list(few_shot_tables.NAMES).index)
    seen = f" --seen {' '.join(SEEN)}" if set(SEEN) & set(rows.tasks) else ""
    assert f"{seen}{base} --methods {' '.join(named)}" in command


def test_what_the_longer_warm_up_changes_is_of_the_rows_too():
    """Each method with a warm-up of 30 steps against itself with one of 5."""
    lines = []
    known = few_shot_tables.Rows(FILE).methods
    for method in [method for method in METHODS if f"{method}-w5" in known]:
        rows = few_shot_tables.Rows(FILE, f"{method}-w5", [method, f"{method}-w5"])
        lines += few_shot_tables.comparison_table(rows, SEEN)[2:]
    page = shown("results.md")
    start = page.index(lines[0])
    assert page[start : start + len(lines) + 1] == [*lines, ""]


def test_methods_that_have_no_rows_are_refused():
    with pytest.raises(UserError, match=r"rows\.csv has no score of ours, theirs; it has those of plain, "):
        few_shot_tables.Rows(FILE, "plain", ["plain", "ours", "theirs"])


def rows_of(folder, *lines, base=few_shot_tables.BASE):
    """Rows of a file of these lines, `task,method,seed,score` and a majority, 0.5 without."""
    cells = [line.split(",") for line in lines]
    text = [",".join([*own, *["0.5"][: 5 - len(own)], "0.25"]) for own in cells]
    written = "\n".join(["task,method,seed,score,majority,untrained", *text])
    (folder / "rows.csv").write_text(written, encoding="utf-8")
    return few_shot_tables.Rows(folder / "rows.csv", base)


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


def test_a_method_is_told_of_the_tasks_that_it_has(tmp_path):
    """Over the later half of the seeds: of three tasks one method has two, another one, a third none in that half."""
    lines = [f"{task},{method},{seed},{0.5 + 0.1 * (seed % 2)}" for task, method in
             (("A", "plain"), ("B", "plain"), ("C", "plain"), ("A", "two"), ("B", "two"), ("C", "one"))
             for seed in range(10)]  # fmt: skip
    rows = rows_of(tmp_path, *lines, "A,early,0,0.5")
    told = [line.split(", the later half")[0] for line in few_shot_tables.later_seeds(rows, ["A"])]
    assert told == ["two, its 2 tasks", "two, A", "one, C"]
    assert [line for line in few_shot_tables.halves_table(rows) if "early" in line] == [
        "| A | early | 0.500, -, 0.500 | - |"
    ]


def test_tables_with_cells_that_are_not_there(tmp_path, capsys):
    """A task that the baseline hasn't run, seeds that methods don't share, a majority that older runs don't tell."""
    given = ["A,base,0,0.5", "A,base,1,0.6,", "A,new,0,0.7", "A,new,1,0.6", "B,new,0,0.5", "C,base,0,0.5",
             "C,new,1,0.5"]  # fmt: skip
    rows = rows_of(tmp_path, *given, base="base")
    assert few_shot_tables.scores_table(rows)[2:4] == [
        "| A | base | 2 | 0.550 | 0.071 | 0.500 | 0.250 | - |",
        "| A | new | 2 | 0.650 | 0.071 | 0.600 | 0.250 | 0.500 |",
    ]
    assert [line.split(" | ")[:2] for line in few_shot_tables.scores_table(rows)[4:]] == [
        ["| B", "new"], ["| C", "base"], ["| C", "new"],
    ]  # fmt: skip
    assert [line.split(" | ")[0] for line in few_shot_tables.comparison_table(rows, ["A"])[2:]] == ["| A"]
    few_shot_tables.main([str(tmp_path / "rows.csv"), "--baseline", "base", "--seen", "A"])
    assert "| A | new | 0.700, -, 0.700 | 0.600, -, 0.600 |" in capsys.readouterr().out


def test_the_spread_over_seeds_of_one_draw(tmp_path, capsys):
    """Two draws of two seeds each: differences of 0.1 and 0.2, so the root of (0.005 + 0.02) / 2; one seed has none."""
    given = ["A,plain,0,0.5", "A,plain,1,0.8", "A,plain,2,0.6", "A,plain,3,0.6", "A,new,0,0.5", "A,new,1,0.9"]
    few_shot_tables.main([str(rows_of(tmp_path, *given) and tmp_path / "rows.csv"), "--draws", "2"])
    told = capsys.readouterr().out
    assert "| A | plain prompt tuning | 0.126 | 0.112 |" in told
    assert "| A | new | 0.283 | - |" in told


def test_one_seed_has_no_halves(tmp_path, capsys):
    rows_of(tmp_path, "A,plain,0,0.5", "A,new,0,0.6", "B,plain,0,0.5", "B,new,0,0.6")
    few_shot_tables.main([str(tmp_path / "rows.csv")])
    assert capsys.readouterr().out.splitlines()[-2].startswith("| its 2 tasks | new | +0.100 | - |")


def test_a_file_without_its_baseline(tmp_path):
    with pytest.raises(UserError, match=r"rows\.csv has no score of plain, .* it has those of a, b: give --baseline"):
        rows_of(tmp_path, "A,a,0,0.5", "A,b,0,0.5", "A,plain,0,")


def test_cross_entropies_where_the_rows_tell_them(tmp_path, capsys):
    """By hand: differences of -0.25 and -0.5; a method without the baseline's task, and rows of before."""
    given = ["A,plain,0,0.5,1.0", "A,plain,1,0.5,1.5", "A,new,0,0.5,0.75", "A,new,1,0.5,1.0", "B,new,0,0.5,2.0",
             "B,plain,0,0.5,"]  # fmt: skip
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["task,method,seed,score,cross_entropy,majority,untrained",
                               *(f"{line},0.5,0.25" for line in given)]))  # fmt: skip
    made = few_shot_tables.nats_table(few_shot_tables.Rows(file))
    assert made[2:] == [
        "| A | plain prompt tuning | 1.250 | 0.354 | 1.500 | | | |",
        "| A | new | 0.875 | 0.177 | 1.000 | -0.375 | - | 0.5000 |",
        "| B | new | 2.000 | - | 2.000 | | | |",
    ]
    few_shot_tables.main([str(file)])
    assert "\n".join(made) in capsys.readouterr().out
    assert few_shot_tables.nats_table(rows_of(tmp_path, "A,plain,0,0.5")) == []
