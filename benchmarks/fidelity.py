"""What the decisions of docs/fidelity.md change on the bundled model: one short run for every option and seed.

    python benchmarks/fidelity.py --out runs/fidelity            # every run that is not there yet, then the results
    python benchmarks/fidelity.py --out runs/fidelity --list     # what is there, what is missing
    python benchmarks/fidelity.py --out runs/fidelity --collect  # the results and the table, of what is there

Adapters: `STEPS` steps on `elements` with the same four attentions skipped and the same batches, whatever the option;
loss and accuracy on val. Search: the masks that a search ends with, scored on val with neutral adapters (trained under
random masks, as in notebook 02). Merge: what a merge that is made otherwise would change, on the tuned adapters. Every
run is a file in --out, seed after seed, so the script can be stopped and started again, and several may run at once.
The results go to benchmarks/results/fidelity.json, the table into docs/fidelity.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

import eas_kit as eas
from eas_kit import merging, report
from eas_kit.cache import Busy, cached
from eas_kit.stability import score_masks

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "fidelity.json", ROOT / "docs" / "fidelity.md"

MASK = (2, 3, 8, 11)  # what a bandit's search on this task chose (benchmarks/results/03_train_pia.json, seed 0)
SEEDS, STEPS, BATCH, VAL = (0, 1, 2), 300, 8, 300
SHARED = {"batch_size": BATCH, "learning_rate": 1e-2, "lr_warmup_steps": 20, "mixed_precision": "bf16"}
SHARED |= {"progress": False}
SHAPE = {"skip_rank": 64, "adapt_rank": 32, "dropout": 0.0}
ADAPTERS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "pool over prompt and answer": {"pool": "sequence"},
    "plain sum of the down paths": {"path_factor": 1.0},
    "dense up-projections": {"groups": 1},
    "norm before the FFN, not g2": {"source": "ffn_norm"},
    "PIA base": {"parts": "base"},
    "PIA + exchange": {"parts": "exchange"},
}
SEARCH = {"num_skipped": 4, "warmup_steps": 200, "updates": 60, "train_steps_per_update": 1, "reward_batch_size": 32}
SEARCHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "multinomial draws": {"draws": "multinomial"},
    "update divided by 8": {"preference_lr": 5.0 / 8},
}


def _whole(found: Any) -> Any:
    """What `fit` and `search` return after Ctrl-C is half a run, and not to be kept."""
    if found.interrupted:
        raise KeyboardInterrupt
    return found


class Lab:
    """The model, the task, and the runs of one folder."""

    def __init__(self, folder: Path, steps: int = STEPS, search: dict[str, Any] = SEARCH, val: int = VAL) -> None:
        self.folder, self.steps, self.search_settings, self.val = folder, steps, search, val
        _, processor = eas.load_model("tiny")
        self.task = eas.load_task("elements", processor, sizes={"val": val})

    def jobs(self, seeds: tuple[int, ...] = SEEDS) -> dict[str, tuple[dict[str, Any], Callable[[], dict]]]:
        """Key and function of every run, by the name of its file, in the order in which they are worth having."""
        found = {}
        about = {"steps": self.steps, "val": self.val, "shared": SHARED, "version": eas.__version__}
        for seed in seeds:
            for name, changes in ADAPTERS.items():
                key = {"kind": "adapter", "eas": SHAPE | changes, "mask": MASK, "seed": seed} | about
                found[_file("adapter", name, seed)] = key, lambda c=changes, s=seed: self.tune(c, s)
            key = {"kind": "merge", "eas": SHAPE, "mask": MASK, "seed": seed} | about
            found[_file("merge", "as it is", seed)] = key, lambda s=seed: self.merges(s)
            for name, changes in SEARCHES.items():
                key = {"kind": "search", "search": self.search_settings | changes, "seed": seed} | about
                found[_file("search", name, seed)] = key, lambda c=changes, s=seed: self.search(c, s)
        found[_file("time", "parts", seeds[0])] = {"kind": "time", "eas": SHAPE, "mask": MASK}, self.times
        return found

    def made(self, name: str) -> Path:
        """The folder of adapters that several runs share, another one for other settings."""
        settings = [self.steps, self.search_settings, SHARED, SHAPE, MASK, eas.__version__]
        return self.folder / f"{name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"

    def net(self, changes: dict[str, Any], seed: int) -> eas.EASModel:
        torch.manual_seed(seed)
        return eas.attach(eas.load_model("tiny")[0], eas.EASConfig(**SHAPE | changes))

    def tune(self, changes: dict[str, Any], seed: int) -> dict[str, Any]:
        net = self.net(changes, seed)
        net.mask = MASK
        history = _whole(eas.fit(net, self.task, eas.TrainConfig(max_steps=self.steps, seed=seed, **SHARED)))
        if not changes:
            net.save_pretrained(self.made(f"tuned-{seed}"))
        found = self.task.evaluate(net, "val", batch_size=100)
        return {"loss": found["loss"], "accuracy": found["accuracy"], "seconds": history.seconds}

    def search(self, changes: dict[str, Any], seed: int) -> dict[str, Any]:
        config = eas.SearchConfig(**self.search_settings | changes, seed=seed, **SHARED)
        result = _whole(eas.search(self.net({}, seed), self.task, config))
        return {"mask": result.skipped, "preferences": result.preferences.tolist(), "seconds": result.seconds}

    def neutral(self) -> eas.EASModel:
        """Adapters trained under random masks alone, to score every mask with; made once."""
        folder = self.made("neutral")
        if not folder.is_dir():
            net = self.net({}, 1000)
            settings = self.search_settings | {"warmup_steps": self.steps - 1, "updates": 1}
            _whole(eas.search(net, self.task, eas.SearchConfig(**settings, seed=1000, **SHARED)))
            net.save_pretrained(folder)
        return eas.load(folder).eval()

    def merges(self, seed: int) -> dict[str, Any]:
        """What two other merges would change, on the tuned adapters of a seed, over 32 prompts of val."""
        folder = self.made(f"tuned-{seed}")
        if not folder.is_dir():
            self.tune({}, seed)
        net = eas.load(folder).eval()
        prompts = [self.task.collate([self.task.val[i]], answers=False) for i in range(min(32, self.val))]
        exact = [_first_logits(net, prompt) for prompt in prompts]
        with mock.patch.object(merging, "fold_linear", bias_of_merged_weight):
            other = [_first_logits(net, prompt) for prompt in prompts]
        scale = max(logits.abs().max() for logits in exact)
        changed = [(a - b).abs().max().item() / scale.item() for a, b in zip(exact, other, strict=True)]
        same = [bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in zip(exact, other, strict=True)]
        one = eas.static_merge(net, self.task, "val", num_examples=1, score_on="val", num_scored=100, seed=seed)
        keep = ("loss", "loss_static", "accuracy", "accuracy_static", "mean_logit_change", "same_token")
        return {
            "merged_bias": {"mean_change": statistics.mean(changed), "max_change": max(changed)}
            | {"same_token": sum(same) / len(same)},
            "one_row": {name: one.report[name] for name in keep},
        }

    def times(self) -> dict[str, Any]:
        """Prefill and a decoded token of the four steps of the ablation, in turn."""
        prompt, arms = self.task.collate([self.task.val[0]], answers=False), {}
        for name, parts in (("base", "base"), ("+ exchange", "exchange"), ("+ frozen bias", "frozen")):
            arms[name] = self.net({"parts": parts}, 0).eval()
            arms[name].mask = MASK
        arms["+ re-parameterised"] = lambda **inputs: arms["+ frozen bias"].generate(**inputs, merge=True)
        found = eas.measure.compare_latency(arms, prompt, new_tokens=32, repeats=15)
        return {
            name: {
                part: {k: v for k, v in times[part].items() if k != "runs"} for part in ("prefill", "decode_per_token")
            }
            for name, times in found["arms"].items()
        }


def bias_of_merged_weight(linear, factors, gain=None, shift=None):
    """As merging.fold_linear, but with W' b + c, of the already merged weight W', in place of W diag(g) b + c."""
    weight, _ = _FOLD(linear, factors, gain, shift)
    bias = F.linear(factors.bias[0].to(weight.dtype), weight)
    return weight, bias if linear.bias is None else bias + linear.bias


_FOLD = merging.fold_linear


@torch.no_grad()
def _first_logits(net: eas.EASModel, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """(1, 8, vocabulary): logits of a merged decoding of the prompt's last token and seven that repeat it."""
    cache = net.prefill(**prompt).past_key_values
    with eas.merged(net, cache, "per_prompt"):
        ids, out = prompt["input_ids"][:, -1:], []
        for _ in range(8):
            out.append(net(input_ids=ids, past_key_values=cache).logits)
    return torch.cat(out, 1)


def _file(kind: str, name: str, seed: int) -> str:
    return f"{kind}-{name.replace(' ', '_').replace('+', 'and').replace(',', '')}-seed{seed}"


def read(folder: Path, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
    """A result that is there already."""

    class Missing(Exception):
        pass

    def refuse() -> dict:
        raise Missing

    try:
        return cached(folder, name, json.loads(json.dumps(key)), refuse)
    except (Missing, Busy):
        return None


def collect(lab: Lab, seeds: tuple[int, ...] = SEEDS, score: bool = True) -> dict[str, Any]:
    """All that is there, as one record. score: the masks that the searches ended with, if they have not been yet."""
    there = {name: read(lab.folder, name, key) for name, (key, _) in lab.jobs(seeds).items()}

    def of(kind: str, name: str) -> list[dict]:
        rows = [(seed, there.get(_file(kind, name, seed))) for seed in seeds]
        return [{"seed": seed} | row for seed, row in rows if row is not None]

    record: dict[str, Any] = {
        "command": "python benchmarks/fidelity.py",
        "machine": report.machine(),
        "versions": report.versions(),
        "settings": {"steps": lab.steps, "batch": BATCH, "val": lab.val, "mask": MASK, "search": lab.search_settings},
        "adapters": {name: of("adapter", name) for name in ADAPTERS},
        "merge": of("merge", "as it is"),
        "search": {name: of("search", name) for name in SEARCHES},
        "time": there.get(_file("time", "parts", seeds[0])),
        "missing": [name for name, row in there.items() if row is None],
    }
    masks = {f"{name}/{row['seed']}": row["mask"] for name, rows in record["search"].items() for row in rows}
    if masks:
        key = {"kind": "scores", "masks": masks, "steps": lab.steps, "val": lab.val, "version": eas.__version__}

        def losses_of() -> dict[str, Any]:
            found = score_masks(lab.neutral(), lab.task, masks, limit=lab.val)
            return dict(zip(found["name"], found["loss"], strict=True))

        losses = cached(lab.folder, "scores", key, losses_of) if score else read(lab.folder, "scores", key) or {}
        for name, rows in record["search"].items():
            for row in rows:
                row["loss"] = losses.get(f"{name}/{row['seed']}")
    return record


# -- the table -----------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """What stands in docs/fidelity.md between the marks."""
    given = record["settings"]
    lines = [
        f"`elements`, split val ({given['val']} examples), attentions {list(given['mask'])} skipped,"
        f" {given['steps']} steps of batch {given['batch']}; mean ± sd over the seeds, the difference to the first row"
        " seed by seed.",
        "",
        "| adapters | seeds | loss | difference | accuracy | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    first = {row["seed"]: row for row in record["adapters"]["as it is"]}
    for name, rows in record["adapters"].items():
        both = [(row, first[row["seed"]]) for row in rows if row["seed"] in first]
        cells = [name, str(len(rows))]
        for part, form in (("loss", "{:.4f} ± {:.4f}"), ("accuracy", "{:.1%} ± {:.1%}")):
            cells.append(_spread([row[part] for row in rows], form))
            signed = form.replace("{:.", "{:+.", 1)
            cells.append(_spread([a[part] - b[part] for a, b in both], signed) if both and name != "as it is" else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| search | masks it ended with | their loss |", "| --- | --- | --- |"]
    for name, rows in record["search"].items():
        cells = [name, "; ".join(str(list(row["mask"])) for row in rows)]
        scored = [row["loss"] for row in rows if row["loss"] is not None]
        lines.append("| " + " | ".join([*cells, _spread(scored, "{:.3f} ± {:.3f}")]) + " |")
    if record["merge"]:
        bias, one = ([row[name] for row in record["merge"]] for name in ("merged_bias", "one_row"))
        lines += [
            "",
            f"Bias of the already merged weight: logits off by {_mean(bias, 'mean_change'):.1e} of their scale in the"
            f" mean, {max(row['max_change'] for row in bias):.1e} at most, the likeliest token another in"
            f" {1 - _mean(bias, 'same_token'):.0%} of the prompts. One row's merge for all rows: loss"
            f" {_mean(one, 'loss'):.4f} becomes {_mean(one, 'loss_static'):.4f}, accuracy {_mean(one, 'accuracy'):.1%}"
            f" becomes {_mean(one, 'accuracy_static'):.1%}.",
        ]
    if record["time"]:
        lines += ["", "| PIA, part by part | prefill, ms | a token, ms |", "| --- | --- | --- |"]
        for name, times in record["time"].items():
            ms = [f"{1000 * times[part]['median']:.2f}" for part in ("prefill", "decode_per_token")]
            lines.append(f"| {name} | {ms[0]} | {ms[1]} |")
    if record["missing"]:
        lines += ["", f"Not run yet: {len(record['missing'])} of the runs; `{record['command']}` goes on."]
    return "\n".join(lines)


def _mean(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "not run yet"
    return form.format(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def fill(record: dict[str, Any], page: Path) -> None:
    """The table into the page."""
    text = page.read_text(encoding="utf-8")
    start, end = "<!-- numbers:fidelity -->\n", "\n<!-- /numbers:fidelity -->"
    head, rest = text.split(start)
    page.write_text(head + start + table(record) + end + rest.split(end)[1], encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"), help="folder of the runs' files")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing")
    parser.add_argument("--collect", action="store_true", help="run nothing more")
    args = parser.parse_args(argv)
    lab = Lab(args.out)
    for name, (key, compute) in lab.jobs(tuple(args.seeds)).items():
        if args.list:
            print("there  " if read(lab.folder, name, key) is not None else "missing", name)
        elif not args.collect:
            began = time.perf_counter()
            try:
                cached(lab.folder, name, json.loads(json.dumps(key)), compute)
                print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            except Busy:
                print(f"{name}: another process is at it", flush=True)
    if not args.list:
        try:
            record = report.plain(collect(lab, tuple(args.seeds), score=not args.collect))
        except Busy:
            print("another process scores the masks, and will write the results", flush=True)
            return 0
        report.write_json(RESULTS, record)
        fill(record, PAGE)
        print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
