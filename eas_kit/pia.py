"""PIA, the propagation-of-information adapter of Effective Attention Skipping (arXiv 2403.15226, eq. 4-13).

    n (B, S, d) --+--> C: d -> r  ---------------+
                  |                              +--> z = (Cn + c_C + Am + c_A) / 2   (B, S, r)
                  +--> mean over the prompt, m --+         |
                              (B, d)     A: d -> r         |    Bu, Du: r -> d, in `groups` blocks
                                |                          v
                                +--> router: d -> 2 --> w (B, 2)
                                                           |
    y = n + s * (w0 * (Bu z + c_B) + w1 * (Du z + c_D))  <-+

At a kept attention there is one path only, z = An + c_A. After the prompt is read, w and Am + c_A are constants, so y
is an affine map of n and can be folded into whichever linear reads it.

That is parts="frozen". The paper's ablation takes it apart, and so do the two other values:

- "base": every token by itself. z_t = C n_t + c_C (at a kept attention A n_t + c_A), and its router reads n_t. Nothing
  is pooled and nothing of a prompt is kept.
- "exchange": + information exchange. z_t = (C n_t + c_C + A m_t + c_A) / 2 and the router reads m_t, both anew at every
  position: m_t is the mean over the prompt for the prompt's positions, and for those after it over the prompt and all
  that was written up to t. With a KV cache it is a running mean, so that a step gives what the whole sequence would.
- "frozen": + frozen bias. m_t stays the prompt's mean, for good. Only this is an affine map of n, to be merged.

Shapes: B batch, S sequence, d model width, r rank. This module imports nothing else of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PARTS = ("base", "exchange", "frozen")


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Within it autocast lowers no product: what is calculated once for a whole answer is worth full precision."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Route(NamedTuple):
    """What an adapter keeps of one prompt per example: all it needs after prefill, in at least float32."""

    mean: Tensor
    """m, (B, d): mean of n over the prompt."""
    weights: Tensor
    """w, (B, 2): the path router's softmax."""
    pooled: Tensor | None
    """A m + c_A, (B, r); None with one path."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Route:
        """The same with every tensor changed, e.g. reordered along the batch."""
        return Route(*(None if t is None else change(t) for t in self))


class Running(NamedTuple):
    """What an adapter of parts="exchange" keeps per example: the mean of all n so far, and of how many it is."""

    mean: Tensor
    """(B, d), in at least float32."""
    count: Tensor
    """(B, 1)."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Running:
        """The same with every tensor changed, e.g. reordered along the batch."""
        return Running(*map(change, self))


class Factors(NamedTuple):
    """The folded adapter as factors: y = n + up (down n) + bias, example by example."""

    up: Tensor
    """(B, d, r), the factor of two paths included."""
    down: Tensor
    """(r, d)."""
    bias: Tensor
    """b, (B, d)."""


class SharedFactors(NamedTuple):
    """The folded adapters of a batch, with all that rows can share: y_b = n_b + up (w_b x (down n_b)) + bias_b."""

    up: Tensor
    """[U_0, U_1], (d, 2 r), the factor of two paths included."""
    down: Tensor
    """(r, d)."""
    weights: Tensor
    """w, (B, 2); w_b x z is [w_b0 z, w_b1 z], (2 r)."""
    bias: Tensor
    """b, (B, d)."""


class GroupedLinear(nn.Module):
    """r -> d, block-diagonal: block i of the output reads block i of the input. weight (d, r / groups), bias (d,)."""

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__()
        if in_features % groups or out_features % groups:
            raise ValueError(
                f"groups={groups} must divide both the rank {in_features} and the width {out_features}; choose another"
            )
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, z: Tensor) -> Tensor:
        if self.groups == 1:
            return F.linear(z, self.weight, self.bias)
        blocks = zip(z.chunk(self.groups, dim=-1), self.weight.chunk(self.groups, dim=0), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in blocks], dim=-1) + self.bias

    def dense(self) -> Tensor:
        """The whole (d, r) matrix, zeros outside the blocks."""
        return torch.block_diag(*self.weight.chunk(self.groups, dim=0))


class PIA(nn.Module):
    """The adapter. `paths=2` at a skipped site, `paths=1` at a kept one (no `down_token`, z = A n + c_A).

    State dict: down_token (C), down_pooled (A): weight (r, d); up_0 (Bu), up_1 (Du): weight (d, r / groups); router
    (R): weight (2, d); each with a bias. Both ups start at zero, so a new adapter returns its input. At a skipped site
    parts="base" has no down_pooled. path_factor: of the sum of the two down paths, 1/2 in the paper.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        groups: int = 2,
        scale: float = 1.0,
        temperature: float = 10.0,
        dropout: float = 0.1,
        paths: int = 2,
        parts: str = "frozen",
        path_factor: float = 0.5,
    ) -> None:
        super().__init__()
        if paths not in (1, 2):
            raise ValueError(f"paths: wanted 2 (skipped site) or 1 (kept site), got {paths!r}")
        if parts not in PARTS:
            raise ValueError(f"parts: wanted one of {PARTS}, got {parts!r}")
        self.hidden_size, self.rank, self.groups, self.paths = hidden_size, rank, groups, paths
        self.scale, self.temperature, self.parts, self.path_factor = scale, temperature, parts, path_factor
        if paths == 2:
            self.down_token = nn.Linear(hidden_size, rank)
        if paths == 1 or parts != "base":
            self.down_pooled = nn.Linear(hidden_size, rank)
        self.up_0 = GroupedLinear(rank, hidden_size, groups)
        self.up_1 = GroupedLinear(rank, hidden_size, groups)
        self.router = nn.Linear(hidden_size, 2)
        self.drop = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Downs as any linear layer (Kaiming), biases and both ups zero: the adapter starts as the identity."""
        for name, module in self.named_children():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=5**0.5)
                nn.init.zeros_(module.bias)
            elif name.startswith("up_"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def down(self) -> nn.Linear:
        """The path that reads every token: C, at a kept site A."""
        return self.down_token if self.paths == 2 else self.down_pooled

    @property
    def reads_prompt(self) -> bool:
        """True if something of the prompt is kept for the tokens after it."""
        return self.parts != "base"

    @staticmethod
    def mean(n: Tensor, prompt_mask: Tensor) -> Tensor:
        """m, (B, d): mean of n (B, S, d) over the positions where prompt_mask (B, S) is true, in at least float32."""
        mask = prompt_mask.to(device=n.device, dtype=torch.bool)[..., None]  # (B, S, 1)
        wide = torch.promote_types(n.dtype, torch.float32)
        # masked_fill, not a product: what stands at padding may be anything, also inf
        return n.to(wide).masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def route(self, prompt_mean: Tensor) -> Route:
        """Router weights and pooled feature (eq. 5) from the mean over a prompt, m (B, d), or from one of every
        position's own, (B, S, d); in at least float32.
        """
        wide = torch.promote_types(prompt_mean.dtype, torch.float32)
        with no_autocast(prompt_mean.device):
            m = prompt_mean.to(wide)
            logits = F.linear(m, self.router.weight.to(wide), self.router.bias.to(wide))
            pooled = None
            if self.paths == 2 and self.parts != "base":
                pooled = F.linear(m, self.down_pooled.weight.to(wide), self.down_pooled.bias.to(wide))
            return Route(m, torch.softmax(logits / self.temperature, dim=-1), pooled)

    def running(
        self, n: Tensor, prompt_mask: Tensor | None = None, state: Running | None = None
    ) -> tuple[Route, Running]:
        """parts="exchange": the route of every position of n (B, S, d), and what to keep for those to come.

        At first with prompt_mask (B, S), whose positions all have the mean over the prompt; those after its last one
        go on with the mean. Later with the `state` of before. All positions after a prompt count, so padding may
        stand before a prompt and after an answer, not in between.
        """
        wide = torch.promote_types(n.dtype, torch.float32)
        n = n.to(wide)
        if prompt_mask is None:
            before, count = state.mean * state.count, state.count
            counts = count[:, None] + torch.arange(1, n.shape[1] + 1, device=n.device)[:, None]  # (B, S, 1)
            means = (before[:, None] + n.cumsum(dim=1)) / counts
            return self.route(means), Running(means[:, -1], counts[:, -1])
        mask = prompt_mask.to(device=n.device, dtype=torch.bool)
        after = mask.flip(1).cumsum(dim=1).flip(1) == 0  # behind the last position of the prompt
        seen = (mask | after)[..., None]  # (B, S, 1)
        counts = seen.cumsum(dim=1).clamp(min=1)
        means = n.masked_fill(~seen, 0).cumsum(dim=1) / counts
        prompt = self.mean(n, mask)[:, None].expand_as(means)
        return self.route(torch.where(after[..., None], means, prompt)), Running(means[:, -1], counts[:, -1])

    def delta(self, n: Tensor, route: Route) -> Tensor:
        """y - n, (B, S, d), in the adapter's dtype (eq. 4 and 6)."""
        n = n.to(self.down.weight.dtype)
        z = self.down(n)  # (B, S, r)
        if route.pooled is not None:
            pooled = route.pooled if route.pooled.dim() == 3 else route.pooled[:, None]
            z = self.path_factor * (z + pooled.to(n.dtype))
        z = self.drop(z)
        w = route.weights.to(n.dtype)
        if w.dim() == 3:  # (B, S, 2): a pair a position
            return self.scale * (w[..., :1] * self.up_0(z) + w[..., 1:] * self.up_1(z))
        # w0 (Bu z + c_B) + w1 (Du z + c_D) = (w0 Bu + w1 Du) z + (w0 c_B + w1 c_D): w is one pair an example, so mixing
        # the two matrices first is half the work of mixing what they return, and keeps less for the backward pass
        up = torch.einsum("bp,pdk->bdk", w, torch.stack([self.up_0.weight, self.up_1.weight]))  # (B, d, r / groups)
        bias = w @ torch.stack([self.up_0.bias, self.up_1.bias])  # (B, d)
        up = up.unflatten(1, (self.groups, -1)).transpose(2, 3)  # (B, groups, r / groups, d / groups)
        z = z.unflatten(2, (self.groups, -1)).transpose(1, 2)  # (B, groups, S, r / groups)
        return self.scale * ((z @ up).transpose(1, 2).flatten(2) + bias[:, None])  # (B, S, d)

    def forward(self, n: Tensor, prompt_mask: Tensor | None = None, *, route: Route | None = None) -> Tensor:
        """y (B, S, d) from n (B, S, d) and either prompt_mask (B, S) bool, or the route of a prompt read before."""
        if route is None and self.parts == "base":
            route = self.route(n)
        elif route is None:
            if prompt_mask is None:
                raise ValueError("PIA needs prompt_mask (B, S), or route=pia.route(mean) of a prompt read before")
            exchange = self.parts == "exchange"
            route = self.running(n, prompt_mask)[0] if exchange else self.route(self.mean(n, prompt_mask))
        return n + self.delta(n, route).to(n.dtype)

    def shared_factors(self, route: Route) -> SharedFactors:
        """The adapter folded for given prompts, as far as rows can share it; in at least float32 (eq. 8-10)."""
        with no_autocast(route.weights.device):
            return self._shared_factors(route)

    def _shared_factors(self, route: Route) -> SharedFactors:
        if self.parts != "frozen":
            raise ValueError(
                f'only parts="frozen" is an affine map that can be folded, this adapter has {self.parts!r}'
            )
        wide = torch.promote_types(self.down.weight.dtype, torch.float32)
        w = route.weights.to(wide)  # (B, 2)
        up = self.scale * torch.cat([self.up_0.dense(), self.up_1.dense()], dim=1).to(wide)  # (d, 2 r)
        bias = self.scale * (w @ torch.stack([self.up_0.bias, self.up_1.bias]).to(wide))  # (B, d)
        factor, constant = 1.0, self.down.bias.to(wide).expand(len(w), -1)  # (B, r)
        if self.paths == 2:
            factor = self.path_factor
            constant = factor * (constant + route.pooled.to(wide))
        routed = (w[:, :, None] * constant[:, None]).flatten(1)  # (B, 2 r)
        return SharedFactors(factor * up, self.down.weight.to(wide), w, bias + routed @ up.T)

    def factors(self, route: Route) -> Factors:
        """The adapter folded for given prompts, as rank-r factors in at least float32 (eq. 8-10)."""
        shared = self.shared_factors(route)
        with no_autocast(route.weights.device):
            up = torch.einsum("bp,dpr->bdr", shared.weights, shared.up.unflatten(1, (2, -1)))  # U
        return Factors(up, shared.down, shared.bias)

    def fold(self, prompt_mean: Tensor) -> tuple[Tensor, Tensor]:
        """(M, b), (B, d, d) and (B, d), with y = M n + b for the prompts with these means (B, d). For checks."""
        up, down, bias = self.factors(self.route(prompt_mean))
        eye = torch.eye(self.hidden_size, dtype=up.dtype, device=up.device)
        return eye + up @ down, bias

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, rank={self.rank}, groups={self.groups}, scale={self.scale}, "
            f"temperature={self.temperature}, paths={self.paths}"
            + (f", parts={self.parts!r}" if self.parts != "frozen" else "")
            + (f", path_factor={self.path_factor}" if self.path_factor != 0.5 else "")
        )
