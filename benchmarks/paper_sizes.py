"""The papers' models without their weights: parameters, multiply-accumulates and memory, beside the published numbers.

    python benchmarks/paper_sizes.py                       a few seconds, no GPU, no download
    python benchmarks/paper_sizes.py --out FILE.json       (default: results/paper_sizes.json)

Models are built from the configurations in `eas_kit.models.shapes` on the meta device; operations are counted by
torch.utils.flop_counter. The published numbers are those of the paper (arXiv 2403.15226), which calls
multiply-accumulates FLOPs.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

import eas_kit as eas
from eas_kit import baselines
from eas_kit.meta import meta_model
from eas_kit.models import METER_SIZES, PAPER_SIZES
from eas_kit.models.meter import paper_size
from eas_kit.sites import unwrap

LLAVA_TOKENS = 691  # what the paper's Table 1 works out at; 576 of them are the image's
LAVIN_TOKENS = 262
METER_TOKENS = 40
METER_RANK = 144  # of PIA as published; here of DAS and Adapter, too
LLAVA = eas.EASConfig(skip_rank=256, adapt_rank=128, groups=2)
LAVIN = eas.EASConfig(skip_rank=32, adapt_rank=8, groups=2)
G = 1e9


def bottlenecks(config: str, rank: int, tokens: int) -> float:
    """G multiply-accumulates that a plain bottleneck adapter (d to r to d) after every feed-forward adds."""
    model = meta_model(config, attn_implementation="eager")
    decoder = model.get_decoder()
    inputs = {
        "inputs_embeds": torch.empty(1, tokens, decoder.config.hidden_size, dtype=model.dtype, device="meta"),
        "attention_mask": torch.empty(1, 1, tokens, tokens, dtype=model.dtype, device="meta"),
        "use_cache": False,
    }

    def cost() -> int:
        found = eas.measure.count_flops(decoder, lambda: decoder(**inputs))
        return found["total"] + found["other"]

    plain = cost()
    baselines.bottlenecks(model, rank)
    return (cost() - plain) / G


def lavin_extras() -> int:
    """What LaVIN trains besides the adapters in the language model: in front of every attention of CLIP ViT-L/14 an
    adapter of rank 8 (of the same build as PIA at a kept attention), the neck from image to text, and two modality
    embeddings. The sizes are LaVIN's (arXiv 2305.15023).
    """
    with torch.device("meta"):
        parts = [eas.PIA(1024, 8, groups=2, paths=1) for _ in range(24)]
        parts += [nn.Linear(1024, 128), nn.Linear(128, 4096), nn.Embedding(2, 4096)]
    return sum(p.numel() for part in parts for p in part.parameters())


def active(config: str, adapters: eas.EASConfig, mask: range) -> tuple[int, int]:
    """Parameters of the adapters that a mask uses, and of the language model, counted on an attached model."""
    net = eas.attach(meta_model(config), adapters)
    net.mask = mask
    found = eas.measure.parameters(net)
    return found["active"]["total"], found["language_model"]


def operations() -> list[dict]:
    def total(config: str, tokens: int, mask: range = range(0)) -> float:
        return eas.measure.flops(config, tokens=tokens, mask=mask)["total"] / G

    llama, llava = total("llama-7b", LAVIN_TOKENS), total("llava-1.5-7b", LLAVA_TOKENS)
    less = {k: total("llava-1.5-7b", LLAVA_TOKENS, range(k)) - llava for k in (1, 8, 12)}
    rows = [
        ("LLaMA-7B, decoder layers, 262 tokens", llama, 1714.8),
        ("the same, 12 attentions merged away", total("llama-7b", LAVIN_TOKENS, range(12)), 1497.1),
        ("LLaVA-1.5-7B, 691 tokens: 1 attention less", less[1], -50.26),
        ("8 attentions less", less[8], -402.1),
        ("12 attentions less", less[12], -603.0),
        ("a plain adapter (rank 128) in all 32 layers", bottlenecks("llava-1.5-7b", 128, LLAVA_TOKENS), 23.2),
    ]
    return [
        {"what": what, "measured": measured, "published": published, "difference": measured / published - 1}
        for what, measured, published in rows
    ]


def shares() -> list[dict]:
    rows = []
    for k, published in ((8, 0.78), (12, 0.90)):
        used, language = active("llava-1.5-7b", LLAVA, range(k))
        rows.append((f"LLaVA EAS{k}: rank 256 skipped, 128 kept", used / language, published))
    used, language = active("llama-7b", LAVIN, range(12))
    rows.append(
        ("LaVIN EAS12: rank 32 skipped, 8 kept, and what else LaVIN trains", (used + lavin_extras()) / language, 0.11)
    )
    rows.append(("the same, adapters in the language model alone", used / language, None))
    plain, _ = active("llama-7b", LAVIN, range(0))
    rows.append(
        (
            "LaVIN itself (3.8 M published): rank 8 everywhere",
            (plain + lavin_extras()) / language,
            100 * 3.8e6 / language,
        )
    )
    return [
        {
            "what": what,
            "measured": 100 * measured,
            "published": published,
            "difference": None if published is None else 100 * measured - published,
        }
        for what, measured, published in rows
    ]


def models() -> list[dict]:
    rows = []
    for name in PAPER_SIZES:
        found, sites = eas.measure.parameters(name), eas.describe(name)
        rows.append(
            {
                "model": name,
                "parameters": found["total"],
                "language_model": found["language_model"],
                "sites": len(sites),
                "mergeable": int(sites.mergeable.sum()),
                "flops": eas.measure.flops(name, tokens=LLAVA_TOKENS)["total"] / G,
                "flops_without_8": eas.measure.flops(name, tokens=LLAVA_TOKENS, mask=range(8))["total"] / G,
            }
        )
    return rows


def meter() -> list[dict]:
    """The rows of Table 4 at METER's real size, for VQA at 384 pixels unless the name of a task says otherwise.

    `trained`: parameters without the head; `share`: of the model, in %, without the head, and with it for each task.
    `macs`: G multiply-accumulates of one example (`published`: the paper's), of rows that skip with the k sites that
    save least and most. The last row is one of NLVR2's two passes.
    """
    rank = {"skip_rank": METER_RANK, "adapt_rank": 0}
    layers = rank | {"kinds": ("layer",), "adapter": "bottleneck"}
    rows = []

    def add(what: str, prepare: Callable[[nn.Module], nn.Module], k: int = 0, published: float | None = None) -> None:
        trained, share = {}, {}
        for name in METER_SIZES:
            model = meta_model(name)
            size, head, net = count(model), count(model.head), prepare(model)
            if k:
                net.mask = range(k)
                used = eas.measure.parameters(net)["active"]["total"]
            else:
                used = sum(p.numel() for p in net.parameters() if p.requires_grad)
            trained[name] = used - head
            share |= {} if share else {"no head": 100 * trained[name] / size}
            share[name] = 100 * used / size
        net = prepare(meta_model("meter-vqa"))
        macs = [macs_without(net, chosen) for chosen in extremes(net, k)] if k else [meter_macs(net)]
        rows.append({"what": what, "trained": trained["meter-vqa"], "share": share, "macs": macs})
        rows[-1]["published"] = published

    def attached(settings: dict) -> Callable[[nn.Module], nn.Module]:
        return lambda model: eas.attach(model, eas.EASConfig(**settings))

    add("full tuning", lambda model: baselines.full_tuning(model)[0], published=93.2)
    add("LoRA, rank 8", lambda model: baselines.lora(model, rank=8)[0])
    add(f"Adapter, rank {METER_RANK}", lambda model: baselines.bottlenecks(model, rank=METER_RANK)[0])
    add(f"DAS4, rank {METER_RANK}", attached(layers), k=4)
    add(f"EAS4, rank {METER_RANK}", attached(rank), k=4)
    add(f"EAS8, rank {METER_RANK}", attached(rank), k=8)
    one_pass = meter_macs(meta_model(paper_size("vqa", 288)))
    return [*rows, {"what": "one of NLVR2's two passes", "macs": [one_pass], "published": 52.9}]


def extremes(net: eas.EASModel, k: int) -> tuple[list[int], list[int]]:
    """The k sites that save least, and most."""
    lane = net.base.config.cross_modal_config.num_hidden_layers  # its sites cost the same
    alone = {first: macs_without(net, [first]) for first in range(0, net.num_sites, lane)}
    order = sorted(range(net.num_sites), key=lambda site: -alone[site - site % lane])
    return order[:k], order[-k:]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def macs_without(net: eas.EASModel, mask: list[int]) -> float:
    net.mask = mask
    return meter_macs(net)


def meter_macs(net: nn.Module) -> float:
    """G multiply-accumulates of the whole model, projections and head included."""
    base = net.get_base_model() if hasattr(net, "get_base_model") else unwrap(net)
    found = eas.measure.flops(net, base.eas_inputs(METER_TOKENS))
    return (found["total"] + found["other"]) / G


def memory(names: tuple[str, ...] = ("vicuna-7b", "llava-1.5-7b", "qwen2.5-vl-7b")) -> list[dict]:
    """Bytes, in bfloat16, of each model: dense, with 8 attentions skipped and adapters, and in training."""
    setting = {"dtype": "bfloat16", "prompt_tokens": LLAVA_TOKENS, "new_tokens": 64}
    skipping = {"eas": LLAVA, "mask": range(8)}
    rows = []
    for name in names:
        dense = eas.estimate_memory(name, **setting, training=True)  # full tuning
        tuned = eas.estimate_memory(name, **setting, **skipping, training=True)
        sparing = eas.estimate_memory(name, **setting, **skipping, training=True, gradient_checkpointing=True)
        rows.append(
            {
                "model": name,
                "weights": sum(dense.weights.values()),
                "cache_dense": dense.cache["keys_values"],
                "cache_skipping": tuned.cache["keys_values"],
                "inference_dense": dense.totals["inference"],
                "inference_unmerged": tuned.totals["inference"],
                "inference_merged": tuned.totals["inference_merged"],
                "inference_low_rank": tuned.totals["inference_low_rank"],
                "training": tuned.totals["training"],
                "training_checkpointing": sparing.totals["training"],
                "training_full": dense.totals["training"],
                "parts": {
                    "weights": tuned.weights,
                    "adapters": tuned.adapters,
                    "merge": tuned.merge,
                    "activations": tuned.activations | {"training_checkpointing": sparing.activations["training"]},
                    "training": tuned.training,
                },
            }
        )
    return rows


def resident() -> float:
    """MB that this process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def show(title: str, rows: list[dict], form: Callable[[float], str]) -> None:
    print(f"\n{title}")
    for row in rows:
        cells = [form(v) if isinstance(v, float) else str(v) for k, v in row.items() if k not in ("what", "parts")]
        print("  " + "  ".join(f"{cell:>12}" for cell in cells) + f"  {row.get('what', '')}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "paper_sizes.json")
    args = parser.parse_args(argv)
    before, start, work = resident(), time.perf_counter(), time.process_time()
    found = {"models": models(), "operations": operations(), "shares": shares(), "meter": meter(), "memory": memory()}
    record = {
        "tokens": {"LLaVA": LLAVA_TOKENS, "LaVIN": LAVIN_TOKENS},
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - work,
        "resident_mb": {"before": before, "peak": resident()},
        **found,
    }
    show("multiply-accumulates, G: measured, published, difference / published", record["operations"], "{:.4f}".format)
    show("trained share, %: measured, published, points", record["shares"], "{:.4f}".format)
    print("\nMETER: trained, without the head; its share in %, and with the heads of the tasks; G multiply-accumulates")
    for row in record["meter"]:
        share = [f"{part:.3f}" for part in row.get("share", {}).values()]
        macs = " to ".join(f"{value:.2f}" for value in row["macs"])
        print("  " + "  ".join(f"{cell:>12}" for cell in (row.get("trained", ""), *share, macs)) + f"  {row['what']}")
    for row in record["memory"]:
        print(f"\n{row['model']}, bfloat16, GiB: batch 1, {LLAVA_TOKENS} prompt and 64 new tokens, 8 skipped")
        for name, size in row.items():
            if isinstance(size, int):
                print(f"  {name:<24}{size / 2**30:>8.2f}")
    memory_used = record["resident_mb"]
    print(f"\n{record['seconds']:.0f} s ({record['cpu_seconds']:.0f} s of work), at most ", end="")
    print(f"{memory_used['peak']:.0f} MB resident ({before:.0f} MB before)")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
