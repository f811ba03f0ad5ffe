"""Static merge: one set of weights for all prompts of a task. Approximate, and it says by how much.

The exact merges of `merging.py` fold what an adapter read from one prompt: its router's weights w and its pooled
feature A m + c_A. Averaged over the prompts of a calibration set, both are constants, and the adapters fold into the
linears once and for all. What comes out needs no adapter, no prompt's mean and no eas_kit: it is causal again, may be
prefilled in chunks, batched continuously and served by any engine (`StaticMerge.export`). Exact for the averaged model.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError, MergeError
from .merging import Merge, check_foldable, fold_linear, merge_target, routes_of
from .modes import eval_mode
from .pia import Route
from .prompt import IGNORE
from .tasks import check_task

if TYPE_CHECKING:
    from .model import EASModel


@dataclass
class StaticMerge:
    """Averaged routes of the adapters that `mask` uses, and what averaging costs. Made by `static_merge`.

    `with static: ...` runs the net merged: net(...), net.generate(...) and task.evaluate(net) on any batch; afterwards
    it is as before, bit for bit. `static.export(folder)` writes a checkpoint that loads without eas_kit.
    """

    net: EASModel
    mask: tuple[int, ...]
    routes: dict[int, Route]
    """By layer_idx: the mean route, a batch of one."""
    calibration: dict[str, Any]
    """split, count, seed; router_spread: largest standard deviation of a router's weight between the prompts."""
    report: dict[str, Any] = field(default_factory=dict)
    """What averaging costs on a split, see `static_merge`; empty if nothing was scored."""
    fingerprint: str = field(init=False, repr=False)
    """Of the adapters that the mask uses: averages of other adapters than those of now would go with nothing."""

    def __post_init__(self) -> None:
        self.fingerprint = _fingerprint(self.net)

    def check_fresh(self) -> None:
        """MergeError if the net's mask or adapters are not those that were averaged."""
        net = self.net
        if net.mask != self.mask:
            raise MergeError(
                f"this static merge was made for mask {list(self.mask)}, the net's is {list(net.mask)} now;"
                " set it back, or make another with static_merge(net, task)"
            )
        if _fingerprint(net) != self.fingerprint:
            raise MergeError(
                "the adapters have changed since this static merge was made (trained on, cast or loaded anew), and what"
                " it averaged is what they read before; make another with static_merge(net, task)"
            )

    def __enter__(self) -> EASModel:
        net = self.net
        net._check_usable("merge")
        self.check_fresh()
        net._merge = Merge(net, self.routes, "per_prompt", cache=None)
        return net

    def __exit__(self, *exception: Any) -> None:
        self.net._end_merge()

    def folded(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Module path, W' and c' of every linear that is rewritten, one after the other."""
        self.check_fresh()
        names = {id(module): name for name, module in self.net.base.named_modules()}
        for seat in self.net._seats:
            if seat.role:
                target, factors = merge_target(self.net, seat), seat.pia.factors(self.routes[seat.layer_idx])
                for name in target.linears():
                    linear = getattr(target.parent, name)
                    with torch.no_grad():
                        yield names[id(linear)], *fold_linear(linear, factors, target.gain, target.shift)

    def export(self, folder: str | Path, format: str = "llama", processor: Any = None, **options: Any) -> Path:
        """Write a checkpoint that needs no eas_kit: see `eas_kit.export.export`."""
        from .export import export

        return export(self, folder, format, processor, **options)

    def __str__(self) -> str:
        text = (
            f"static merge: mask {list(self.mask)}, averaged over {self.calibration['count']} prompts of"
            f" {self.calibration['split']} (router weights vary by {self.calibration['router_spread']:.1e})"
        )
        if self.report:
            before, after = self.report["accuracy"], self.report["accuracy_static"]
            text += (
                f"; on {self.report['count']} of {self.report['split']}: accuracy {before:.1%} -> {after:.1%},"
                f" loss {self.report['loss']:.4f} -> {self.report['loss_static']:.4f}, logits off by"
                f" {self.report['mean_logit_change']:.1e} of their scale in the mean, next token the same at"
                f" {self.report['same_token']:.1%} of positions"
            )
        return text


def static_merge(
    net: EASModel,
    task: Any,
    split: str = "train",
    num_examples: int = 64,
    score_on: str | None = "val",
    num_scored: int = 64,
    batch_size: int = 16,
    seed: int = 0,
) -> StaticMerge:
    """Average what the adapters read over `num_examples` prompts of `split`, and measure what that costs.

    The report holds, on `num_scored` examples of `score_on` (None: nothing is scored): accuracy and loss as the task
    counts them, exact and static (`accuracy`, `accuracy_static`, `loss`, `loss_static`), and at the answers' positions
    `mean_logit_change` and `max_logit_change` (shares of the largest exact logit), `kl` (nats, exact to static) and
    `same_token`. Raises MergeError where linears cannot be rewritten, ConfigError for an empty calibration set.
    """
    check_task("static_merge", task, split, "collate", *(() if score_on is None else ("evaluate", score_on)))
    net._check_usable("merge")
    check_foldable(net)
    examples = getattr(task, split)
    if num_examples < 1 or len(examples) == 0:
        raise ConfigError(
            f"static_merge: wanted one prompt or more, got num_examples={num_examples} of {len(examples)}"
        )
    chosen = random.Random(seed).sample(range(len(examples)), min(num_examples, len(examples)))
    seen: dict[int, list[Route]] = {}
    with eval_mode(net):
        for start in range(0, len(chosen), batch_size):
            batch = task.collate([examples[i] for i in chosen[start : start + batch_size]], answers=False)
            cache = net.prefill(**_on(net.device, batch)).past_key_values
            for layer_idx, route in routes_of(net, cache).items():
                seen.setdefault(layer_idx, []).append(route)
    spread, routes = 0.0, {}
    for layer_idx, found in seen.items():
        every = Route(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*found)))
        spread = max(spread, every.weights.std(dim=0, correction=0).max().item())
        routes[layer_idx] = every.map(lambda t: t.mean(dim=0, keepdim=True))
    calibration = {"split": split, "count": len(chosen), "seed": seed, "router_spread": spread}
    static = StaticMerge(net, net.mask, routes, calibration)
    if score_on is not None:
        static.report = _score(static, task, score_on, num_scored, batch_size)
    return static


def _fingerprint(net: EASModel) -> str:
    """A checksum of all bits of the adapters at work; a few megabytes are read."""
    digest = hashlib.blake2b()
    for name, pia in net.active_adapters().items():
        for key, value in pia.state_dict().items():
            digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _score(static: StaticMerge, task: Any, split: str, limit: int, batch_size: int) -> dict[str, Any]:
    net = static.net
    exact = task.evaluate(net, split, limit=limit, batch_size=batch_size)
    with static:
        merged = task.evaluate(net, split, limit=limit, batch_size=batch_size)
    report = {"split": split, "count": exact["count"]}
    for key in ("accuracy", "loss"):
        report |= {key: exact[key], f"{key}_static": merged[key]}
    scale, largest, total, kl, same, positions = 0.0, 0.0, 0.0, 0.0, 0, 0
    examples = getattr(task, split)[:limit]
    with eval_mode(net), torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = _on(net.device, task.collate(examples[start : start + batch_size]))
            answer = batch["labels"][:, 1:] != IGNORE
            before = net(**batch).logits[:, :-1][answer].float()  # (answer positions, vocabulary)
            with static:
                after = net(**batch).logits[:, :-1][answer].float()
            scale = max(scale, before.abs().max().item())
            largest = max(largest, (after - before).abs().max().item())
            total += (after - before).abs().mean(dim=-1).sum().item()
            log_p, log_q = F.log_softmax(before, dim=-1), F.log_softmax(after, dim=-1)
            kl += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            positions += len(before)
    return report | {
        "mean_logit_change": total / positions / scale,
        "max_logit_change": largest / scale,
        "kl": kl / positions,
        "same_token": same / positions,
    }


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
