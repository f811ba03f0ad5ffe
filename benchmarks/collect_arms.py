"""Turn the arms that are finished into the results file that the README's table is written from.

    python benchmarks/collect_arms.py runs/full/03_train_pia/arms benchmarks/results/03_train_pia.json

Notebook 03 writes the same when all its arms are done. A comparison of many arms runs for hours, by several processes
over one folder; this reads what there is, says for each arm how many seeds it has, and computes nothing anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import yaml

import eas_kit as eas
from eas_kit.compare import COLUMNS, summary
from eas_kit.notebooks import find_folder, read_notebook
from eas_kit.report import device_name, plain, versions, write_json

NOTEBOOK = "03_train_pia"


def main() -> None:
    arms, target = Path(sys.argv[1]), Path(sys.argv[2])
    folder = find_folder()
    settings = dict(read_notebook(folder / f"{NOTEBOOK}.ipynb").defaults)
    settings |= yaml.safe_load((folder / "params" / "full.yaml").read_text())[NOTEBOOK]
    found = [json.loads(path.read_text())["result"] for path in sorted(arms.glob("*.json"))]
    rows = [result for result in found if "arm" in result]
    order = ["zero_shot", "full", "lora", "pia"]
    order += [f"pia k={k} {choice}" for k in settings["num_skipped"] for choice in settings["choices"]]
    rows.sort(key=lambda row: (order.index(row["arm"]), row["seed"]))
    frame = pd.DataFrame([{column: row.get(column) for column in COLUMNS} for row in rows])
    _, processor = eas.load_model(settings["model"])
    test = eas.load_task(settings["task_name"], processor, sizes={"test": settings["test_limit"]}).test
    record = {
        "format": 1,
        "notebook": NOTEBOOK,
        "device": device_name(),
        "versions": versions(),
        "parameters": {name: value for name, value in settings.items() if name != "run_dir"},
        "metrics": {
            "table": summary(frame),
            "runs": frame.drop(columns="test_columns"),
            "chance": sum(1 / len(e.choices) for e in test) / len(test),
        },
    }
    write_json(target, plain(record, "results"))
    print(summary(frame).round(4).to_string())


if __name__ == "__main__":
    main()
