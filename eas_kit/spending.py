"""Where a model's time goes: prefill and decode apart, by part of the model, by clocks around its modules."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .sites import decoder_layers, find_sites, unwrap
from .slots import NoAttention, NoFeedForward, StandIn
from .timing import now, spread, timed

SPENT_ON = ("vision", "attention", "ffn", "adapters", "merging", "other")
PHASES = ("prefill", "decode", "total")


def time_parts(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    new_tokens: int = 64,
    repeats: int = 5,
    warmup: int = 1,
    **generate,
) -> dict[str, Any]:
    """Seconds that greedy generation of exactly `new_tokens` tokens spends in each part of a model.

    Under `seconds`: prefill (until the first token is ready), decode (all further ones) and total, each a dict of part
    -> median, low and high (quartiles) and `runs`; under `share`: the medians of the parts' shares of that phase.

    vision: towers and projector; attention, ffn: of the decoder layers, without what an adapter adds; adapters:
    whatever stands in the place of a skipped part or before a kept one, condensed adapters too; merging: folding or
    condensing, once a prompt; other: norms, embeddings, output head, and the Python around all of it. Times are those
    between a module's beginning and its end, so on a GPU every part waits for the one before: shares are then those
    of a run without overlap. The clocks slow the run a little, which counts as other.

    `generate`: keywords of the model's `generate`, such as `merge=True`.

    Raises:
        ConfigError: nothing to repeat, or the model stops before `new_tokens`.
        UnsupportedModelError: no decoder layer has sites.
    """
    if repeats < 1:
        raise ConfigError(f"time_parts: wanted repeats of 1 or more, got {repeats}")
    device = next(iter(inputs.values())).device
    spans: list[tuple[str, float, float]] = []
    rounds: dict[str, list[dict[str, float]]] = {phase: [] for phase in PHASES}
    with ExitStack() as stack:
        _install(stack, model, lambda part, start: spans.append((part, start, now(device))), lambda: now(device))
        for number in range(warmup + repeats):
            spans.clear()
            times = timed(model, inputs, new_tokens, generate)
            if number < warmup:
                continue
            spent = {phase: dict.fromkeys(SPENT_ON, 0.0) for phase in PHASES}
            for part, start, end in spans:
                if end > times["first"] + times["decode"]:  # taking the merge out again, after the last token
                    continue
                for phase in ("prefill" if end <= times["first"] else "decode", "total"):
                    spent[phase][part] += end - start
            for phase in PHASES:
                spent[phase]["other"] = max(times[phase] - sum(spent[phase].values()), 0.0)
                rounds[phase].append(spent[phase])
    share: dict[str, dict[str, float]] = defaultdict(dict)
    for phase, runs in rounds.items():
        for part in SPENT_ON:
            share[phase][part] = spread([run[part] / (sum(run.values()) or 1.0) for run in runs])["median"]
    return {
        "new_tokens": new_tokens,
        "repeats": repeats,
        "seconds": {
            phase: {part: spread([run[part] for run in runs]) for part in SPENT_ON} for phase, runs in rounds.items()
        },
        "share": dict(share),
    }


Note = Callable[[str, float], None]


def _install(stack: ExitStack, model: nn.Module, note: Note, clock: Callable[[], float]) -> None:
    """A clock around every part, until the stack closes. A part has no part inside, so that nothing counts twice."""
    plain = unwrap(model)
    for module in _vision(plain):
        _around(stack, module, "vision", note, clock)
    slots: dict[tuple[str, str], str] = {}  # layer path, slot -> part
    for site in find_sites(plain):
        names = site.names
        slots |= {(site.layer_path, names.attention): "attention", (site.layer_path, names.ffn): "ffn"}
        if names.norm_ffn:
            slots[site.layer_path, names.norm_ffn] = "other"
    for (path, slot), part in slots.items():
        module = getattr(plain.get_submodule(path), slot)
        if isinstance(module, StandIn):
            _around(
                stack, module, "other" if isinstance(module, NoAttention | NoFeedForward) else "adapters", note, clock
            )
        elif part != "other":
            _around(stack, module, part, note, clock, before="adapters")
    if hasattr(model, "_start_merge"):
        start = model._start_merge

        def merge(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            found = start(*args, **kwargs)
            note("merging", began)
            return found

        stack.enter_context(_replaced(model, "_start_merge", merge))


def _around(
    stack: ExitStack, module: nn.Module, part: str, note: Note, clock: Callable[[], float], before: str | None = None
) -> None:
    """Note the module's forward as `part`, and what its pre-hooks take, an adapter's among them, as `before`.

    A pre-hook marks the beginning and the forward itself the end of the hooks: those that a merge brings come later
    than ours, so that no hook of ours could stand behind them.
    """
    entered: list[float] = []
    handle = module.register_forward_pre_hook(lambda *_: entered.append(clock()), prepend=True)
    stack.callback(handle.remove)
    forward = module.forward

    @functools.wraps(forward)
    def clocked(*args: Any, **kwargs: Any) -> Any:
        began = entered.pop() if entered else clock()  # called by hand, past the hooks
        if before is not None and module._forward_pre_hooks.keys() - {handle.id}:
            note(before, began)
            began = clock()
        found = forward(*args, **kwargs)
        note(part, began)
        return found

    stack.enter_context(_replaced(module, "forward", clocked))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of the object itself, over the one of its class, and as it was afterwards."""
    own = name in owner.__dict__
    before = owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if own:
            owner.__dict__[name] = before
        else:
            del owner.__dict__[name]


def _vision(plain: nn.Module) -> list[nn.Module]:
    """What stands beside the language model, on any level, but for the output head."""
    path, _ = decoder_layers(plain)
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    holder, found = plain, []
    for name in path.split(".")[:-1]:
        found += [child for other, child in holder.named_children() if other != name and child is not head]
        holder = getattr(holder, name)
    return found
