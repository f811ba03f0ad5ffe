"""Write the measured tables of README.md and of the bundled model's card from the files in benchmarks/results.

    python benchmarks/fill_readme.py            # rewrite the blocks between <!-- numbers:X --> and <!-- /numbers:X -->
    python benchmarks/fill_readme.py --check    # exit code 1 if they differ from the files

The files are copies of what notebooks leave in their run folder; `benchmarks/README.md` has the commands.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def probe() -> str:
    found = results("01_probe_redundancy")
    settings = found["parameters"]
    rows = []
    for name in settings["tasks"]:
        dense = found["metrics"]["dense"][name]
        rows.append([name, "0", f"{dense['loss']:.3f}", "", f"{dense['accuracy']:.1%}", ""])
        cells = {(r["kind"], r["k"]): r for r in found["metrics"]["probe"] if r["task"] == name}
        for k in settings["num_skipped"]:
            row = [name, str(k)]
            for metric, form in (("loss", "{:.3f} ± {:.3f}"), ("accuracy", "{:.1%} ± {:.1%}")):
                row += [form.format(cells[kind, k][metric], cells[kind, k][f"{metric}_sd"]) for kind in ("mha", "ffn")]
            rows.append(row)
    head = [
        "task",
        "k of 12 skipped",
        "loss, attentions",
        "loss, feed-forwards",
        "accuracy, attentions",
        "accuracy, feed-forwards",
    ]
    return (
        f"No tuning; split val, {settings['limit']} examples a mask, {settings['trials']} random masks a row (mean ± sd), the "
        f"same masks for both kinds, seed {found['seed']}. Accuracy: reading, every token of the answer right; definitions, tokens.\n\n"
        + table(head, rows)
    )


def search() -> str:
    found = results("02_search_with_bandit")
    settings, metrics = found["parameters"], found["metrics"]
    pairs = metrics["agreement of seeds"]
    by_method: dict[str, list[dict]] = {}
    for mask in metrics["masks"]:
        by_method.setdefault(mask["method"], []).append(mask)
    rows = [
        [
            method,
            str(len(masks)),
            "; ".join(str(m["mask"]) for m in masks) if method != "random" else "",
            f"{sum(m['loss'] for m in masks) / len(masks):.3f}",
            f"{min(m['loss'] for m in masks):.3f} to {max(m['loss'] for m in masks):.3f}",
        ]
        for method, masks in by_method.items()
    ]
    overlap, rank = (sum(p[name] for p in pairs) / len(pairs) for name in ("overlap", "rank_correlation"))
    return (
        f"Task {settings['task_name']}, {settings['num_skipped']} of 12 attentions, {len(settings['seeds'])} seeds, "
        f"{settings['updates']} updates of {settings['num_subnetworks']} subnetworks. Every mask is scored on split val "
        f"({metrics['nothing skipped']['count']} examples) with neutral adapters, trained under random masks; nothing skipped: "
        f"{metrics['nothing skipped']['loss']:.3f}. Between seeds: {overlap:.0%} of the skipped sites shared (chance "
        f"{pairs[0]['chance']:.0%}), rank correlation of the preferences {rank:.2f}.\n\n"
        + table(["masks chosen by", "how many", "skipped sites", "mean loss", "range"], rows)
    )


def tuning() -> str:
    found = results("03_train_pia")
    settings, metrics = found["parameters"], found["metrics"]
    rows = [
        [
            row["arm"],
            str(row["seeds"]),
            f"{row['test_accuracy']:.1%}"
            + (f" ± {row['test_accuracy_sd']:.1%}" if row["test_accuracy_sd"] is not None else ""),
            f"{row['test_loss']:.3f}",
            f"{row['trainable_share']:.2%}",
        ]
        for row in metrics["table"]
    ]
    test = {row["arm"]: 100 * row["test_accuracy"] for row in metrics["table"]}
    beside = "; ".join(
        f"k={k}: {test[f'pia k={k} bandit'] - test['pia']:+.1f} points against nothing skipped, "
        f"{test[f'pia k={k} bandit'] - test[f'pia k={k} random']:+.1f} against random, "
        f"{test[f'pia k={k} bandit'] - test[f'pia k={k} scorer']:+.1f} against the scorer"
        for k in settings["num_skipped"]
    )
    wanted = len(settings["seeds"])
    missing = any(row["seeds"] < wanted for row in metrics["table"] if row["arm"] != "zero_shot")
    unfinished = f" The comparison is unfinished: it asks for {wanted} seeds an arm." if missing else ""
    head = ["arm", "seeds", "test accuracy", "test loss", "trainable"]
    return (
        f"Task {settings['task_name']}, split test ({settings['test_limit']} examples), {settings['steps']} steps of batch "
        f"{settings['batch_size']} for every tuned arm (mean ± sd over the seeds that were run); guessing: {metrics['chance']:.1%}. "
        f"Zero-shot picks the likeliest option, the others write.{unfinished}\n\n"
        + table(head, rows)
        + f"\n\nThe bandit's masks, {beside}. Adapters with nothing skipped, against full tuning: "
        f"{test['pia'] - test['full']:+.1f}. {longer()}"
    )


def longer() -> str:
    """The adapters alone, given more steps: does the gap between skipping and not skipping stay?"""
    found = results("03_train_pia_longer")
    settings, rows = found["parameters"], {row["arm"]: row for row in found["metrics"]["table"]}
    said = {arm: f"{r['test_accuracy']:.1%} ± {r['test_accuracy_sd']:.1%}" for arm, r in rows.items()}
    skipped = f"pia k={settings['num_skipped'][0]} bandit"
    gap = 100 * (rows[skipped]["test_accuracy"] - rows["pia"]["test_accuracy"])
    return (
        f"After {settings['steps']} steps ({len(settings['seeds'])} seeds): `pia` {said['pia']}, `{skipped}` {said[skipped]}, "
        f"{gap:+.1f} points."
    )


def latency() -> str:
    found = results("04_merge_and_check")
    settings = found["parameters"]
    rows = [
        [
            str(r["k"]),
            r["part"],
            f"{r['unmerged']:.2f}",
            f"{r['condensed']:.2f}",
            f"{r['merged']:.2f}",
            f"{r['bound']:.2f}",
            f"{r['share of the bound']:.0%}",
        ]
        for r in found["metrics"]["speed"]
    ]
    head = ["k of 12 skipped", "part", "unmerged", "condensed", "merged", "bound 1 / (1 - share)", "merged / bound"]
    worst, count = found["metrics"]["largest relative difference"], found["metrics"]["prompts"]
    return (
        f"Speed against the dense model (above 1 is faster): median ratio of {settings['repeats']} rounds in which all variants "
        f"run in turn, {settings['new_tokens']} new tokens, {found['device']}. Merged prefill "
        f"includes the folding. Merged against unmerged logits: at most {worst:.1e} of their scale on {count} prompts. "
        "A merged layer also loses a norm, and shares are measured with noise: a little above the bound is possible.\n\n"
        + table(head, rows)
    )


def machine_of(found: dict) -> str:
    machine = found["machine"]
    return f"{machine['processor']}, {machine['device']}, torch {found['versions']['torch']}"


CONFORMS = {
    "plain": "exactly the formula, and merge",
    "tail": "the family's own norms or factors behind it, and merge",
    "variant": "norms with a bias or without a gain, or attention and feed-forward side by side",
    "hybrid": "only layers with softmax attention are sites",
    "moe": "layers with experts work unmerged and condensed, and refuse the fold",
    "refused": "by `attach`, by name",
}


def conformance() -> str:
    found = json.loads((RESULTS / "conformance.json").read_text())
    families = found["families"]
    rows = []
    for expect, what in CONFORMS.items():
        named = [name for name, family in families.items() if family["expect"] == expect]
        rows.append([f"{expect}: {what}", str(len(named)), ", ".join(named)])
    tests = [test for family in families.values() for test in family["properties"].values()]
    count = {result: sum(test["result"] == result for test in tests) for result in ("ok", "refused", "n.a.")}
    assert sum(count.values()) == len(tests), "a table with failures is not for the README"
    return (
        f"{len(families)} families, {len(tests)} tests of a property each: {count['ok']} hold, {count['refused']} are refused by name, "
        f"{count['n.a.']} the family itself cannot do; {found['seconds']:.0f} s on one thread, transformers {found['transformers']}.\n\n"
        + table(["result", "families", "which"], rows)
    )


def latency_shapes() -> str:
    """One table a file: whoever has measured a shape or a machine leaves benchmarks/results/latency_X.json."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("latency_*.json"))]
    return "\n\n".join(map(latency_shape, found)) or "Not measured yet; `benchmarks/README.md` has the commands."


def latency_shape(found: dict) -> str:
    model, settings = found["model"], found["settings"]
    rows = []
    for name, arm in found["arms"].items():
        ratio, roof = found["speedup"][name], arm["roofline"]

        def times(part: str, ratio: dict = ratio) -> str:
            return f"{ratio[part]['median']:.2f} ({ratio[part]['low']:.2f} to {ratio[part]['high']:.2f})"

        rows.append(
            [
                name,
                f"{1e3 * arm['prefill']['median']:.0f}",
                times("prefill"),
                f"{1e3 * arm['decode_per_token']['median']:.1f}",
                times("decode"),
                f"{arm['tokens_per_second']['median']:.1f}",
                times("total"),
                f"{arm['memory']['peak_mib'] / 1024:.2f}",
                f"{roof['bytes_per_token'] / 1e6:.0f}",
                f"{1e3 * roof['seconds_per_token']:.1f}",
                f"{roof['share_reached']:.0%}",
            ]
        )
    head = ["arm", "prefill ms", "x dense", "ms a token", "x dense", "tokens/s", "total x dense"]
    head += ["peak GiB", "MB read a token", "bound ms", "reached"]
    merges = "; ".join(f"{name}, {1e3 * took['median']:.0f} ms" for name, took in found["merge"].items())
    bounds = "; ".join(
        f"{k} skipped, {bound['prefill']['bound_with_norm']:.2f} and {bound['decode']['bound_with_norm']:.2f}"
        for k, bound in found["bounds"].items()
    )
    said = [
        f"**{model['name']}**: {model['class']} of random weights, {model['parameters'] / 1e6:.0f} M parameters (width {model['width']}, "
        f"{model['layers']} layers), {settings['dtype']}, {'compiled' if settings['compile'] else 'eager'}, batch {settings['batch']}, "
        f"{settings['prompt_tokens']} prompt and {settings['new_tokens']} new tokens, {settings['repeats']} rounds; {machine_of(found)}, "
        f"{found['bandwidth'] / 1e9:.1f} GB/s read. `{found['command']}`.",
        f"Merging alone, once a prompt: {merges}." if merges else "",
        f"Times faster if the skipped attentions and their norms took no time, prefill and decode: {bounds}."
        if bounds
        else "",
        *paid_back(found["arms"]),
        *(f"Left out: {name} ({reason})." for name, reason in found["left_out"].items()),
    ]
    arms = "; ".join(f"*{name}*: {arm['what']}" for name, arm in found["arms"].items() if name != "dense")
    peak = next(iter(found["arms"].values()))["memory"]["peak_is"]
    return (
        " ".join(filter(None, said))
        + "\n\n"
        + table(head, rows)
        + f"\n\nPeak: {peak}, uncompiled. {arms[0].upper() + arms[1:]}."
    )


def paid_back(arms: dict) -> list[str]:
    """After how many tokens the folding of a merge is won back, from the medians."""
    said = []
    for name in arms:
        others = [other for other in ("dense", name.replace("merged", "condensed")) if other in arms]
        if name.endswith("merged"):
            tokens = []
            for other in others:
                extra = arms[name]["prefill"]["median"] - arms[other]["prefill"]["median"]
                saved = arms[other]["decode_per_token"]["median"] - arms[name]["decode_per_token"]["median"]
                tokens.append(
                    f"about {max(extra / saved, 0):.0f} tokens against {other}"
                    if saved > 0
                    else f"never against {other}"
                )
            said.append(f"The folding of {name} is won back after {' and '.join(tokens)} (from the medians).")
    return said


def fold() -> str:
    if not (RESULTS / "fold.json").exists():
        return "Not measured yet; `benchmarks/README.md` has the command."
    found = results("fold")
    rows = []
    for run in found["runs"]:
        took = {name: 1e3 * each["median"] for name, each in (run["seconds"] | run["step_seconds"]).items()}
        faster, count = run["times_faster_than_dense"]["rank r"], run["multiply_accumulates"]
        rows.append(
            [
                str(run["width"]),
                str(run["rank"]),
                run["dtype"],
                f"{took['dense']:.0f}",
                f"{took['rank r']:.1f}",
                f"{faster['median']:.2f} ({faster['low']:.2f} to {faster['high']:.2f})",
                f"{count['dense'] / count['rank r']:.2f}",
                f"{took['mixing']:.1f}",
                *(f"{took[name]:.2f}" for name in ("bare", "unmerged", "low rank", "through W")),
            ]
        )
    head = ["d", "r", "stored in", "dense ms", "rank r ms", "times faster", "times fewer multiply-accumulates"]
    batch = found["settings"]["batch"]
    head += [f"mixing for {batch} prompts ms", "step: bare ms", "unmerged", "low rank", "through W"]
    return (
        f"Gate and up of one layer, calculated in float32, {found['settings']['repeats']} rounds; {machine_of(found)}. "
        f"`{found['command']}`. *Step*: these two linears for one token of {batch} rows each, bare, behind the adapter, behind the "
        "condensed adapter, and with its factors carried on through the linears.\n\n" + table(head, rows)
    )


def headline() -> str:
    names = ("01_probe_redundancy", "02_search_with_bandit", "03_train_pia", "04_merge_and_check")
    probed, searched, tuned, merged = (results(name)["metrics"] for name in names)
    cost = {(r["task"], r["kind"], r["k"]): r["loss_change"] for r in probed["probe"]}
    alone = {(task, r["kind"], r["site"]): r["loss_change"] for task, rows in probed["single"].items() for r in rows}
    others = max(
        change for (task, kind, site), change in alone.items() if (task, kind) == ("reading", "ffn") and site > 0
    )
    attention = max(change for (task, kind, _), change in alone.items() if (task, kind) == ("reading", "mha"))
    accuracy = {(r["task"], r["kind"], r["k"]): r["accuracy"] for r in probed["probe"]}
    loss = {
        method: [m["loss"] for m in searched["masks"] if m["method"] == method]
        for method in ("bandit", "single_ablation", "random")
    }
    test = {r["arm"]: f"{r['test_accuracy']:.1%} ± {r['test_accuracy_sd']:.1%}" for r in tuned["table"]}
    speed = {(r["k"], r["part"]): r["merged"] for r in merged["speed"]}
    shape = results("latency_cpu_1B")
    name = next(name for name in shape["arms"] if name.endswith("merged"))
    larger = {part: shape["speedup"][name][part]["median"] for part in ("decode", "total")}
    layers = shape["model"]["layers"]
    return (
        "On the bundled model, measured:\n\n"
        f"- **Probe.** Skipping 4 of 12 attentions at random, untuned, costs {cost['reading', 'mha', 4]:.2f} nats a token on "
        f"pictures and facts and {cost['definitions', 'mha', 4]:.2f} on dictionary text; 4 feed-forwards cost "
        f"{cost['reading', 'ffn', 4]:.2f} and {cost['definitions', 'ffn', 4]:.2f}. Much hangs on one site: the first feed-forward "
        f"alone costs {alone['reading', 'ffn', 0]:.2f} on pictures and facts, each other one at most {others:.2f}, an attention up "
        f"to {attention:.2f}. So attentions are the more redundant ones on the mean, and masks that spare that site can turn it "
        f"around (accuracy with 4 skipped: {accuracy['reading', 'mha', 4]:.0%} without attentions, "
        f"{accuracy['reading', 'ffn', 4]:.0%} without feed-forwards).\n"
        f"- **Search.** The bandit's masks of 4 end at {min(loss['bandit']):.2f} to {max(loss['bandit']):.2f} of loss, random ones "
        f"at {min(loss['random']):.2f} to {max(loss['random']):.2f}; leaving out the four that cost least alone, without a search, "
        f"{loss['single_ablation'][0]:.2f}.\n"
        f"- **Tuning** on `elements`, test accuracy at equal steps: full tuning {test['full']}, LoRA {test['lora']}, adapters "
        f"with nothing skipped {test['pia']}; with 4 of 12 attentions skipped by the bandit {test['pia k=4 bandit']}, by the best "
        f"training-free score {test['pia k=4 scorer']}, at random {test['pia k=4 random']}; with 6, {test['pia k=6 bandit']}, "
        f"{test['pia k=6 scorer']} and {test['pia k=6 random']}.\n"
        f"- **Merge.** The logits stay within {merged['largest relative difference']:.0e} of the unmerged ones' scale. With 4 skipped "
        f"the merged model decodes {speed[4, 'decode']:.2f} times as fast as the dense one, and is {speed[4, 'total']:.2f} times as "
        f"fast over an answer of 32 tokens, folding included. At 1 B parameters of random weights, {shape['arms'][name]['k']} of "
        f"{layers} attentions skipped, on a CPU: {larger['decode']:.2f} times, and {larger['total']:.2f} times over 16 tokens, which "
        "are too few to win the folding back. No GPU was measured. The paper's abstract reports 2.2 times LaVIN's speed (in "
        "version 2) and about 20 % for LLaVA (version 3), on ScienceQA; no model of that size was run here.\n\n"
        "All tables, with their spreads, are [below](#results)."
    )


def demo() -> str:
    entries = results("demo")["notebooks"]
    each = ", ".join(f"{e['notebook'][:2]} {e['seconds']:.0f} s" for e in entries)
    return (
        f"`make demo` ran its notebooks in {sum(e['seconds'] for e in entries) / 60:.1f} minutes after the installation "
        f"({each}), at most {max(e['peak_mb'] for e in entries):.0f} MB resident in a notebook's kernel (the runner beside it takes "
        "some 120 MB more), on two CPU cores without a GPU."
    )


def paper_sizes() -> str:
    found = results("paper_sizes")
    operations = [
        [r["what"], f"{r['measured']:.2f} G", f"{r['published']} G", f"{r['difference']:+.2%}"]
        for r in found["operations"]
    ]
    shares = [
        [r["what"], f"{r['measured']:.3f} %", f"{r['published']:.2g} %", f"{r['difference']:+.3f} points"]
        for r in found["shares"]
        if r["published"] is not None
    ]
    without = next(r for r in found["shares"] if r["published"] is None)
    sizes = {r["model"]: r["parameters"] / 1e9 for r in found["models"]}
    columns = {
        "weights": "weights",
        "inference_dense": "inference, dense",
        "inference_unmerged": "adapters, unmerged",
        "inference_merged": "merged, one prompt",
        "training": "training adapters",
        "training_checkpointing": "the same, checkpointing",
        "training_full": "full tuning, in bfloat16",
    }
    memory = [
        [f"{r['model']} ({sizes[r['model']]:.2f} G)", *(f"{r[c] / 2**30:.1f}" for c in columns)]
        for r in found["memory"]
    ]
    return (
        table(["multiply-accumulates, trained share", "here", "paper", "difference"], operations + shares)
        + f"\n\nLaVIN's share holds with what else LaVIN trains; its adapters in the language model alone are "
        f"{without['measured']:.3f} %. Memory in GiB, in bfloat16, estimated for batch 1, {found['tokens']['LLaVA']} prompt tokens "
        "and 64 new ones, 8 attentions skipped, ranks 256 and 128; a merged model holds its own weights and the folded copies:\n\n"
        + table(["model (parameters)", *columns.values()], memory)
        + f"\n\nAll of it took {found['cpu_seconds']:.0f} s of one CPU core and at most {found['resident_mb']['peak']:.0f} MB of memory, "
        f"{found['resident_mb']['before']:.0f} MB of them the libraries."
    )


def real_data() -> str:
    """The pipeline of notebook 05 on made-up records in ScienceQA's form."""
    columns = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
    rows, said = [], []
    for name in ("05_your_data_your_model", "05_your_data_your_model_200"):
        found = results(name)
        metrics, given = found["metrics"], found["parameters"]
        for arm, one in {"untuned": metrics["untuned"], **metrics["tuned"]}.items():
            mask = f" {metrics['masks'][arm]}" if metrics["masks"].get(arm) else ""
            shares = [f"{one['columns'][c]:.1%}" for c in columns]
            rows.append(
                [str(given["made_up_records"]), arm + mask, f"{one['accuracy']:.1%}", *shares, str(one["unparsed"])]
            )
        same, of = metrics["answers equal when merged"]
        said.append(
            f"{given['made_up_records']} records: {metrics['untuned']['count']} test questions, guessing {metrics['chance']:.1%};"
            f" merged logits within {metrics['merge relative difference']:.0e} of their scale, {same} of {of} answers the same"
        )
    return (
        table(["records", "mask", "Avg", *columns, "unparsed"], rows)
        + f"\n\n{given['num_skipped']} of 12 attentions skipped, {given['steps']} steps an arm, seed {found['seed']}, "
        f"template `{found['template']}`. {'. '.join(said)}. The untuned model takes the likeliest option, tuned ones write. "
        "One seed and few steps: the pipeline at work, not a ranking of masks."
    )


def data_loading() -> str:
    found = results("data_loading")
    rows = [
        [
            name,
            f"{one['records']:,}",
            f"{one['json_mb']:.0f}",
            f"{one['seconds']:.1f} ({one['seconds_range'][0]:.1f} to {one['seconds_range'][1]:.1f})",
            f"{one['peak_mb']:.0f}",
            f"{one['kept_mb']:.0f}",
        ]
        for name, one in found["data_sets"].items()
    ]
    machine, library = found["machine"], max(one["libraries_mb"] for one in found["data_sets"].values())
    return (
        table(["task", "records", "MB of JSON", "seconds", "MB more at the peak", "MB kept"], rows)
        + f"\n\nMedian of {found['repeats']} loads (range), each in a process of its own that held {library:.0f} MB of libraries before; every "
        f"record checked, every picture looked up, none opened. {machine['processor']}, one process. `{found['command']}`."
    )


PRECISIONS = {"no": "float32"}
OF_EVERY_ROW = (
    {"column": "accuracy", "unit": "%", "measured": "test_accuracy", "scale": 100},
    {"column": "trained", "unit": "%", "measured": "trainable_share", "scale": 100},
    {"column": "MACs", "unit": "M", "measured": "final_macs", "scale": 1e-6},
)


def tables() -> str:
    """The paper's tables on the bundled model, with what was published of the paper's own."""
    path = RESULTS / "tables.json"
    if not path.exists():
        return "Not measured yet; `benchmarks/README.md` has the commands."
    import pandas as pd

    from eas_kit.paper import read_tables
    from eas_kit.tables import UNKNOWN, beside

    found, paper, rows = results("tables"), read_tables(), []
    runs = pd.DataFrame(found["runs"])
    times = pd.DataFrame(found["times"]) if found["times"] else None
    for (number, task), own in runs.groupby(["table", "task"]):
        speed = [c for c in paper[number]["columns"] if c["measured"] == "speed"]
        cells = beside(paper[number] | {"columns": [*OF_EVERY_ROW, *speed]}, own, times).set_index(["row", "column"])
        several = runs[runs["table"] == number]["task"].nunique() > 1
        for row in paper[number]["rows"]:
            mine = cells.loc[row["row"]]
            if not mine.loc["accuracy", "runs"]:
                continue
            (loss,) = own[own["row"] == row["row"]].groupby("row")["test_loss"].mean()
            accuracy, sd = mine.loc["accuracy", ["measured", "sd"]]
            fast = mine.loc[speed[0]["column"], "measured"] if speed else float("nan")
            published = [
                f"{c['column']} {row['cells'][c['column']]['value']:g} {c['unit']}"
                for c in paper[number]["columns"]
                if row["cells"][c["column"]] is not None
            ]
            rows.append(
                [
                    number,
                    row["row"] + (f", {task}" if several else ""),
                    f"{k:g}" if (k := own[own["row"] == row["row"]]["k"].iloc[0]) else "",
                    str(mine.loc["accuracy", "runs"]),
                    f"{accuracy:.1f}%" + ("" if pd.isna(sd) else f" ± {sd:.1f}%"),
                    f"{loss:.3f}",
                    f"{mine.loc['trained', 'measured']:.2f}%",
                    f"{mine.loc['MACs', 'measured']:.0f}",
                    "" if pd.isna(fast) else f"{fast:.2f}",
                    ", ".join(published) or UNKNOWN,
                ]
            )
    said = [
        f"{which}: {of['steps']} steps of batch {of['batch_size']}, {of['test_limit']} examples of test, ranks {of['skip_rank']} and "
        f"{of['adapt_rank']}, {PRECISIONS.get(of['mixed_precision'], of['mixed_precision'])}"
        for which, of in found["settings"].items()
    ]
    known = sum(cell is not None for t in paper.values() for row in t["rows"] for cell in row["cells"].values())
    every = sum(len(row["cells"]) for t in paper.values() for row in t["rows"])
    head = [
        "table",
        "row",
        "skipped here",
        "runs",
        "test accuracy",
        "test loss",
        "trained",
        "MACs, M",
        "decode, times faster",
        "published, of the paper's model",
    ]
    return (
        f"{'; '.join(said)}; {found['machine']['processor']}. Mean ± sd over seeds. *MACs*: millions of multiply-accumulates of the decoder "
        "layers for one prompt, adapters merged away where that is exact. *Decode*: against the table's first row or, in Table 6, against "
        f"`base`, merged where the row is; rows were timed one after the other, and again, so it may be a tenth off (the tables of speed below "
        f"are of rounds that alternate). Of the paper's {every} figures that `data/paper_tables.json` has room for, {known} are known to us.\n\n"
        + table(head, rows)
    )


BLOCKS = {
    "headline": headline,
    "demo": demo,
    "probe": probe,
    "search": search,
    "tuning": tuning,
    "tables": tables,
    "latency": latency,
    "conformance": conformance,
    "latency_shapes": latency_shapes,
    "fold": fold,
    "paper_sizes": paper_sizes,
    "real_data": real_data,
    "data_loading": data_loading,
}
FILES = {ROOT / "README.md": tuple(BLOCKS), ROOT / "eas_kit/models/tiny/weights/README.md": ("tuning",)}


def filled(path: Path) -> str:
    text = path.read_text()
    for name in FILES[path]:
        pattern = rf"(<!-- numbers:{name} -->\n).*?(<!-- /numbers:{name} -->)"
        text, count = re.subn(pattern, lambda m, w=BLOCKS[name]: f"{m[1]}{w()}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{path} has {count} blocks numbers:{name}, wanted one")
    return text


def main() -> None:
    different = [path for path in FILES if filled(path) != path.read_text()]
    if "--check" in sys.argv[1:]:
        sys.exit(bool(different))
    for path in different:
        path.write_text(filled(path))
        print(f"{path.relative_to(ROOT)} rewritten")


if __name__ == "__main__":
    main()
