"""PIA against reference numbers, against an independent float64 calculation, and its contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eas_kit.pia import PIA, GroupedLinear, Route

REFERENCE = Path(__file__).parent / "data" / "pia_reference.npz"
LETTER = {"C": "down_token", "A": "down_pooled", "B": "up_0", "D": "up_1", "router": "router"}


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def pia_of(reference) -> PIA:
    groups, temperature, scale = reference["meta"].tolist()
    pia = PIA(hidden_size=16, rank=4, groups=int(groups), scale=scale, temperature=temperature).eval()
    state = {f"{name}.{k}": reference[f"{letter}_{k}"] for letter, name in LETTER.items() for k in ("weight", "bias")}
    pia.load_state_dict(state, strict=True)
    return pia


def randomise(pia: PIA, seed: int = 0) -> PIA:
    generator = torch.Generator().manual_seed(seed)
    for parameter in pia.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    return pia


def brute_force(pia: PIA, n: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Eq. 4-6 with loops over examples, positions and groups, in float64; nothing shared with the library."""
    p = {name: value.detach().double().numpy() for name, value in pia.state_dict().items()}
    y = np.empty_like(n)
    for b in range(len(n)):
        m = np.mean([n[b, t] for t in range(n.shape[1]) if mask[b, t]], axis=0)
        logits = (p["router.weight"] @ m + p["router.bias"]) / pia.temperature
        w = np.exp(logits) / np.exp(logits).sum()
        for t in range(n.shape[1]):
            if pia.paths == 2:
                token = p["down_token.weight"] @ n[b, t] + p["down_token.bias"]
                z = (token + p["down_pooled.weight"] @ m + p["down_pooled.bias"]) / 2
            else:
                z = p["down_pooled.weight"] @ n[b, t] + p["down_pooled.bias"]
            out = np.zeros_like(m)
            rows, columns = pia.hidden_size // pia.groups, pia.rank // pia.groups
            for path in (0, 1):
                for g in range(pia.groups):
                    block = p[f"up_{path}.weight"][g * rows : (g + 1) * rows]
                    out[g * rows : (g + 1) * rows] += w[path] * (block @ z[g * columns : (g + 1) * columns])
                out += w[path] * p[f"up_{path}.bias"]
            y[b, t] = n[b, t] + pia.scale * out
    return y


class TestReference:
    def test_output(self, reference):
        y = pia_of(reference)(reference["x"], torch.ones(3, 7, dtype=torch.bool))
        torch.testing.assert_close(y, reference["y"], atol=1e-5, rtol=0)

    def test_route(self, reference):
        route = pia_of(reference).route(reference["x"].mean(1))
        torch.testing.assert_close(route.weights, reference["router"], atol=1e-5, rtol=0)
        torch.testing.assert_close(route.pooled, reference["pooled"], atol=1e-5, rtol=0)

    def test_next_step_with_frozen_route(self, reference):
        pia = pia_of(reference)
        route = pia.route(reference["x"].mean(1))
        torch.testing.assert_close(pia(reference["x_next"], route=route), reference["y_next"], atol=1e-5, rtol=0)
        fresh = pia(reference["x_next"], torch.ones(3, 1, dtype=torch.bool))  # control: the route must be the prompt's
        assert (fresh - reference["y_next"]).abs().max() > 1e-2

    def test_fold(self, reference):
        pia = pia_of(reference)
        M, b = pia.fold(reference["x"].mean(1))
        torch.testing.assert_close(M, reference["merged_weight"], atol=1e-5, rtol=0)
        torch.testing.assert_close(b, reference["merged_bias"], atol=1e-5, rtol=0)
        y = torch.einsum("bij,bsj->bsi", M, reference["x"]) + b[:, None]
        torch.testing.assert_close(y, reference["y"], atol=1e-5, rtol=0)

    def test_state_dict_names(self, reference):
        shapes = {name: tuple(value.shape) for name, value in pia_of(reference).state_dict().items()}
        assert shapes == {
            "down_token.weight": (4, 16),
            "down_token.bias": (4,),
            "down_pooled.weight": (4, 16),
            "down_pooled.bias": (4,),
            "up_0.weight": (16, 2),
            "up_0.bias": (16,),
            "up_1.weight": (16, 2),
            "up_1.bias": (16,),
            "router.weight": (2, 16),
            "router.bias": (2,),
        }


@pytest.mark.parametrize("paths", [1, 2])
@pytest.mark.parametrize(("d", "r", "groups"), [(14, 10, 2), (21, 15, 3), (13, 7, 1)])
def test_equals_brute_force_in_float64(paths, d, r, groups):
    pia = randomise(PIA(d, r, groups, scale=0.7, temperature=3.0, paths=paths).double().eval())
    n = torch.randn(3, 5, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    expected = brute_force(pia, n.numpy(), mask.numpy())
    np.testing.assert_allclose(pia(n, mask).detach().numpy(), expected, rtol=0, atol=1e-12)
    M, b = pia.fold(pia.mean(n, mask))
    folded = torch.einsum("bij,bsj->bsi", M, n) + b[:, None]
    np.testing.assert_allclose(folded.detach().numpy(), expected, rtol=0, atol=1e-12)


def test_factors_are_the_fold_and_have_the_rank():
    pia = randomise(PIA(22, 6, 2))
    mean = torch.randn(3, 22)
    up, down, bias = pia.factors(pia.route(mean))
    assert (up.shape, down.shape, bias.shape) == ((3, 22, 6), (6, 22), (3, 22))
    M, b = pia.fold(mean)
    torch.testing.assert_close(torch.eye(22) + up @ down, M)
    torch.testing.assert_close(bias, b)


@pytest.mark.parametrize("paths", [1, 2])
def test_starts_as_identity_and_trains(paths):
    torch.manual_seed(0)
    pia = PIA(22, 6, 2, paths=paths)
    n, mask, target = torch.randn(3, 5, 22), torch.ones(3, 5, dtype=torch.bool), torch.randn(3, 5, 22)
    assert torch.equal(pia(n, mask), n)
    optimizer = torch.optim.AdamW(pia.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (pia(n, mask) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    untrained = [name for name, p in pia.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert untrained == []


def test_only_prompt_positions_enter_the_mean():
    pia = randomise(PIA(14, 4, 2)).eval()
    n = torch.randn(2, 5, 14)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)
    other = torch.where(mask[..., None], n, torch.full_like(n, float("nan")))
    torch.testing.assert_close(pia.mean(other, mask), pia.mean(n, mask))
    assert torch.equal(pia(other, mask)[mask], pia(n, mask)[mask])


def test_dropout_only_in_training():
    pia = randomise(PIA(14, 4, 2, dropout=0.5))
    n, mask = torch.randn(2, 5, 14), torch.ones(2, 5, dtype=torch.bool)
    assert not torch.equal(pia(n, mask), pia(n, mask))
    pia.eval()
    assert torch.equal(pia(n, mask), pia(n, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_dtype_and_routes_in_float32(dtype):
    pia = PIA(22, 6, 2)
    for p in pia.parameters():
        p.data = 0.3 * torch.randn_like(p)
    n, mask = torch.randn(3, 5, 22), torch.ones(3, 5, dtype=torch.bool)
    exact = pia.eval()(n, mask)
    half = pia(n.to(dtype), mask)  # adapters in float32 on a half-precision model
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, atol=5e-2, rtol=5e-2)
    pia.to(dtype)
    whole = pia(n.to(dtype), mask)
    assert whole.dtype == dtype
    assert pia.route(n.mean(1).to(dtype)).weights.dtype == torch.float32
    torch.testing.assert_close(whole.float(), exact, atol=0.2, rtol=0.2)


def test_route_map_keeps_what_is_not_there():
    route = Route(torch.zeros(3, 2), torch.ones(3, 2), None).map(lambda t: t[:1])
    assert route.mean.shape == (1, 2)
    assert route.pooled is None


def test_grouped_linear_is_its_dense_form():
    up = GroupedLinear(6, 22, 2)
    up.weight.data, up.bias.data = torch.randn(22, 3), torch.randn(22)
    z = torch.randn(5, 6)
    torch.testing.assert_close(up(z), z @ up.dense().T + up.bias)
    assert up.dense()[:11, 3:].abs().sum() == 0


def test_errors():
    with pytest.raises(ValueError, match="groups=3 must divide both the rank 6 and the width 22"):
        PIA(22, 6, 3)
    with pytest.raises(ValueError, match="paths: wanted 2"):
        PIA(22, 6, 2, paths=3)
    with pytest.raises(ValueError, match="PIA needs prompt_mask"):
        PIA(22, 6, 2)(torch.zeros(1, 2, 22))
