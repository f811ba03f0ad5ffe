"""Turn what sweeps over the paper's tables left into the results file that the README's table and notebook 07 read.

    python benchmarks/collect_tables.py runs/tables --times runs/times     writes benchmarks/results/tables.json

Computes nothing anew; a sweep that is not finished gives the seeds that it has.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from eas_kit.arm_runs import ArmRun
from eas_kit.compare import COLUMNS
from eas_kit.report import machine, plain, versions, write_json
from eas_kit.sweep import read_sweep

KEEP = ("table", "row", "model", "task", *COLUMNS)
SETTINGS = ("model", "task", "steps", "batch_size", "skip_rank", "adapt_rank", "mixed_precision")
SETTINGS += ("val_limit", "test_limit", "search")


def read(folder: Path) -> pd.DataFrame:
    """The finished runs of a sweep, without what no table shows."""
    frame = read_sweep(folder)
    frame = frame[frame["status"].isin(["done", "kept"])]
    # of the tuning, not of the process, which may have read a file that another row's run had left
    frame = frame.assign(seconds=frame.get("run_seconds", frame["seconds"]))
    defaults = vars(ArmRun())
    frame = frame.assign(**{name: [defaults[name]] * len(frame) for name in SETTINGS if name not in frame})
    return frame[[name for name in (*KEEP, *SETTINGS) if name in frame]].loc[:, lambda f: ~f.columns.duplicated()]


def settings_of(runs: pd.DataFrame, names: list[str]) -> dict[str, dict]:
    """Settings by what has them, such as "Tables 1, 7: tiny, elements"."""
    tuned = runs[runs["steps"] > 0]  # what was not tuned took no steps
    alike = (
        tuned[[*names, "model", "task"]].map(lambda value: json.dumps(plain(value, "a setting"))).agg("".join, axis=1)
    )
    found = {}
    for _, part in tuned.groupby(alike, sort=False):
        tables = sorted(part["table"].unique())
        label = f"Table{'s' * (len(tables) > 1)} {', '.join(tables)}: {', '.join(part.iloc[0][['model', 'task']])}"
        found[label] = part.iloc[0][names].to_dict()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, help="folders of sweeps")
    parser.add_argument("--times", nargs="+", type=Path, default=[], help="folders of benchmarks/grids/times.yaml")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tables.json")
    args = parser.parse_args(argv)
    runs = pd.concat([read(folder) for folder in args.sweeps], ignore_index=True)
    settings = [name for name in SETTINGS if name in runs and name not in ("model", "task")]
    record = {
        "format": 1,
        "settings": settings_of(runs, settings),
        "machine": machine(),
        "versions": versions(),
        "runs": runs.drop(columns=settings),
        "times": pd.concat([pd.DataFrame(), *map(read, args.times)]).drop(columns=list(SETTINGS[2:]), errors="ignore"),
    }
    write_json(args.out, plain(record, "results"))
    print(runs.groupby(["table", "row"], sort=False)["test_accuracy"].agg(["size", "mean", "std"]).round(4).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
