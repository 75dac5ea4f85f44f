#!/usr/bin/env python
"""A saved adapter's answers to rows of your own, with the probability of each answer.

    python scripts/predict.py --adapter runs/cb --input rows.csv --output answers.jsonl
    cat rows.jsonl | python scripts/predict.py --adapter runs/cb --input -
    python scripts/predict.py --adapter runs/reviews --text "A quiet film that stays with you." --generate 10

One plain process; rows need the fields of the task's template and no label.
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
