"""The search does not depend on the number of processes, and what the loop needs of its surroundings."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import search_process
import torch
from two_processes import run_two

from eas_kit.processes import Order, StopOnInterrupt, make_accelerator
from eas_kit.training import SearchResult


@pytest.mark.slow
def test_two_processes_search_like_one(tmp_path):
    run_two("search_process.py", tmp_path, ACCELERATE_USE_CPU="true")

    first, second = (SearchResult.load(tmp_path / f"result-{rank}.json") for rank in range(2))
    assert first.history == second.history  # bit for bit: same draws, same losses, same preferences
    assert torch.equal(first.preferences, second.preferences)

    net, alone, history = search_process.run()
    assert [record["masks"] for record in first.history] == [record["masks"] for record in alone.history]
    torch.testing.assert_close(first.preferences, alone.preferences, rtol=1e-4, atol=1e-6)
    assert alone.preferences.abs().max() > 1e-3  # there was something to agree on
    assert first.skipped == alone.skipped
    np.testing.assert_allclose([s["loss"] for s in first.steps], [s["loss"] for s in alone.steps], rtol=1e-4)
    more = [json.loads((tmp_path / f"more-{rank}.json").read_text()) for rank in range(2)]
    assert more[0]["processes"] == 2
    assert more[0]["weights"] == more[1]["weights"] == pytest.approx(search_process.weights(net), rel=1e-4)
    assert more[0]["losses"] == more[1]["losses"] == pytest.approx(history.losses, rel=1e-4)
    assert more[0]["resumed"]
    assert more[1]["resumed"]


def test_order_visits_every_example_once_an_epoch_and_depends_on_the_seed():
    order = Order(11, seed=3)
    first, second = order.take(0, 11), order.take(11, 11)
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second
    assert order.take(7, 9) == first[7:] + second[:5]  # any cut of the stream, also one across epochs
    assert Order(11, seed=3).take(0, 40) == order.take(0, 40)
    assert Order(11, seed=4).take(0, 11) != first
    assert Order(11, seed=3, purpose=1).take(0, 11) != first


def test_first_interrupt_asks_second_one_interrupts():
    asked = []
    before = signal.getsignal(signal.SIGINT)
    with StopOnInterrupt(lambda: asked.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert asked == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert asked == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_precision_can_change_within_one_process():
    net = torch.nn.Linear(2, 3)
    for precision in ("no", "bf16", "no"):
        assert make_accelerator(precision, net).mixed_precision == precision
