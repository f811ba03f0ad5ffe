"""The bandit against hand-computed numbers, a planted answer, and controls."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

import eas_kit as eas
from eas_kit.bandit import Bandit, draw_masks, lowest, rewards, update_preferences
from eas_kit.errors import ConfigError, TrainingError

LN2, LN4 = math.log(2), math.log(4)


def test_update_from_zero_by_hand():
    # Rewards 1/2, 1/4, 1/4; mean 1/3; advantages 1/6, -1/12, -1/12; sigma (1 - sigma) = 1/4.
    # Site 0 is kept by h = 1, 2: -1/6. Site 1 by 0, 2: 1/12. Site 2 by 0, 1: 1/12. Site 3 by all: 0.
    new = update_preferences(torch.zeros(4, dtype=torch.float64), [[0], [1], [2]], [LN2, LN4, LN4], learning_rate=24.0)
    torch.testing.assert_close(new, torch.tensor([-1.0, 0.5, 0.5, 0.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_update_weighs_each_site_with_its_own_slope():
    # sigma(ln 3) = 3/4, slope 3/16; sigma(-ln 3) has the same slope; sigma(0): 1/4.
    s = torch.tensor([math.log(3), -math.log(3), 0.0], dtype=torch.float64)
    # Rewards 1/2, 1/4: advantages 1/8, -1/8. Site 0 kept by h = 1, site 1 by h = 0, site 2 by both.
    new = update_preferences(s, [[0], [1]], [LN2, LN4], learning_rate=16.0)
    expected = torch.tensor([math.log(3) - 3 / 8, -math.log(3) + 3 / 8, 0.0], dtype=torch.float64)
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-12)


def test_update_equals_the_formula_written_out():
    rng = np.random.default_rng(5)
    s, masks, losses = rng.normal(size=7), [(0, 3), (1, 3), (2, 6), (4, 5), (0, 6)], rng.uniform(0.1, 2, size=5)
    reward = [math.exp(-loss) for loss in losses]
    expected = s.copy()
    for h, mask in enumerate(masks):
        for i in set(range(7)) - set(mask):
            sigma = 1 / (1 + math.exp(-s[i]))
            expected[i] += 0.7 * (reward[h] - sum(reward) / 5) * sigma * (1 - sigma)
    np.testing.assert_allclose(update_preferences(s, masks, losses, 0.7), expected, rtol=0, atol=1e-14)
    order = [3, 0, 4, 2, 1]
    shuffled = update_preferences(s, [masks[h] for h in order], losses[order], 0.7)
    np.testing.assert_allclose(shuffled, expected, rtol=0, atol=1e-14)


def test_update_keeps_the_type_and_the_input():
    s = torch.zeros(3, dtype=torch.float32)
    new = update_preferences(s, [(0,), (1,)], torch.tensor([0.1, 0.9]), 1.0)
    assert new.dtype == torch.float32
    assert torch.equal(s, torch.zeros(3))
    assert not torch.equal(new, s)
    assert isinstance(update_preferences(np.zeros(3), [(0,), (1,)], [0.1, 0.9], 1.0), np.ndarray)
    as_list = update_preferences([0.0, 0.0, 0.0], [(0,), (1,)], [0.1, 0.9], 1.0)
    assert as_list.dtype == torch.float64
    boolean = torch.tensor([[True, False, False], [False, True, False]])
    assert torch.equal(update_preferences([0.0, 0.0, 0.0], boolean, [0.1, 0.9], 1.0), as_list)


@pytest.mark.parametrize("reward", ["exp", "standardized"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_losses_teach_nothing_at_all(reward, count):
    masks = [(h,) for h in range(count)]
    new = update_preferences(torch.zeros(11), masks, [0.1] * count, 100.0, reward)
    assert torch.equal(new, torch.zeros(11))


def test_rewards():
    np.testing.assert_allclose(rewards([0.0, LN2]), [1.0, 0.5])
    np.testing.assert_allclose(rewards([9.0, 8.0, 7.0], "standardized"), [-math.sqrt(1.5), 0.0, math.sqrt(1.5)])
    # The level of the loss: exp sees almost nothing at 8, the standardised reward the same as at 0.
    np.testing.assert_allclose(
        rewards([8.0, 8.1, 8.4], "standardized"), rewards([0.0, 0.1, 0.4], "standardized"), atol=1e-9
    )
    assert np.ptp(rewards([8.0, 8.1, 8.4])) < 2e-4
    with pytest.raises(ConfigError, match="reward must be one of exp, standardized; got 'log'"):
        rewards([1.0], "log")
    with pytest.raises(TrainingError, match="must be finite; got"):
        rewards([1.0, float("nan")])


def test_errors_name_what_came():
    with pytest.raises(ConfigError, match="2 masks and 3 losses"):
        update_preferences([0.0] * 4, [(0,), (1,)], [1.0, 2.0, 3.0], 1.0)
    with pytest.raises(ConfigError, match=r"from 0 to 3; got \[4\]"):
        update_preferences([0.0] * 4, [(0,), (4,)], [1.0, 2.0], 1.0)
    with pytest.raises(ConfigError, match="from 0 to 3"):
        update_preferences([0.0] * 4, [(0, 0), (1,)], [1.0, 2.0], 1.0)
    with pytest.raises(ConfigError, match=r"must be \(H, 4\)"):
        update_preferences([0.0] * 4, torch.zeros(2, 3, dtype=torch.bool), [1.0, 2.0], 1.0)
    with pytest.raises(ConfigError, match=r"as lists, name the skipped sites"):
        update_preferences([0.0] * 2, [[True, False], [False, True]], [1.0, 2.0], 1.0)
    with pytest.raises(ConfigError, match=r"preferences must be \(L,\)"):
        update_preferences(torch.zeros(2, 2), [(0,)], [1.0], 1.0)
    with pytest.raises(ConfigError, match="num_skipped must be between 1 and 4.*5 candidate sites; got 5"):
        Bandit(5, 5)
    with pytest.raises(ConfigError, match="nothing to compare with 1"):
        Bandit(5, 2, num_subnetworks=1)
    with pytest.raises(ConfigError, match=r"between 0 and 4; got \[2, 5\]"):
        Bandit(5, 1, candidates=[2, 5])
    with pytest.raises(ConfigError, match="k must be between 0 and the 3"):
        lowest([1.0, 2.0, 3.0], 4)
    with pytest.raises(ConfigError, match="has 5 sites, the saved one has 6"):
        Bandit(5, 2).load_state_dict(Bandit(6, 2).state_dict())


def test_lowest():
    assert lowest([0.3, -1.0, 0.2, -2.0], 2) == (1, 3)
    assert lowest(torch.zeros(5), 2) == (0, 1)  # equal scores: the lower site
    assert lowest([0.0, 5.0, 1.0, 2.0], 2, candidates=[1, 2, 3]) == (2, 3)


def test_masks_are_distinct_even_when_one_is_nearly_certain():
    s = torch.full((13,), 40.0)
    s[[2, 7]] = -40.0
    masks = draw_masks(s, 2, 3, np.random.default_rng(0))
    assert masks[0] == (2, 7)
    assert len(set(masks)) == 3
    assert all(len(mask) == 2 and list(mask) == sorted(mask) for mask in masks)


def test_fewer_masks_than_asked_for():
    assert draw_masks([0.0] * 3, 2, 5, np.random.default_rng(0)) == list(itertools.combinations(range(3), 2))
    bandit = Bandit(3, 2, num_subnetworks=5)
    assert len(bandit.update(lambda mask: float(mask[0]))["masks"]) == 3


def test_draws_follow_eq_14():
    # Two sites, one skipped. With s = 0 and ln 3, sigma = 1/2 and 3/4: P(pi_0 < pi_1) = 1 - (1/2) / (2 * 3/4) = 2/3.
    rng, s = np.random.default_rng(1), [0.0, math.log(3)]
    share = np.mean([draw_masks(s, 1, 1, rng)[0] == (0,) for _ in range(4000)])
    assert abs(share - 2 / 3) < 0.025  # three standard deviations


def test_multinomial_draws_are_weighted_and_without_replacement():
    # sigma(-s) = 1/2, 1/4, 1/4. First 0, then 1: 1/2 * 1/2; first 1, then 0: 1/4 * 2/3; together {0, 1}: 5/12, the
    # same for {0, 2}, and {1, 2}: 2 * 1/4 * 1/3 = 1/6. By eq. 14 it would be otherwise.
    s, rng = [0.0, math.log(3), math.log(3)], np.random.default_rng(2)
    seen = [draw_masks(s, 2, 1, rng, draws="multinomial")[0] for _ in range(6000)]
    for mask, share in (((0, 1), 5 / 12), ((0, 2), 5 / 12), ((1, 2), 1 / 6)):
        assert abs(seen.count(mask) / 6000 - share) < 0.02  # three standard deviations
    # by eq. 14 {1, 2} is left where pi_0 is the largest: E[(pi_0 / 0.75)^2] with pi_0 ~ U(0, 0.5) is 4 / 27
    uniform = [draw_masks(s, 2, 1, rng)[0] for _ in range(6000)]
    assert abs(uniform.count((1, 2)) / 6000 - 4 / 27) < 0.014
    bandit = Bandit(7, 2, candidates=[1, 3, 4, 6], seed=2, draws="multinomial")
    bandit.preferences += torch.tensor([0.0, 400.0, 0.0, -400.0, 0.0, 0.0, 900.0])  # weights of 0 and 1
    masks = bandit.draw(3)
    assert len(set(masks)) == 3
    assert set().union(*masks) <= {1, 3, 4, 6}
    with pytest.raises(ConfigError, match="draws must be one of uniform, multinomial; got 'softmax'"):
        Bandit(7, 2, draws="softmax")
    with pytest.raises(ConfigError, match="draws must be one of"):
        draw_masks(s, 2, 1, rng, draws="softmax")


def test_raising_what_was_kept_is_lowering_what_was_skipped():
    """Advantages sum to zero, so a preference for keeping a site and one for skipping it are each other's negative."""
    rng = np.random.default_rng(5)
    s, losses = rng.normal(size=7), rng.uniform(0.1, 2, size=4)
    masks = [tuple(sorted(rng.choice(7, size=3, replace=False))) for _ in losses]
    advantage = np.exp(-losses) - np.exp(-losses).mean()
    to_skip = -s
    for h, mask in enumerate(masks):
        for i in mask:
            sigma = 1 / (1 + math.exp(s[i]))
            to_skip[i] += 0.7 * advantage[h] * sigma * (1 - sigma)
    np.testing.assert_allclose(update_preferences(s, masks, losses, 0.7), -to_skip, rtol=0, atol=1e-14)


def test_random_masks_are_uniform_and_within_the_candidates():
    bandit = Bandit(7, 2, candidates=[1, 3, 4, 6], seed=2)
    seen = [bandit.random_mask() for _ in range(1200)]
    counts = {mask: seen.count(mask) for mask in set(seen)}
    assert set(counts) == set(itertools.combinations([1, 3, 4, 6], 2))
    assert max(abs(count - 200) for count in counts.values()) < 50


@pytest.mark.parametrize(("reward", "learning_rate"), [("exp", 2.0), ("standardized", 0.3)])
def test_planted_answer_is_found(reward, learning_rate):
    harm = np.zeros(12)
    harm[[0, 1, 5, 8]] = [2.0, 0.8, 0.5, 0.4]  # these cost when skipped, the others are free
    noise = np.random.default_rng(0)
    for seed in range(3):
        bandit = Bandit(12, 4, learning_rate=learning_rate, reward=reward, seed=seed)
        for _ in range(120):
            shared = noise.normal(0.3, 0.05)  # a batch is easy or hard for all subnetworks alike
            bandit.update(lambda mask, shared=shared: shared + harm[list(mask)].sum() + noise.normal(0, 0.02))
        assert not set(bandit.skipped) & {0, 1, 5, 8}


def test_control_constant_losses_learn_nothing():
    bandit = Bandit(12, 4, learning_rate=50.0, seed=3)
    for _ in range(30):
        bandit.update(lambda mask: 0.7)
    assert torch.equal(bandit.preferences, torch.zeros(12, dtype=torch.float64))


def test_only_candidates_move():
    bandit = Bandit(10, 2, learning_rate=3.0, candidates=range(5, 10), seed=1)
    for _ in range(20):
        bandit.update(lambda mask: 0.1 * sum(mask))
    assert torch.equal(bandit.preferences[:5], torch.zeros(5, dtype=torch.float64))
    assert bandit.preferences[5:].abs().min() > 0
    assert bandit.skipped == (5, 6)
    assert bandit.counts[:5].sum() == 0


def test_counts_and_history():
    bandit = Bandit(6, 2, seed=4)
    for _ in range(5):
        bandit.update(lambda mask: 1.0 / (1 + mask[0]))
    assert [record["update"] for record in bandit.history] == [1, 2, 3, 4, 5]
    assert bandit.counts.sum() == 5 * 3 * 2
    assert bandit.history[-1]["counts"] == bandit.counts.tolist()
    assert bandit.history[-1]["preferences"] == bandit.preferences.tolist()
    assert set(bandit.history[0]) == {"update", "preferences", "masks", "losses", "rewards", "counts", "skipped"}


def test_same_seed_same_search_and_resuming_is_exact():
    def loss(mask):
        return 0.1 * mask[0] + 0.01 * mask[1]

    def run(bandit, updates):
        for _ in range(updates):
            bandit.random_mask()
            bandit.update(loss)
        return bandit

    whole = run(Bandit(9, 3, seed=11), 8)
    assert run(Bandit(9, 3, seed=11), 8).history == whole.history
    assert run(Bandit(9, 3, seed=12), 8).history != whole.history
    half = run(Bandit(9, 3, seed=11), 4)
    state = json.loads(json.dumps(half.state_dict()))
    resumed = Bandit(9, 3, seed=99)
    resumed.load_state_dict(state)
    run(resumed, 4)
    assert resumed.history == whole.history
    assert torch.equal(resumed.preferences, whole.preferences)


def test_public_name():
    assert eas.update_preferences is update_preferences
