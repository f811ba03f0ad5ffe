"""The cost of folding one skipped layer's adapter into its feed-forward: as a rank-r update, and the dense way.

    python benchmarks/fold.py --out benchmarks/results/fold.json
    python benchmarks/fold.py --width 4096 --dtype bfloat16 --device cuda

Folded are the two linears that read a feed-forward's input, gate and up (eq. 11-13), for one prompt:

    rank r      W diag(g) + (W diag(g) U) C, as eas_kit.merging.fold_linear does it
    dense       W diag(g) M with the d x d matrix M = I + U C, made once for both linears
    mixing      for --batch prompts: W diag(g) Bu and W diag(g) Du are there already, and each prompt's w mixes them

Then one decoding step of a batch, a token a row, through the adapter and these two linears:

    bare        the linears alone
    unmerged    the adapter as it is
    low rank    n + [Bu, Du] (w x C n), the factors of all rows shared, then the linears
    through W   W n + [W Bu, W Du] (w x C n): the factors carried on through the linears

All folding calculates in float32 and stores in --dtype. Rounds alternate; ratios are medians of the rounds' ratios.
Multiply-accumulates are counted by torch.utils.flop_counter (which counts two for each) while the code runs.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import eas_kit as eas
from eas_kit import report
from eas_kit.merging import fold_linear


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 4096], help="d (default: 1024 4096)")
    parser.add_argument("--rank", type=int, nargs="+", default=[128, 256], help="r (default: 128 256)")
    parser.add_argument("--ffn", type=int, help="width of the feed-forward (default: Llama's 2.69 d)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="(default: float32 bfloat16)")
    parser.add_argument("--batch", type=int, default=8, help="prompts mixed, rows decoded (default: 8)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--out", type=Path, help="JSON file (default: only printed)")
    return parser.parse_args(argv)


class Layer:
    """What is folded: gate and up, the gain before them, and an adapter that has read `batch` prompts."""

    def __init__(self, width: int, ffn: int, rank: int, dtype: torch.dtype, device: str, batch: int) -> None:
        with torch.device(device):
            self.linears = [nn.Linear(width, ffn, bias=False, dtype=dtype) for _ in range(2)]
            self.gain = torch.rand(width, dtype=dtype) + 0.5
            self.pia = eas.PIA(width, rank).eval()
            for up in (self.pia.up_0, self.pia.up_1):  # new ones are zero, and a check of zeros would prove nothing
                nn.init.normal_(up.weight, std=0.02)
            self.pia.to(dtype)
            self.route = self.pia.route(torch.randn(batch, width))
            # all biases are zero, and so is the constant part: it would cost every form the same vector
            self.constant = self.route._replace(pooled=torch.zeros(batch, rank))
            self.tokens = torch.randn(batch, 1, width, dtype=dtype)
        self.mixable = [self._projected(linear) for linear in self.linears]
        # what the batched forms hold ready: shared by all rows, and one row's part
        self.shared = 0.5 * torch.cat([self.pia.up_0.dense(), self.pia.up_1.dense()], dim=1) * self.gain[:, None]
        self.carried = [0.5 * torch.cat(tuple(both), dim=1).to(dtype) for both in self.mixable]
        self.weights = self.route.weights.to(dtype)[:, None, :, None]
        self.scaled = [linear.weight * self.gain for linear in self.linears]

    def _projected(self, linear: nn.Linear) -> torch.Tensor:
        """W diag(g) Bu and W diag(g) Du, (2, d_ff, r): the same for every prompt."""
        weight = linear.weight.float() * self.gain.float()
        return torch.stack([weight @ up.dense().float() for up in (self.pia.up_0, self.pia.up_1)])

    def rank_r(self) -> list[torch.Tensor]:
        factors = self.pia.factors(self.route.map(lambda t: t[:1]))
        return [fold_linear(linear, factors, self.gain)[0] for linear in self.linears]

    def dense(self) -> list[torch.Tensor]:
        factors = self.pia.factors(self.route.map(lambda t: t[:1]))
        matrix = torch.eye(len(self.gain), device=self.gain.device) + factors.up[0] @ factors.down
        return [
            ((linear.weight.float() * self.gain.float()) @ matrix).to(linear.weight.dtype) for linear in self.linears
        ]

    def mixing(self) -> list[torch.Tensor]:
        weights = self.route.weights * 0.5 * self.pia.scale
        return [torch.einsum("bp,pfr->bfr", weights, both).to(self.gain.dtype) for both in self.mixable]

    def _routed(self) -> torch.Tensor:
        """w x C n, (B, 1, 2 r)."""
        return (self.weights * F.linear(self.tokens, self.pia.down_token.weight)[:, :, None]).flatten(2)

    def bare(self) -> list[torch.Tensor]:
        return [F.linear(self.tokens, weight) for weight in self.scaled]

    def unmerged(self) -> list[torch.Tensor]:
        adapted = self.pia(self.tokens, route=self.constant) * self.gain
        return [linear(adapted) for linear in self.linears]

    def low_rank(self) -> list[torch.Tensor]:
        adapted = self.gain * self.tokens + F.linear(self._routed(), self.shared)
        return [linear(adapted) for linear in self.linears]

    def through_w(self) -> list[torch.Tensor]:
        routed = self._routed()
        return [F.linear(self.tokens, w) + F.linear(routed, c) for w, c in zip(self.scaled, self.carried)]


def gap(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest difference, as a share of the largest value."""
    return float(max((a.float() - b.float()).abs().max() / a.float().abs().max() for a, b in zip(one, other)))


def multiply_accumulates(call: Callable[[], Any]) -> int:
    # the counter knows no product of a matrix and a vector, which the folded bias is
    by_vector = {torch.ops.aten.mv: lambda matrix, vector, *args, out_shape=None, **kwargs: 2 * matrix[0] * matrix[1]}
    with FlopCounterMode(display=False, custom_mapping=by_vector) as counter:
        call()
    return counter.get_total_flops() // 2


@torch.no_grad()
def measure(width: int, rank: int, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    ffn = args.ffn or width * 11008 // 4096
    layer = Layer(width, ffn, rank, getattr(torch, dtype), args.device, args.batch)
    calls = {"dense": layer.dense, "rank r": layer.rank_r, "mixing": layer.mixing}
    steps = {"bare": layer.bare, "unmerged": layer.unmerged, "low rank": layer.low_rank, "through W": layer.through_w}
    found = eas.measure.compare_calls(calls, args.device, args.repeats)
    # a step is a thousand times shorter than a fold
    step = eas.measure.compare_calls(steps, args.device, 20 * args.repeats, warmup=5)
    both, unmerged = calls | steps, layer.unmerged()
    return {
        "width": width,
        "ffn": ffn,
        "rank": rank,
        "dtype": dtype,
        "seconds": found["seconds"],
        "times_faster_than_dense": found["ratio"],
        "step_seconds": without_runs(step["seconds"]),
        "step_times_faster_than_bare": without_runs(step["ratio"]),
        "multiply_accumulates": {name: multiply_accumulates(call) for name, call in both.items()},
        "difference": {
            "rank r from dense": gap(layer.dense(), layer.rank_r()),
            "low rank from unmerged": gap(unmerged, layer.low_rank()),
            "through W from unmerged": gap(unmerged, layer.through_w()),
        },
    }


def without_runs(found: dict[str, dict]) -> dict[str, dict]:
    """Medians and quartiles alone: a hundred runs of each step would be most of the file."""
    return {name: {key: value for key, value in spread.items() if key != "runs"} for name, spread in found.items()}


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        f"{'d':>5} {'r':>4} {'dtype':9} {'dense ms':>9} {'rank r ms':>9} {'faster':>7} {'MACs':>7} {'mixing ms':>9}"
        f" | step ms: {'bare':>7} {'unmerged':>8} {'low rank':>8} {'through W':>9}"
    ]
    for run in runs:
        ms = {name: 1e3 * taken["median"] for name, taken in (run["seconds"] | run["step_seconds"]).items()}
        fewer = run["multiply_accumulates"]["dense"] / run["multiply_accumulates"]["rank r"]
        lines.append(
            f"{run['width']:5} {run['rank']:4} {run['dtype']:9} {ms['dense']:9.1f} {ms['rank r']:9.1f}"
            f" {run['times_faster_than_dense']['rank r']['median']:6.2f}x {fewer:6.2f}x {ms['mixing']:9.2f}"
            f" |          {ms['bare']:7.3f} {ms['unmerged']:8.3f} {ms['low rank']:8.3f} {ms['through W']:9.3f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    runs = [measure(*case, args) for case in itertools.product(args.width, args.rank, args.dtype)]
    machine = report.machine(args.device)
    print(f"one layer's gate and up, {machine['device']}, {machine['processor']}\n{table(runs)}")
    if args.out:
        record = {
            "command": shlex.join(["python", "benchmarks/fold.py", *argv]),
            "written": report.now(),
            "machine": machine,
            "versions": report.versions(),
            "settings": vars(args),
            "runs": runs,
        }
        report.write_json(args.out, report.plain(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
