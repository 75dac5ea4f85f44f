#!/usr/bin/env python
"""Writes docs/quicktour.ipynb from the cells below; with nbclient and ipykernel installed, --execute also runs it.

python scripts/make_notebook.py --execute
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "quicktour.ipynb"
CELLS = [
    (
        "markdown",
        """# A quick tour

Trains prompts for SmolLM2-135M on the packaged reviews, with and without PTP's second pass, and asks one of them. It
takes about three minutes on two CPU cores. Twenty steps are far too few to compare methods: see results.md.""",
    ),
    (
        "code",
        """import ptp_ds

settings = dict(task="Reviews", max_steps=20, eval_every=10, save_every=10, log_every=1, verbose=False)
lines = {}


def train(perturbation):
    lines[perturbation] = []
    return ptp_ds.train(
        perturbation=perturbation, seeds=range(2), callbacks=[lines[perturbation].append], resume="auto",
        output_dir=f"runs/tour-{perturbation}", **settings,
    )


results = {name: train(name) for name in ("none", "gaussian")}""",
    ),
    ("markdown", "Two seeds a method, scored on rows that training never saw, beside the prompts before training:"),
    (
        "code",
        """for name, result in results.items():
    for member, one in result.members.items():
        accuracy, before = one.metrics["accuracy"], one.untrained["accuracy"]
        print(f"{name:9} {member}  accuracy {accuracy:.3f}  untrained {before:.3f}")""",
    ),
    ("markdown", "Callbacks have seen every line of the log:"),
    (
        "code",
        """import matplotlib.pyplot as plt

for name, told in lines.items():
    of_seed = [line for line in told if line["kind"] == "train" and line["member"] == "seed-0"]
    plt.plot([line["step"] for line in of_seed], [line["cross_entropy"] for line in of_seed], label=name)
plt.xlabel("step")
plt.ylabel("cross-entropy")
plt.legend()
plt.show()""",
    ),
    ("markdown", "A saved prompt answers texts of your own:"),
    (
        "code",
        """predictor = ptp_ds.Predictor.from_pretrained(results["gaussian"].members["seed-0"].adapter)
for text in ("A quiet film that stays with you.", "Two hours that I will not get back."):
    (line,) = predictor.predict(text)
    print(f"{line['answer']:9} {max(line['probabilities'].values()):.3f}  {text}")""",
    ),
]


def notebook() -> dict[str, Any]:
    """The cells as nbformat 4.5 has them, without outputs."""
    cells = []
    for number, (kind, text) in enumerate(CELLS):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text}
        cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def executed(made: dict[str, Any]) -> dict[str, Any]:
    """The notebook with its outputs, run in a temporary folder."""
    import tempfile

    import nbformat
    from nbclient import NotebookClient

    node = nbformat.from_dict(made)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(node, timeout=900, resources={"metadata": {"path": folder}}).execute()
    for cell in node["cells"]:
        cell["metadata"] = {}
        if "outputs" in cell:  # what stands on standard error names this machine's folders
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    return dict(node)


def main() -> int:
    """Writes the notebook."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--execute", action="store_true", help="run the cells, and keep what they print")
    made = executed(notebook()) if parser.parse_args().execute else notebook()
    PAGE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
