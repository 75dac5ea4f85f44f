"""Runs plan_worker.py on a list of scenarios and reads the reports back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.paths import SUPPORT
from tests.support.processes import worker_environment

MODEL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip
SMALL = {**MODEL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def run_scenarios(folder: Path, scenarios: list[dict[str, Any]], seconds: int) -> dict[str, list[dict[str, Any]]]:
    """name -> each rank's report, in order."""
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    command = [sys.executable, str(SUPPORT / "plan_worker.py"), str(folder)]
    done = subprocess.run(
        command, env=worker_environment(), cwd=folder, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        one["name"]: [
            json.loads((folder / f"{one['name']}-{rank}.json").read_text())
            for rank in one.get("ranks", range(one["world"]))
        ]
        for one in scenarios
    }
