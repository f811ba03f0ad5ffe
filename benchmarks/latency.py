"""Times a model dense, with attentions skipped, merged, and beside other ways of tuning; prefill and decode apart.

    python benchmarks/latency.py --skip 4                                the bundled model
    python benchmarks/latency.py --shape 100M --skip 4 6 --out FILE      random weights of a Llama of that shape
    python benchmarks/latency.py --width 1024 --layers 16 --kv-heads 4   ... or of any other
    python benchmarks/latency.py --shape 7B --device cuda --dtype bfloat16 --prompt-tokens 640 --skip 8 12 --compile

Arms: dense; eas K (K attentions skipped, unmerged), eas K condensed and, for one prompt, eas K merged; das K (K whole
layers replaced by a bottleneck); lora (unmerged); adapter (a bottleneck in every layer). All share one set of base
weights. Every arm is first tried alone, for its memory and for the bytes that one of its decoding steps reads; then
rounds alternate between the arms, and the speed-ups are medians of the rounds' ratios. Latency does not depend on what
adapters have learned: they are fresh ones.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import eas_kit as eas
from eas_kit import baselines, report
from eas_kit.errors import ConfigError

# Llama's proportions: heads of 128 (64 in the smallest), a feed-forward of 2.69 times the width, no grouped keys
SHAPES = {
    "100M": {"width": 768, "layers": 12, "heads": 12, "kv_heads": 12, "ffn": 2064, "vocabulary": 32000},
    "1B": {"width": 2048, "layers": 18, "heads": 16, "kv_heads": 16, "ffn": 5504, "vocabulary": 32000},
    "7B": {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "ffn": 11008, "vocabulary": 32000},
}
KINDS = ("dense", "eas", "condensed", "merged", "das", "lora", "adapter")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_argument_group("the model")
    shape.add_argument("--model", default="tiny", help="bundled name, folder or hub name (default: tiny)")
    shape.add_argument("--shape", choices=SHAPES, help="random weights instead, of a Llama of about that size")
    shape.add_argument("--width", type=int, help="random weights: the Llama's width; changes --shape or stands alone")
    shape.add_argument("--layers", type=int, help="its layers (default: 16)")
    shape.add_argument("--heads", type=int, help="its attention heads (default: one per 64 of width)")
    shape.add_argument("--kv-heads", type=int, help="its heads of keys and values (default: as many)")
    shape.add_argument("--ffn", type=int, help="width of its feed-forwards (default: 2.69 times the width)")
    shape.add_argument("--vocabulary", type=int, help="(default: 2048)")
    shape.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    shape.add_argument("--device", default="cpu")
    arms = parser.add_argument_group("the arms")
    arms.add_argument("--arms", nargs="+", default=list(KINDS), choices=KINDS, help="which (default: all)")
    arms.add_argument("--skip", type=int, nargs="+", default=[4], help="how many attentions, one or more (default: 4)")
    arms.add_argument("--skip-rank", type=int, help="at skipped attentions (default: width/16, the paper's)")
    arms.add_argument("--adapt-rank", type=int, help="at kept attentions; 0 for none (default: width/32, the paper's)")
    arms.add_argument("--lora-rank", type=int, help="(default: width/32, LLaVA's 128 at 4096)")
    arms.add_argument("--lora-linears", nargs="+", default=["all"], help="names, such as q_proj v_proj (default: all)")
    arms.add_argument("--bottleneck-rank", type=int, help="of adapter and das (default: width/32, the paper's)")
    run = parser.add_argument_group("the run")
    run.add_argument("--batch", type=int, default=1)
    run.add_argument("--prompt-tokens", type=int, default=64)
    run.add_argument("--new-tokens", type=int, default=64)
    run.add_argument("--compile", action="store_true", help="static cache and torch.compile, as generate does it")
    run.add_argument("--repeats", type=int, default=7)
    run.add_argument("--warmup", type=int, help="rounds before (default: 1; 2 with --compile)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--threads", type=int, help="of torch, on a CPU")
    run.add_argument("--out", type=Path, help="JSON file (default: only printed)")
    return parser.parse_args(argv)


# -- the model -----------------------------------------------------------------------------------------------------


def llama_config(args: argparse.Namespace) -> Any:
    """The Llama that --shape and the numbers beside it ask for; None if they ask for none."""
    from transformers import LlamaConfig

    named = SHAPES.get(args.shape, {})
    given = {name: value for name in SHAPES["7B"] if (value := getattr(args, name)) is not None}
    values = named | given
    if "width" not in values:
        if given:
            raise ConfigError(f"{list(given)} shape a Llama of random weights: give --width or --shape as well")
        return None
    width = values["width"]
    heads = values.get("heads", max(width // 64, 1))
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=values.get("ffn", width * 11008 // 4096),
        num_hidden_layers=values.get("layers", 16),
        num_attention_heads=heads,
        num_key_value_heads=values.get("kv_heads", heads),
        vocab_size=values.get("vocabulary", 2048),
        max_position_embeddings=args.prompt_tokens + args.new_tokens + 1,
        tie_word_embeddings=args.shape == "100M",  # as models of that size do: the table is a quarter of it
        pad_token_id=0,
    )


def make_model(args: argparse.Namespace) -> nn.Module:
    dtype, config = getattr(torch, args.dtype), llama_config(args)
    if config is None:
        return eas.load_model(args.model, device=args.device, dtype=dtype)[0]
    from transformers import AutoModelForCausalLM

    with torch.device(args.device):  # made where it stays: 7B would not fit into every host's memory
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules on the very same tensors: each arm is changed for itself, and the weights exist once."""
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def spread_over(num_sites: int, k: int) -> list[int]:
    """k sites, evenly spread: which ones does not change the time."""
    return [round((i + 0.5) * num_sites / k - 0.5) for i in range(k)]


# -- the arms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to run the model. `build` makes it from the shared weights."""

    what: str
    build: Callable[[], nn.Module]
    generate: dict[str, Any] = field(default_factory=dict)
    k: int | None = None


def make_arms(base: nn.Module, args: argparse.Namespace) -> dict[str, Arm]:
    """The arms asked for, by name, dense first."""
    sites = eas.find_sites(base)
    width, layers, dtype = sites[0].hidden_size, len(sites), getattr(torch, args.dtype)

    def rank(given: int | None, part: int) -> int:
        return max(width // part // 2 * 2, 2) if given is None else given  # even, as adapters come in two groups

    def finish(model: nn.Module) -> nn.Module:
        for parameter in model.parameters():  # adapters are made in float32, to be trained
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        return model.eval()

    skip, adapt = rank(args.skip_rank, 16), rank(args.adapt_rank, 32)
    low, neck = rank(args.lora_rank, 32), rank(args.bottleneck_rank, 32)
    linears = None if args.lora_linears == ["all"] else tuple(args.lora_linears)

    def attached(k: int) -> nn.Module:
        net = eas.attach(shared_copy(base), eas.EASConfig(skip_rank=skip, adapt_rank=adapt))
        net.mask = spread_over(layers, k)
        return finish(net)

    def without_layers(k: int) -> nn.Module:
        return finish(baselines.skip_layers(shared_copy(base), das_layers(k), neck)[0])

    def das_layers(k: int) -> list[int]:
        return [1 + layer for layer in spread_over(layers - 1, k)]  # not layer 0, where the cache's length is

    # a copy too: what compiling leaves on a model must not be copied along into the other arms
    found = {"dense": Arm("the model as it is", lambda: shared_copy(base).eval())}
    for k in args.skip:
        net = cache(partial(attached, k))  # one for its three arms while they are timed
        mask = spread_over(layers, k)
        ranks = f"attentions {mask} skipped, adapters of rank {skip}, of rank {adapt} at the others"
        found[f"eas {k}"] = Arm(ranks, net, k=k)
        found[f"eas {k} condensed"] = Arm(ranks + ", condensed after the prompt", net, {"merge": "low_rank"}, k)
        found[f"eas {k} merged"] = Arm(ranks + ", folded after the prompt", net, {"merge": "per_prompt"}, k)
        what = f"layers {das_layers(k)} replaced by bottlenecks of rank {neck}"
        found[f"das {k}"] = Arm(what, partial(without_layers, k), k=k)
    where = "all linears of the layers" if linears is None else ", ".join(linears)
    found["lora"] = Arm(
        f"LoRA of rank {low} on {where}, unmerged (peft)",
        lambda: finish(baselines.lora(shared_copy(base), rank=low, linears=linears)[0]),
    )
    found["adapter"] = Arm(
        f"a bottleneck of rank {neck} behind every feed-forward",
        lambda: finish(baselines.bottlenecks(shared_copy(base), neck)[0]),
    )
    return {name: arm for name, arm in found.items() if name == "dense" or kind(name) in args.arms}


def kind(name: str) -> str:
    return name.split()[-1] if name.endswith(("condensed", "merged")) else name.split()[0]


def tensor_bytes(model: nn.Module) -> int:
    return sum({id(t): t.nbytes for t in itertools.chain(model.parameters(), model.buffers())}.values())


def give_memory_back() -> None:
    """What the arm before has freed, so that it does not count as this one's."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed pages for itself; other systems do not
        ctypes.CDLL(None).malloc_trim(0)


def try_alone(arm: Arm, inputs: dict[str, torch.Tensor], options: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Memory of the arm with nothing beside it but the shared weights, and what one decoding step reads."""
    model = arm.build()
    give_memory_back()
    cuda = inputs["input_ids"].is_cuda
    with eas.measure.peak_memory() as seen:
        eas.measure.latency(model, inputs, new_tokens, repeats=1, warmup=0, **arm.generate, **options)
    short = {name: tensor[:, :8] for name, tensor in inputs.items()}  # the prompt's length changes no weight
    return {
        "memory": {
            "tensors_mib": tensor_bytes(model) / 2**20,
            "peak_mib": seen["cuda_peak" if cuda else "resident_peak"],
            "peak_is": "the CUDA allocator's" if cuda else "the process's resident set, sampled",
        },
        "reads": eas.measure.decode_bytes(model, short, **arm.generate),
    }


# -- the run -------------------------------------------------------------------------------------------------------


def generate_options(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of generate: for the timed rounds, and for the runs before, which are never compiled."""
    if not args.compile:
        return {}, {}
    from transformers import CompileConfig

    torch._dynamo.config.recompile_limit = 64  # all arms share the code of one model's forward
    options: dict[str, Any] = {"cache_implementation": "static"}
    if torch.device(args.device).type == "cpu":  # where generate compiles only if told so
        options["compile_config"] = CompileConfig()
        options["compile_config"]._compile_all_devices = True
    return options, {"cache_implementation": "static", "disable_compile": True}


def measure(base: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    highest = min(base.get_input_embeddings().num_embeddings, 259)
    generator = torch.Generator().manual_seed(args.seed)
    prompt = torch.randint(3, highest, (args.batch, args.prompt_tokens), generator=generator).to(device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    options, eager = generate_options(args)
    refused = (eas.EASError, torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException)

    arms, alone, models, left_out = make_arms(base, args), {}, {}, {}

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except refused as error:
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"{name} is left out: {left_out[name]}", file=sys.stderr, flush=True)
            return None

    for name, arm in arms.items():
        alone[name] = attempt(name, lambda: try_alone(arm, inputs, eager, args.new_tokens))  # noqa: B023
        if hasattr(arm.build, "cache_clear"):
            arm.build.cache_clear()  # or the next arm's memory would hold this one
    for name, arm in arms.items():
        if name not in left_out:
            models[name] = arm.build()
            call = partial(models[name].generate, **arm.generate)
            if args.compile:  # what cannot be compiled is known before the rounds
                attempt(name, partial(eas.measure.latency, call, inputs, args.new_tokens, 1, 0, **options))
    arms = {name: arm for name, arm in arms.items() if name not in left_out}
    if "dense" not in arms:
        raise ConfigError(f"the dense model did not run, so there is nothing to compare with: {left_out['dense']}")

    speed = eas.measure.bandwidth(device, dtype)
    calls = {name: partial(models[name].generate, **arm.generate) for name, arm in arms.items()}
    warmup = args.warmup if args.warmup is not None else 1 + args.compile
    found = eas.measure.compare_latency(calls, inputs, args.new_tokens, args.repeats, warmup, **options)
    middle = args.prompt_tokens + args.new_tokens / 2
    for name, arm in arms.items():
        times = found["arms"][name]
        reads = alone[name]["reads"]
        total = reads["weights"] + reads["cache_per_position"] * middle
        roofline = {**reads, "bytes_per_token": total, "seconds_per_token": total / speed}
        if "decode_per_token" in times:
            roofline["share_reached"] = roofline["seconds_per_token"] / times["decode_per_token"]["median"]
        found["arms"][name] = {
            "what": arm.what,
            "k": arm.k,
            **times,
            "memory": alone[name]["memory"],
            "roofline": roofline,
        }
    found |= {"left_out": left_out, "bandwidth": speed, "merge": {}, "bounds": {}}
    for name, arm in arms.items():
        if "merge" in arm.generate:
            found["merge"][name] = merge_time(models[name], inputs, args.repeats, arm.generate["merge"])
    if not args.compile:  # the hooks that time parts would break the graph
        for k in args.skip:
            mask = spread_over(len(eas.find_sites(base)), k)
            repeats = min(args.repeats, 3)
            found["bounds"][str(k)] = eas.measure.attention_share(base, inputs, mask, args.new_tokens, repeats)
    return found


def merge_time(net: nn.Module, inputs: dict[str, torch.Tensor], repeats: int, form: str) -> dict[str, Any]:
    """Seconds to merge for prompts that are read already; within generate they are part of prefill."""
    prompt = net.prefill(**inputs).past_key_values

    def fold() -> None:
        with eas.merged(net, prompt, form):
            pass

    return eas.measure.compare_calls({"merge": fold}, inputs["input_ids"].device, repeats)["seconds"]["merge"]


def describe(base: nn.Module) -> dict[str, Any]:
    config = base.config.get_text_config(decoder=True)
    return {
        "class": type(base).__name__,
        "parameters": sum(p.numel() for p in base.parameters()),
        "bytes": tensor_bytes(base),
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "ffn": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "attention": config._attn_implementation,
    }


def table(found: dict[str, Any]) -> str:
    head = ("arm", "prefill s", "x dense", "ms/token", "x dense", "tokens/s", "total x", "peak MiB", "MB read/token")
    lines = [(*head, "bound ms", "reached")]
    for name, arm in found["arms"].items():
        ratio, roof = found["speedup"][name], arm["roofline"]
        decoded = "decode_per_token" in arm
        lines.append(
            (
                name,
                f"{arm['prefill']['median']:.4f}",
                f"{ratio['prefill']['median']:.2f}",
                f"{1e3 * arm['decode_per_token']['median']:.2f}" if decoded else "",
                f"{ratio['decode']['median']:.2f}" if decoded else "",
                f"{arm['tokens_per_second']['median']:.1f}" if decoded else "",
                f"{ratio['total']['median']:.2f}",
                f"{arm['memory']['peak_mib']:.0f}",
                f"{roof['bytes_per_token'] / 1e6:.1f}",
                f"{1e3 * roof['seconds_per_token']:.2f}",
                f"{roof['share_reached']:.0%}" if decoded else "",
            )
        )
    wide = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(x, wide))) for x in lines]
    rows += [f"merging alone, {name}: {1e3 * took['median']:.2f} ms" for name, took in found["merge"].items()]
    for k, bound in found["bounds"].items():
        each = ", ".join(f"{part} {bound[part]['bound_with_norm']:.2f}x" for part in ("prefill", "decode", "total"))
        rows.append(f"bound if {k} attentions and the norms a merge leaves out took no time: {each}")
    rows += [f"{name} left out: {reason}" for name, reason in found["left_out"].items()]
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if torch.device(args.device).type == "cuda":
        torch.cuda.set_device(args.device if ":" in args.device else 0)  # whose peak memory is asked for
    torch.manual_seed(args.seed)
    try:
        base = make_model(args)
        layers = len(eas.find_sites(base))
        if not all(0 < k < layers for k in args.skip):
            raise ConfigError(f"--skip {args.skip}: wanted 1 to {layers - 1} of the model's {layers} attentions")
        found = measure(base, args)
    except eas.EASError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    machine = report.machine(args.device)
    name = args.shape or (f"Llama of width {args.width}" if args.width else args.model)
    print(f"{name}, {machine['device']}, {machine['processor']}\n{table(found)}", flush=True)
    record = {
        "command": shlex.join(["python", "benchmarks/latency.py", *argv]),
        "written": report.now(),
        "machine": machine,
        "versions": report.versions(),
        "settings": vars(args),
        "model": {"name": name} | describe(base),
        **found,
    }
    if args.out:
        report.write_json(args.out, report.plain(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
