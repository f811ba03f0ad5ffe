"""Small made-up results, in the library's own forms, for the tests of figures, live displays and widgets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd

SITES, UPDATES, SKIPPED = 7, 11, 3


def search_history(sites: int = SITES, updates: int = UPDATES, k: int = SKIPPED, seed: int = 0) -> list[dict]:
    """Records as the bandit writes them."""
    rng = np.random.default_rng(seed)
    preferences, records = np.zeros(sites), []
    for update in range(1, updates + 1):
        preferences = preferences + rng.normal(size=sites) * 0.1
        losses = rng.uniform(0.3, 0.9, size=3)
        lowest = sorted(np.argsort(preferences, kind="stable")[:k].tolist())
        record = {"update": update, "preferences": preferences.tolist(), "losses": losses.tolist()}
        records.append({**record, "rewards": np.exp(-losses).tolist(), "skipped": lowest, "counts": [update] * sites})
    return records


def search_result(**arguments) -> SimpleNamespace:
    history = search_history(**arguments)
    last = history[-1]
    return SimpleNamespace(
        history=history,
        preferences=np.array(last["preferences"]),
        skipped=tuple(last["skipped"]),
        kinds=("mha",),
        steps=[{"step": i + 1, "loss": 1.0 / (i + 1)} for i in range(5)],
    )


def probe_frame() -> pd.DataFrame:
    rows = [{"kind": "dense", "num_skipped": 0, "trial": 0, "loss": 0.25, "accuracy": 0.95}]
    for kind, cost in (("mha", 0.1), ("ffn", 0.4)):
        for k in (1, 2, 5):
            for trial in range(3):
                loss = 0.25 + cost * k * (0.8 + 0.2 * trial)
                rows.append({"kind": kind, "num_skipped": k, "trial": trial, "loss": loss, "accuracy": 1 / (1 + loss)})
    return pd.DataFrame(rows)


def site_frame() -> pd.DataFrame:
    costs = {"mha": [0.5, 0.01, 0.03], "ffn": [3.0, 0.2, -0.01]}
    rows = [(kind, layer, change) for kind, changes in costs.items() for layer, change in enumerate(changes)]
    return pd.DataFrame(rows, columns=["kind", "layer", "loss_change"])


def scores() -> pd.DataFrame:
    return pd.DataFrame({"ablation": [0.3, 0.1, 0.2, 0.9, 0.05], "cosine": [0.1, 0.9, 0.8, 0.2, 0.3]})


def arms() -> pd.DataFrame:
    rows = [("zero-shot", 0.4, 1.0), ("LoRA", 0.9, 1.0), ("PIA, 4 skipped", 0.95, 1.25), ("PIA", 0.93, 0.98)]
    return pd.DataFrame(
        [{"arm": a, "seed": s, "accuracy": acc + 0.01 * s, "speedup": v} for a, acc, v in rows for s in (0, 1, 2)]
    )


def latencies() -> dict:
    """As measure.compare_latency returns it."""

    def part(median: float) -> dict:
        return {"low": median * 0.9, "median": median, "high": median * 1.2, "runs": [median]}

    dense, merged = ({"prefill": part(p), "decode": part(d)} for p, d in ((0.040, 0.200), (0.032, 0.150)))
    speedup = {
        "dense": {"prefill": part(1.0), "decode": part(1.0)},
        "merged": {"prefill": part(1.26), "decode": part(1.34)},
    }
    return {"baseline": "dense", "repeats": 7, "arms": {"dense": dense, "merged": merged}, "speedup": speedup}


def spendings() -> dict:
    """As measure.time_parts returns it, of two variants; seconds."""

    def spent(**milliseconds: float) -> dict:
        parts = ("vision", "attention", "ffn", "adapters", "merging", "other")
        return {part: {"median": milliseconds.get(part, 0.0) / 1e3} for part in parts}

    dense = {"prefill": spent(vision=2, attention=5, ffn=4, other=1), "decode": spent(attention=40, ffn=50, other=10)}
    folded = {
        "prefill": spent(vision=2, attention=3, ffn=4, adapters=2, merging=9, other=1),
        "decode": spent(attention=20, ffn=50, adapters=1, other=9),
    }
    whole = spent(vision=2, attention=45, ffn=54)
    return {
        "dense": {"repeats": 3, "seconds": dense | {"total": whole}},
        "merged": {"repeats": 3, "seconds": folded | {"total": whole}},
    }


def examples() -> list[dict]:
    board = (np.arange(24 * 24).reshape(24, 24) % 256).astype(np.uint8)
    return [
        {"images": [board], "question": "What is the sum of the top row, a < b?", "choices": ("3", "5"), "answer": "5"},
        {"images": (), "question": "Which element has atomic number 26?", "choices": (), "answer": "iron"},
        {"images": (board[:, :12],), "question": "Count the sevens.", "answer": "2"},
    ]


def tuned_runs() -> pd.DataFrame:
    """Runs as of `compare.run_arms`, of a model of 7 layers: nothing skipped, attentions, feed-forwards, layers."""
    rows = [{"arm": "pia", "k": 0, "candidates": "mha", "mask": [], "test_accuracy": 0.9, "chosen_by": None}]
    masks = {"mha": [[5, 6], [2, 5, 6]], "ffn": [[8, 13], [8, 9, 13]], "layer": [[3, 6], [1, 3, 6]]}
    for at, (candidates, some) in enumerate(masks.items()):
        for mask in some:
            arm = {"arm": f"pia k={len(mask)} bandit {candidates}", "k": len(mask), "candidates": candidates}
            rows.append(
                {**arm, "mask": mask, "test_accuracy": 0.9 - 0.05 * len(mask) - 0.1 * at, "chosen_by": "bandit"}
            )
    rows.append({**rows[1], "arm": "pia k=2 random", "chosen_by": "random", "test_accuracy": 0.11})
    runs = [{**row, "method": "pia", "seed": seed} for row in rows for seed in (0, 1)]
    return pd.DataFrame([{**run, "test_accuracy": run["test_accuracy"] + 0.01 * run["seed"]} for run in runs])


def beside_published() -> pd.DataFrame:
    nan = float("nan")
    rows = [
        ("full", 95.0, 1.5, 3, 90.0),
        ("EAS8", 91.0, nan, 1, nan),
        ("DAS", nan, nan, 0, 88.0),
        ("none", nan, nan, 0, nan),
    ]
    names = ("row", "measured", "sd", "runs", "published")
    return pd.DataFrame(
        [{"table": "1", "column": "Avg", "unit": "%", **dict(zip(names, row, strict=True))} for row in rows]
    )


def every_figure() -> dict:
    """One figure of each kind, made by the public functions."""
    from eas_kit import figures as f

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 701))
    masks = pd.DataFrame(
        {"method": ["bandit"] * 2 + ["random"] * 3, "loss": [0.4, 0.5, 0.7, 0.9, 0.6], "skipped": [[1]] * 5}
    )
    return {
        "preference_heatmap": f.preference_heatmap(search_result()),
        "preference_heatmap, kinds": f.preference_heatmap(search_history(sites=14), site_kinds=("mha", "ffn")),
        "preference_heatmap, row": f.preference_heatmap(rng.normal(size=13), num_skipped=3),
        "search_figure": f.search_figure(search_result()),
        "search_figure, long": f.search_figure(search_history(sites=32, updates=500)),
        "search_playback": f.search_playback(search_result()),
        "probe_curves": f.probe_curves(probe_frame()),
        "single_site_bars": f.single_site_bars(site_frame(), clip=1.0),
        "scorer_comparison": f.scorer_comparison(scores(), 2),
        "agreement_matrix": f.agreement_matrix({"seed 0": [1, 2], "seed 1": [2, 3]}),
        "mask_comparison": f.mask_comparison(masks, baseline=0.35),
        "training_curves": f.training_curves({"a": np.linspace(3, 1, 2000), "b": np.linspace(3, 2, 2000)}),
        "arms_accuracy": f.arms_accuracy(arms(), chance=0.25),
        "arms_accuracy, fitted": f.arms_accuracy(arms(), zero=False),
        "accuracy_vs_speed": f.accuracy_vs_speed(arms()),
        "accuracy_vs_speed, chosen": f.accuracy_vs_speed(arms(), chosen="PIA, 4 skipped"),
        "time_shares": f.time_shares(spendings()),
        "merge_scatter": f.merge_scatter(logits, logits + 1e-7),
        "latency_bars": f.latency_bars(latencies()),
        "measured_beside_published": f.measured_beside_published(beside_published(), "Avg"),
        "redundancy_and_accuracy": f.redundancy_and_accuracy(probe_frame(), tuned_runs(), dense=0.9),
        "skipped_sites": f.skipped_sites(tuned_runs(), num_layers=7),
        "gallery": f.gallery(examples(), predictions=["5", "gold", "2"]),
    }
