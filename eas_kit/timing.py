"""Latency, prefill and decode apart, and memory, as dicts of plain numbers."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .masks import check_mask
from .sites import find_sites, unwrap

# -- latency -------------------------------------------------------------------------------------------------------


class Clock:
    """A stopping criterion that never stops: it notes when each token was ready."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.marks.append(now(self.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def latency(
    net: Any, inputs: Mapping[str, torch.Tensor], new_tokens: int = 64, repeats: int = 5, warmup: int = 1, **generate
) -> dict[str, Any]:
    """Times of greedy generation of exactly `new_tokens` tokens, in seconds.

    `net`: a model, or a function with the keywords of `generate` (to time `merge=True`, say). prefill: until the
    first token is ready, merging included; decode: all further tokens; decode_per_token: one of their steps, for all
    rows of the batch together; total; and tokens_per_second: tokens of all rows, while decoding. Each is a dict of
    median, low and high (quartiles) and `runs`.
    """
    runs = [timed(net, inputs, new_tokens, generate) for _ in range(warmup + repeats)][warmup:]
    return {"new_tokens": new_tokens, "repeats": repeats} | _summaries(runs, new_tokens, _rows(inputs))


def compare_latency(
    arms: Mapping[str, Any],
    inputs: Mapping[str, torch.Tensor],
    new_tokens: int = 64,
    repeats: int = 7,
    warmup: int = 1,
    baseline: str | None = None,
    **generate,
) -> dict[str, Any]:
    """Times several models side by side, in turn within each round, so that a slow spell of the machine hits all.

    `arms`: name -> model or function, as in `latency`. Returns `arms`: name -> latency dict, and `speedup`:
    name -> prefill, decode, total, each the median (with quartiles and runs) of the rounds' ratios baseline / arm;
    above 1 is faster. The baseline is the first arm unless named.
    """
    if not arms:
        raise ConfigError("compare_latency needs at least one arm, such as {'dense': model}.")
    baseline = next(iter(arms)) if baseline is None else baseline
    if baseline not in arms:
        raise ConfigError(f"baseline {baseline!r} is none of the arms {list(arms)}.")
    rounds = []
    for number in range(warmup + repeats):
        times = {name: timed(arm, inputs, new_tokens, generate) for name, arm in arms.items()}
        if number >= warmup:
            rounds.append(times)
    found = {name: _summaries([times[name] for times in rounds], new_tokens, _rows(inputs)) for name in arms}
    speedup = {
        name: {
            part: spread([times[baseline][part] / times[name][part] for times in rounds])
            for part in ("prefill", "decode", "total")
            if all(times[name][part] > 0 for times in rounds)
        }
        for name in arms
    }
    device = next(iter(inputs.values())).device
    return {
        "new_tokens": new_tokens,
        "repeats": repeats,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "baseline": baseline,
        "arms": found,
        "speedup": speedup,
    }


def compare_calls(
    calls: Mapping[str, Callable[[], Any]], device: Any = "cpu", repeats: int = 7, warmup: int = 1
) -> dict[str, Any]:
    """Times functions without arguments in turn, round by round, as `compare_latency` does models.

    Returns `seconds`: name -> dict of median, low, high and runs; `ratio`: name -> the same of the rounds' ratios
    first function / this one; above 1 is faster than the first.
    """
    if not calls:
        raise ConfigError("compare_calls needs at least one function, such as {'fold': lambda: ...}.")
    device, rounds = torch.device(device), []
    for _ in range(warmup + repeats):
        times = {}
        for name, call in calls.items():
            start = now(device)
            call()
            times[name] = now(device) - start
        rounds.append(times)
    rounds, first = rounds[warmup:], next(iter(calls))
    return {
        "repeats": repeats,
        "seconds": {name: spread([times[name] for times in rounds]) for name in calls},
        "ratio": {name: spread([times[first] / times[name] for times in rounds]) for name in calls},
    }


def attention_share(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    mask: Iterable[int],
    new_tokens: int = 64,
    repeats: int = 7,
    **generate,
) -> dict[str, Any]:
    """Share of a dense model's time that the attentions of `mask` take, and the bound it puts on the speed-up.

    For prefill, decode and total: share (median over repeats) and bound = 1 / (1 - share), the speed-up if those
    attentions took no time and nothing took their place. A merged layer also needs no norm before its feed-forward,
    which at small widths is not nothing: share_with_norm and bound_with_norm count both, and are the bound that a
    merged model cannot pass. Timing parts by themselves slows the run a little.
    """
    chosen = set(check_mask(mask, len(find_sites(model))))
    device = next(iter(inputs.values())).device
    spans: list[tuple[str, float, float]] = []
    starts: list[float] = []
    handles = []
    for site in (site for site in find_sites(model) if site.index in chosen):
        layer = unwrap(model).get_submodule(site.layer_path)
        for part in filter(None, (site.names.attention, site.names.norm_ffn)):
            kind = "attention" if part == site.names.attention else "norm"
            module = getattr(layer, part)
            handles.append(module.register_forward_pre_hook(lambda *_: starts.append(now(device)), prepend=True))
            handles.append(
                module.register_forward_hook(lambda *_, kind=kind: spans.append((kind, starts.pop(), now(device))))
            )
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    try:
        for repeat in range(repeats + 1):
            spans.clear()
            times = timed(model, inputs, new_tokens, generate)
            if repeat == 0:  # to warm up
                continue
            spent: dict[tuple[str, str], float] = defaultdict(float)
            for kind, start, end in spans:
                for part in ("prefill" if end <= times["first"] else "decode", "total"):
                    spent[part, kind] += end - start
            for part in ("prefill", "decode", "total"):
                whole, alone = times[part] or 1.0, spent[part, "attention"]
                shares[part, ""].append(alone / whole)
                shares[part, "_with_norm"].append((alone + spent[part, "norm"]) / whole)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Any] = defaultdict(dict)
    for (part, more), values in shares.items():
        share = statistics.median(values)
        found[part] |= {f"share{more}": share, f"bound{more}": 1 / (1 - share)}
    return dict(found)


@torch.no_grad()
def timed(net: Any, inputs: Mapping[str, torch.Tensor], new_tokens: int, generate: Mapping[str, Any]) -> dict:
    from transformers import StoppingCriteriaList

    device = next(iter(inputs.values())).device
    clock, call = Clock(device), getattr(net, "generate", net)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False} | dict(generate)
    start = now(device)
    call(**inputs, **settings, stopping_criteria=StoppingCriteriaList([clock]))
    if len(clock.marks) != new_tokens:
        raise ConfigError(f"Wanted {new_tokens} tokens one by one, the model made {len(clock.marks)}.")
    first, last = clock.marks[0], clock.marks[-1]
    return {"prefill": first - start, "decode": last - first, "total": last - start, "first": first}


def _rows(inputs: Mapping[str, torch.Tensor]) -> int:
    return len(next(iter(inputs.values())))


def _summaries(runs: list[dict], new_tokens: int, rows: int) -> dict[str, Any]:
    found = {part: spread([run[part] for run in runs]) for part in ("prefill", "decode", "total")}
    if new_tokens > 1:  # else nothing was decoded
        steps = [run["decode"] / (new_tokens - 1) for run in runs]
        found["decode_per_token"] = spread(steps)
        if min(steps) > 0:
            found["tokens_per_second"] = spread([rows / step for step in steps])
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """median, low and high (quartiles), and the values themselves as `runs`."""
    low, high = (values[0], values[0]) if len(values) == 1 else _quartiles(values)
    return {"median": statistics.median(values), "low": low, "high": high, "runs": values}


def _quartiles(values: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return cuts[0], cuts[2]


# -- memory --------------------------------------------------------------------------------------------------------


@contextmanager
def peak_memory(interval: float = 0.005) -> Iterator[dict[str, float]]:
    """Within the block, watches memory; the dict is filled when it ends, in MiB.

    resident_before and resident_peak: of this process (sampled every `interval` seconds, so a short spike can be
    missed); cuda_peak: of the allocator of the current GPU, if there is one (exact).
    """
    import psutil

    process, found, done = psutil.Process(), {}, threading.Event()
    before = process.memory_info().rss
    peak = [before]
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        peak[0] = max(peak[0], process.memory_info().rss)
        found |= {"resident_before": before / 2**20, "resident_peak": peak[0] / 2**20}
        if cuda:
            found["cuda_peak"] = torch.cuda.max_memory_allocated() / 2**20
