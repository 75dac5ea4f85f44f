"""docs/python.md: its blocks, one behind the other, as a reader would run them."""

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.processes import worker_environment


@pytest.mark.slow
def test_the_pages_python_runs_as_printed(tmp_path):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], env=worker_environment(), cwd=tmp_path,
                          capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("reviews", "tone_python", "watched"):
        assert (tmp_path / "runs" / name / "adapter" / "adapter_config.json").is_file()
