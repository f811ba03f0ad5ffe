"""The README's tables are those of the results files, and say so when a comparison is unfinished."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fill_readme.py"


def test_tables_are_those_of_the_files():
    run = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr or "run: python benchmarks/fill_readme.py"
