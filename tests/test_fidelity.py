"""The script behind docs/fidelity.md: other merges by hand, one small run, and the table on the page."""

from __future__ import annotations

import json

import pytest
import torch
from test_benchmarks import ROOT, load
from torch import nn

from eas_kit import merging
from eas_kit.pia import Factors


@pytest.fixture(scope="module")
def fidelity():
    return load("fidelity")


def test_the_bias_of_the_merged_weight_is_another(fidelity):
    torch.manual_seed(0)
    linear, gain = nn.Linear(5, 3), torch.rand(5)
    factors = Factors(torch.randn(1, 5, 2), torch.randn(2, 5), torch.randn(1, 5))
    weight, bias = merging.fold_linear(linear, factors, gain)
    with torch.no_grad():
        same, other = fidelity.bias_of_merged_weight(linear, factors, gain)
        U, b = factors.up[0], factors.bias[0]
        expected = linear.weight @ torch.diag(gain) @ (torch.eye(5) + U @ factors.down)
    torch.testing.assert_close(weight, expected)
    assert torch.equal(same, weight)
    torch.testing.assert_close(other, expected @ b + linear.bias)
    torch.testing.assert_close(bias, linear.weight @ (gain * b) + linear.bias)
    assert not torch.allclose(bias, other, atol=1e-2)


def test_runs_are_kept_and_collected(fidelity, tmp_path):
    lab = fidelity.Lab(tmp_path, steps=3, search=fidelity.SEARCH | {"reward_batch_size": 4}, val=3)
    jobs = lab.jobs((0,))
    assert len(jobs) == len(fidelity.ADAPTERS) + 1 + len(fidelity.SEARCHES) + 1
    wanted = ["adapter-as_it_is-seed0", "adapter-PIA_and_exchange-seed0", "merge-as_it_is-seed0"]
    for name in wanted:
        key, compute = jobs[name]
        assert fidelity.read(tmp_path, name, key) is None
        fidelity.cached(tmp_path, name, json.loads(json.dumps(key)), compute)
        assert fidelity.read(tmp_path, name, key) is not None
    record = fidelity.report.plain(fidelity.collect(lab, (0,), score=False))
    assert set(record["missing"]) == set(jobs) - set(wanted)
    rows = record["adapters"]
    assert rows["as it is"][0]["loss"] != rows["PIA + exchange"][0]["loss"]
    assert record["merge"][0]["merged_bias"]["max_change"] > 0
    text = fidelity.table(record)
    assert f"| PIA base | 0 | {'not run yet'} |" in text
    assert "Bias of the already merged weight: logits off by" in text
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- numbers:fidelity -->\nold\n<!-- /numbers:fidelity -->\nafter\n")
    fidelity.fill(record, page)
    assert page.read_text() == f"before\n<!-- numbers:fidelity -->\n{text}\n<!-- /numbers:fidelity -->\nafter\n"


def test_the_page_has_the_numbers_of_the_results(fidelity):
    page = (ROOT / "docs" / "fidelity.md").read_text()
    assert fidelity.table(json.loads(fidelity.RESULTS.read_text())) in page
