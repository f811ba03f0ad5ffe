"""Checks of exercises: right, wrong and missing answers, against a truth that is calculated here in another way."""

from __future__ import annotations

import math
from types import SimpleNamespace as Fake

import numpy as np
import pandas as pd
import pytest
import torch
import toys

import eas_kit as eas
from eas_kit import exercises, merging
from eas_kit.exercises import verdict
from eas_kit.exercises.verdict import NOT_YET, Verdict, exercise
from eas_kit.probe import ProbeReport
from eas_kit.slots import StandIn

MISSING = [None, ...]
COSTS = {"mha": [0.02, 0.7, 0.3, -0.01, 0.05], "ffn": [2.0, 0.11, 0.0, 0.4, 0.03]}
DENSE = 0.125


class PricedTask:
    """A task whose loss is the price of all that is skipped, and a fine for both parts of layer 1."""

    def __init__(self):
        self.asked = 0

    def score(self, model, split, limit):
        assert (split, limit) == ("val", 7)
        self.asked += 1
        layers = model.get_decoder().layers
        gone = {
            "mha": [i for i, layer in enumerate(layers) if isinstance(layer.self_attn, StandIn)],
            "ffn": [i for i, layer in enumerate(layers) if isinstance(layer.mlp, StandIn)],
        }
        fine = 0.5 * (1 in gone["mha"] and 1 in gone["ffn"])
        return {"loss": DENSE + fine + sum(COSTS[kind][i] for kind, sites in gone.items() for i in sites)}


@pytest.fixture
def priced():
    return PricedTask()


@pytest.fixture(scope="module")
def model():
    return toys.make_llama()


class PricedPlay:
    site_kinds = ("mha",) * 5 + ("ffn",) * 5

    def score(self, mask):
        return {"loss": DENSE + sum([*COSTS["mha"], *COSTS["ffn"]][site] for site in mask)}


def says(found: Verdict, right: bool | None, *words: str) -> None:
    assert found.right is right, found
    for some in words:
        assert some in repr(found)


# -- the answer itself ---------------------------------------------------------------------------------------------


def test_every_check_takes_no_answer_for_an_answer_and_computes_nothing():
    checks = [getattr(exercises, name) for name in exercises.__all__ if name != "Verdict"]
    assert len(checks) == 17
    for check in checks:
        for missing in MISSING:
            found = check(missing, *[object()] * 5)  # of no use to any check
            assert found == Verdict(None, NOT_YET)
            assert repr(found) == f"… {NOT_YET}"
        assert check.__doc__, "says which notebook asks, and what is wanted"


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message"),
    [
        ("whole", [(4, 4), (4.0, 4), (np.int64(4), 4), (torch.tensor(4), 4)], [4.5, "4", True, [4]], "wanted a "),
        ("number", [(0.5, 0.5), (np.float32(0.5), 0.5)], ["0.5", torch.ones(2), [1, 2], False], "wanted a number"),
        ("pair", [((1, 2), (1, 2)), (np.array([1.0, 2.0]), (1, 2))], [1.0, (1, 2, 3), (1, "2")], "wanted "),
        ("sites", [([], set()), ((3, 1), {1, 3}), (torch.tensor([2]), {2})], [3, "31", [1, 1], [0.5]], "a"),
        ("text", [(" a ", "a")], [3, ["a"]], "wanted a text in quotes; got"),
    ],
)
def test_kinds_of_answers(kind, good, bad, message):
    take = getattr(verdict, kind)
    for given, wanted in good:
        assert take(given) == wanted
    for given in bad:
        with pytest.raises(ValueError, match=message):
            take(given)


def test_errors_of_judging_are_hints_and_mistakes_in_a_check_are_not_hidden():
    @exercise(verdict.number)
    def judged(answer):
        if answer > 1:
            raise eas.EASError("this mask does not fit")
        return 1 / answer, ""

    says(judged(2), False, "✗ not yet right: this mask does not fit")
    says(judged("2"), False, "wanted a number, such as 0.25; got '2', a str")
    with pytest.raises(ZeroDivisionError):
        judged(0)


def test_how_far_off_a_number_is():
    assert verdict.close(0.101, 0.1) and not verdict.close(0.11, 0.1)
    assert verdict.close(math.inf, math.inf)
    assert "other way round" in verdict.how_far(-0.2, 0.2)
    assert "a share, not percent" in verdict.how_far(20, 0.2)
    assert verdict.how_far(0.3, 0.2) == "0.3 is too large"
    assert verdict.how_far(0.1, 0.2) == "0.1 is too small"


# -- 00 and 01 -----------------------------------------------------------------------------------------------------


def test_most_needed_attention(model, priced):
    check = exercises.most_needed_attention
    before = toys.snapshot(model)
    says(check(1, model, priced, limit=7), True, "without attention 1 the loss is 0.825, without any other", "0.425")
    says(check(2, model, priced, limit=7), False, "is 0.425, and 1 of the other 4 cost more", "all of them?")
    says(check(5, model, priced, limit=7), False, "the attentions are numbered 0 to 4; there is no 5")
    assert toys.snapshot(model) == before, "the model is as it was"


def test_surplus_of_both(model, priced):
    def check(answer, layer=1):
        return exercises.surplus_of_both(answer, model, priced, layer=layer, limit=7)

    says(check(0.5), True, "together +1.310, one by one +0.810: more than the sum")
    says(check(0.0, layer=3), True, "together +0.390, one by one +0.390")
    says(check(1.31), False, "take off what each of them costs alone")
    says(check(1.31 + DENSE), False, "take off what each of them costs alone")
    says(check(0.5 - DENSE), False, "not once")
    says(check(-0.5), False, "the other way round")
    says(check(0.7), False, "0.7 is too large")


@pytest.fixture
def report():
    rows = [
        ("mha", 1, 0, (1,), 0.70),
        ("mha", 2, 0, (0, 2), 0.32),  # what the two cost alone
        ("mha", 2, 1, (1, 4), 0.90),  # more
        ("mha", 3, 0, (0, 1, 2), 1.50),  # more
        ("mha", 3, 1, (2, 3, 4), 0.30),  # less
        ("ffn", 3, 0, (0, 1, 2), 0.9),
        ("ffn", 3, 1, (1, 2, 4), 3.0),
        ("layer", 3, 0, (0, 1, 2), 9.0),
    ]
    names = ("kind", "k", "trial", "mask", "loss")
    return ProbeReport(
        [dict(zip(names, (*row[:4], row[4] + DENSE)), accuracy=0.5) for row in rows],
        {"loss": DENSE, "accuracy": 1.0},
        1.0,
    )


def test_shared_by_the_worst(report):
    check = exercises.shared_by_the_worst
    says(check([2, 1], report, 3), True, "attentions [0, 1, 2] and feed-forwards [1, 2, 4] share [1, 2]")
    says(
        check({1, 0}, report, 3), False, "of your 2 layers 1 are shared, and 2 are wanted", "feed-forwards end at 3.125"
    )
    says(check([], report, 3), False, "of your 0 layers")
    says(check(2, report, 3), False, "wanted a list of numbers, such as [2, 5]; got 2, a int")


def test_underestimated_masks(report):
    sweep = pd.DataFrame(
        [
            {"kind": kind, "site": i, "loss_change": cost}
            for kind, costs in COSTS.items()
            for i, cost in enumerate(costs)
        ]
    )
    check = exercises.underestimated_masks
    report.rows[1]["loss"] -= 1e-6
    says(check(2, report, sweep), True, "2 of 4; on the mean a mask costs 0.755, its sites alone 0.6")
    report.rows.append({"kind": "mha", "k": 2, "trial": 2, "mask": (0, 1), "loss": DENSE, "accuracy": 0.0})
    says(check(3, report, sweep), False, "that many of the 5 masks cost less")
    says(check(5, report, sweep), False, "there are 5 such masks; 5 is too large")
    says(check(1, report, sweep), False, "1 is too small")


# -- 02 ------------------------------------------------------------------------------------------------------------


def test_width_of_rewards():
    losses = [6.0, 6.5, 7.0]
    exp, standardized = math.exp(-6) - math.exp(-7), 1 / math.sqrt(0.5 / 3)
    check = exercises.width_of_rewards
    says(check((exp, standardized), losses), True, "exp 0.0016; standardized 2.4495")
    says(check((standardized, exp), losses), False, "exp: 2.449 is too large; standardized: 0.001567 is too small")
    says(check((-exp, standardized), losses), False, "exp: the size is right, the sign is not")
    says(check(exp, losses), False, "wanted two numbers")


def test_most_skipped_site():
    history = [{"counts": [9, 9, 9], "masks": [(0,), (1,)]}, {"counts": [2, 5, 5], "masks": [(1,), (2,), (2,)]}]
    result = Fake(history=history, preferences=torch.tensor([0.5, -0.5, 0.0]))
    check = exercises.most_skipped_site
    says(check(1, result), True, "site 1 was skipped in 5 of 5 subnetworks; its preference is number 1 from below of 3")
    says(check(2, result), True, "number 2 from below")
    says(check(0, result), False, "in 2 of 5 subnetworks; 2 sites were skipped more often")
    says(check(3, result), False, "the sites are numbered 0 to 2")
    says(check(1, Fake(history=[])), None, "stopped before its first update")


# -- 03 ------------------------------------------------------------------------------------------------------------


def test_column_of_largest_change():
    index = ["zero_shot, seed 0", "full, seed 0", "pia, seed 0"]
    columns = pd.DataFrame({"NAT": [0.4, 0.5, 0.7], "SOC": [0.9, 0.5, 0.3], "LAN": [np.nan] * 3}, index=index)
    check = exercises.column_of_largest_change
    says(
        check("SOC", columns), True, "in SOC tuned arms are -50.0 points from the untuned model, in the others by less"
    )
    says(check("NAT", columns), False, "+20.0 points", "1 columns change more")
    says(check("soc", columns), False, "there is no column 'soc'; they are NAT, SOC")
    says(check("LAN", columns), False, "there is no column 'LAN'")
    says(check("SOC", columns.iloc[1:]), None, "needs rows of zero_shot and of tuned arms")


def test_share_at_ranks(model):
    width, layers, mask = 38, 5, [1, 3]
    net = eas.attach(toys.make_llama(), eas.EASConfig(skip_rank=6, adapt_rank=4))
    net.mask = mask
    used = sum(p.numel() for name, adapter in net.active_adapters().items() for p in adapter.parameters())
    truth = used / sum(p.numel() for p in model.parameters())
    assert len(net.active_adapters()) == layers and width == model.config.hidden_size
    before = toys.snapshot(model)

    def check(answer):
        return exercises.share_at_ranks(answer, model.config, mask, skip_rank=6, adapt_rank=4)

    says(check(truth), True, "of the language model; ranks twice as large train ")
    says(check(100 * truth), False, "wanted is a share, not percent")
    says(check(eas.measure.parameters(net)["share"]), False, "the share of all adapters, of both kinds at every site")
    says(check(truth / 3), False, "too small")
    assert toys.snapshot(model) == before


# -- 04 ------------------------------------------------------------------------------------------------------------


def test_error_of_the_slip():
    net = eas.attach(toys.make_llama(), eas.EASConfig(skip_rank=6, adapt_rank=4, dropout=0.0))
    toys.stir(net.adapters)
    net.mask = [1, 3]
    net.eval()
    inputs = toys.make_prompts((7,), images=None)
    right, plain = merging.fold_linear, eas.check_merge(net, inputs, max_new_tokens=3)

    def slip(linear, factors, gain=None, shift=None):
        weight, _ = right(linear, factors, gain, shift)
        rows = torch.stack([(row * factors.bias[0]).sum() for row in weight])
        return weight, rows if linear.bias is None else rows + linear.bias

    merging.fold_linear = slip
    slipped = eas.check_merge(net, inputs, max_new_tokens=3)
    merging.fold_linear = right
    assert slipped.max_rel_diff > 1e-3 > plain.max_rel_diff

    def check(answer):
        return exercises.error_of_the_slip(answer, net, inputs, 3)

    says(check(slipped), True, "of the logits' scale", "times what a proof may be off")
    says(check(slipped.max_rel_diff), True)
    says(check(plain), False, "is the slip in place while check_merge runs?")
    says(check(3 * slipped.max_rel_diff), False, "too large")
    says(check("large"), False, "wanted a number")
    assert merging.fold_linear is right
    assert eas.check_merge(net, inputs, max_new_tokens=3)


def test_tokens_to_win_back():
    def times(merged_decode):
        arms = {"merged": (0.030, merged_decode), "unmerged": (0.010, 0.5)}
        return {"arms": {n: {"prefill": {"median": p}, "decode": {"median": d}} for n, (p, d) in arms.items()}}

    check = exercises.tokens_to_win_back
    says(check(20, times(0.49), 11), True, "20.0 ms more before the first token, 1.00 ms less for each: 20 tokens")
    says(check(2, times(0.49), 11), False, "that counts answers of 11 tokens")
    says(check(30, times(0.49), 11), False, "30 is too large: wanted is the extra time of the prefill")
    says(check(-20, times(0.51), 11), True, "here it is never won back")


# -- 05 ------------------------------------------------------------------------------------------------------------


def test_record_left_out():
    task = Fake(skipped=["a.json, record 3: no question"], split=None)
    check = exercises.record_left_out
    new = "problems.json, record 1: the answer 9 is outside"
    says(check(Fake(skipped=[*task.skipped, new], split=None), task), True, f"left out and counted: {new}")
    says(check(Fake(skipped=task.skipped, split=None), task), False, "nothing more than before was left out")
    says(
        check(Fake(skipped=[new, "another"], split=None), task), False, "2 records were left out, wanted one; the first"
    )
    says(check(3, task), False, "wanted the task that load_task returned; got a int")


def test_target_tokens():
    class Letters:
        name, prompt_format = "letters", "QCM-LEA"

        def target_ids(self, example):
            return list(range(3 if self.prompt_format == "QCM-A" else len(example))), 2

    check, task = exercises.target_tokens, Letters()
    says(check(3, task, "an example", prompt_format="QCM-A"), True, "3 tokens, 2 of them scored", "there are 10")
    says(check(10, task, "an example", prompt_format="QCM-A"), False, "with the notebook's own settings")
    says(check(2, task, "an example", prompt_format="QCM-A"), False, "2 is too small: count len(task.target_ids")
    says(check(2, task, "an example", captions=True), None, "letters has no captions")
    assert task.prompt_format == "QCM-LEA"


# -- 06 ------------------------------------------------------------------------------------------------------------


def test_better_mask():
    check, rivals = exercises.better_mask, {"bandit": (0, 4), "cosine": (2, 3)}
    says(check((3, 0), PricedPlay(), rivals, k=2), True, "loss 0.1350, the best of the others, bandit, 0.1950")
    says(check((4, 0), PricedPlay(), rivals, k=2), False, "loss 0.1950", "Exchange one site for another")
    says(check((7, 0), PricedPlay(), rivals, k=2), False, "wanted 2 attentions", "0 to 4; you have 2 sites, 1 of them")
    says(check((0, 3, 4), PricedPlay(), rivals, k=2), False, "you have 3 sites, 3 of them attentions")


def test_most_needed_feed_forward():
    check = exercises.most_needed_feed_forward
    says(check(5, PricedPlay()), True, "without site 5 the loss is 2.125, without any other one at most 0.525")
    says(check(8, PricedPlay()), False, "without site 8 the loss is 0.525, and 1 of the other 4 cost more")
    says(check(0, PricedPlay()), False, "the feed-forwards are sites 5 to 9, behind the attentions; got 0")


def test_saved_mask(tmp_path):
    check, file = exercises.saved_mask, tmp_path / "mine.json"
    says(check(file, PricedPlay(), k=2), False, "no file")
    eas.save_mask(file, [1, 4], num_sites=5, kind="mha")
    says(check(str(file), PricedPlay(), k=2), True, "mine.json skips [1, 4]; loss 0.8750")
    says(check(file, PricedPlay(), k=3), False, "this file skips 2 sites, [1, 4]; wanted 3")
    eas.save_mask(file, [1, 4], num_sites=12, kind="mha")
    says(check(file, PricedPlay(), k=2), False, "12")
    says(check(4, PricedPlay(), k=2), False, "wanted the path of a file, such as 'mask.json'; got 4")


# -- 07 ------------------------------------------------------------------------------------------------------------


def test_rows_that_fold():
    arms = {"plain": {"parts": "base"}, "shared": {"parts": "exchange"}, "fixed": {}, "folded": {"parts": "frozen"}}
    rows = [{"row": name, "arm": {"method": "pia", "settings": settings}} for name, settings in arms.items()]
    table = {"rows": [*rows, {"row": "other", "arm": {"method": "lora"}}]}
    check = exercises.rows_that_fold
    says(check(["folded", "fixed"], table), True, "2 of 5 rows")
    says(check(["folded"], table), False, "those can be folded; 1 more can")
    says(check(["folded", "fixed", "shared"], table), False, "the adapter of 'shared' (exchange) changes with every")
    says(check(["fixed", "other"], table), False, "the adapter of 'other' (lora)")
    says(check(["base"], table), False, "there is no row 'base'; they are 'plain', 'shared', 'fixed'")
    says(check("fixed", table), False, "wanted a list of names, such as", "got 'fixed', a str")


def test_pairs_apart():
    losses = {"a": [0.1, 0.2], "b": [0.2, 0.3], "c": [0.21, 0.5], "d": [0.6, 0.7]}  # a < c, d; b, c < d; a = b at 0.2
    lines = [("7", row, seed, loss) for row, found in losses.items() for seed, loss in enumerate(found)]
    runs = pd.DataFrame([*lines, ("5", "e", 0, 9.0)], columns=["table", "row", "seed", "test_loss"])
    check = exercises.pairs_apart
    says(check(4, runs, "7"), True, "4 of 6 pairs")
    says(check(2, runs, "7"), False, "that many of the 6 pairs do overlap")
    says(check(8, runs, "7"), False, "each pair counts once")
    says(check(3, runs, "7"), False, "there are 6 pairs; 3 is too small")
    for missing in ("5", "1"):
        says(check(3, runs, missing), None, f"this needs runs of table {missing} with two seeds")
    says(check(3, pd.DataFrame(), "7"), None, "there are none")
