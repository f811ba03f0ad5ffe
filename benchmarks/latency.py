"""Times a model dense, with attentions skipped, and with the adapters merged; prefill and decode apart.

    python benchmarks/latency.py --skip 4                               the bundled model
    python benchmarks/latency.py --width 1024 --layers 16 --skip 8      random weights of a Llama of that shape
    python benchmarks/latency.py --model FOLDER --prompt-tokens 512 --device cuda --dtype bfloat16

Rounds alternate between the three, and the speed-ups are medians of the rounds' ratios. The time that the skipped
attentions take in the dense model gives the bound 1 / (1 - share) that the speed-ups are to be held against.
Latency does not depend on what the adapters have learned, so they are fresh ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path

import torch

import eas_kit as eas


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_argument_group("the model")
    shape.add_argument("--model", default="tiny", help="bundled name, folder or hub name (default: tiny)")
    shape.add_argument("--width", type=int, help="random weights instead: width of a Llama")
    shape.add_argument("--layers", type=int, default=16, help="its layers (default: 16)")
    shape.add_argument("--heads", type=int, default=8, help="its attention heads (default: 8)")
    shape.add_argument("--vocabulary", type=int, default=2048, help="its vocabulary (default: 2048)")
    shape.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    shape.add_argument("--device", default="cpu")
    skip = parser.add_argument_group("what is skipped")
    skip.add_argument("--skip", type=int, nargs="+", default=[4], help="how many attentions, one or more (default: 4)")
    skip.add_argument("--skip-rank", type=int, default=32)
    skip.add_argument("--adapt-rank", type=int, default=16, help="of adapters at kept attentions; 0 for none")
    run = parser.add_argument_group("the run")
    run.add_argument("--prompt-tokens", type=int, default=64)
    run.add_argument("--new-tokens", type=int, default=64)
    run.add_argument("--repeats", type=int, default=7)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--threads", type=int, help="of torch, on a CPU")
    run.add_argument("--out", type=Path, help="JSON file (default: only printed)")
    return parser.parse_args(argv)


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    dtype = getattr(torch, args.dtype)
    if args.width is None:
        model, _ = eas.load_model(args.model, dtype=dtype)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=args.width,
            intermediate_size=int(args.width * 8 / 3),
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            vocab_size=args.vocabulary,
            max_position_embeddings=args.prompt_tokens + args.new_tokens + 1,
        )
        model = LlamaForCausalLM(config).to(dtype)
    return model.to(args.device).eval()


def spread_over(num_sites: int, k: int) -> list[int]:
    """k sites, evenly spread: which ones does not change the time."""
    return [round((i + 0.5) * num_sites / k - 0.5) for i in range(k)]


def measure(base: torch.nn.Module, k: int, args: argparse.Namespace) -> dict:
    vocabulary = base.get_input_embeddings().num_embeddings
    prompt = torch.randint(3, min(vocabulary, 259), (1, args.prompt_tokens), device=args.device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    net = eas.attach(copy.deepcopy(base), eas.EASConfig(skip_rank=args.skip_rank, adapt_rank=args.adapt_rank)).eval()
    net.mask = spread_over(net.num_sites, k)
    arms = {"dense": base, "unmerged": net, "merged": partial(net.generate, merge=True)}
    found = eas.measure.compare_latency(arms, inputs, args.new_tokens, args.repeats)
    found["bound"] = eas.measure.attention_share(base, inputs, net.mask, args.new_tokens)
    return {"k": k, "mask": list(net.mask), "num_sites": net.num_sites} | found


def table(found: dict) -> str:
    lines = [f"{found['k']} of {found['num_sites']} attentions skipped: median seconds, and times faster than dense"]
    for name, times in found["arms"].items():
        parts = [
            f"{part} {times[part]['median']:.4f} s ({found['speedup'][name].get(part, {}).get('median', 1.0):.2f}x)"
            for part in ("prefill", "decode", "total")
        ]
        lines.append(f"  {name:9} " + "   ".join(parts))
    for name, what in (("bound", "attentions"), ("bound_with_norm", "attentions and the norms a merge leaves out")):
        bounds = [f"{part} {found['bound'][part][name]:.2f}x" for part in ("prefill", "decode", "total")]
        lines.append("  bound     " + "   ".join(bounds) + f"   (if those {what} took no time)")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        base = make_model(args)
        runs = []
        for k in args.skip:
            runs.append(measure(base, k, args))
            print(table(runs[-1]), flush=True)
    except eas.EASError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    record = {"settings": settings, "torch": torch.__version__, "runs": runs}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
