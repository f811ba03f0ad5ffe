"""The probe and the scorers, against models in which the answer is known and against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import toys

import eas_kit as eas
from eas_kit import scorers
from eas_kit.errors import ConfigError
from eas_kit.probe import ProbeReport, probe_redundancy, random_masks, score_without, single_site_sweep
from eas_kit.slots import skipping

QUIET = {"progress": False, "batch_size": 13}


def planted():
    """A random LLaVA in which attention 1 and 3 and FFN 2 add nothing: skipping them changes nothing at all."""
    model = toys.make_llava()
    layers = model.model.language_model.layers
    for number in (1, 3):
        layers[number].self_attn.o_proj.weight.data.zero_()
    layers[2].mlp.down_proj.weight.data.zero_()
    return model


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# -- the probe -----------------------------------------------------------------------------------------------------


def test_sweep_finds_the_planted_sites(toy_task):
    frame = single_site_sweep(planted(), toy_task, **QUIET)
    free = {(row.kind, row.site) for row in frame.itertuples() if row.loss_change == 0}
    assert free == {("mha", 1), ("mha", 3), ("ffn", 2)}
    assert frame[["kind", "site"]].values.tolist() == [[k, s] for k in ("mha", "ffn") for s in range(5)]


def test_probe_equals_skipping_by_hand_and_restores_the_model(toy_task):
    model = planted()
    before, modules = weights(model), list(model.modules())
    report = probe_redundancy(model, toy_task, ("mha", "ffn", "layer"), (1, 2), trials=3, seed=4, **QUIET)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    frame = report.frame
    assert len(frame) == 3 * 2 * 3
    assert list(frame.columns) == ["kind", "k", "trial", "mask", "loss", "accuracy"]
    for row in frame.itertuples():
        mha = row.mask if row.kind in ("mha", "layer") else ()
        ffn = row.mask if row.kind in ("ffn", "layer") else ()
        with skipping(model, mha=mha, ffn=ffn):
            expected = toy_task.score(model, "val", batch_size=13)
        assert (row.loss, row.accuracy) == (expected["loss"], expected["accuracy"])
    assert report.dense["loss"] == toy_task.score(model, "val", batch_size=13)["loss"]
    assert report.runs_per_second > 0
    assert report.metadata["split"] == "val"
    assert report.metadata["count"] == 24
    assert report.metadata["seed"] == 4


def test_all_kinds_get_the_same_random_masks(toy_task):
    report = eas.probe_redundancy(planted(), toy_task, num_skipped=(1, 2), trials=4, limit=5, **QUIET)
    masks = {kind: part["mask"].tolist() for kind, part in report.frame.groupby("kind")}
    assert masks["mha"] == masks["ffn"]
    assert len(set(masks["mha"])) == 8  # all trials differ
    other = eas.probe_redundancy(planted(), toy_task, num_skipped=(1, 2), trials=4, limit=5, seed=1, **QUIET)
    assert other.frame["mask"].tolist() != report.frame["mask"].tolist()
    again = eas.probe_redundancy(planted(), toy_task, num_skipped=(2,), trials=4, limit=5, **QUIET)
    assert set(again.frame["mask"]) < set(masks["mha"])  # a k's masks do not depend on the other k's


def test_random_masks():
    assert [mask for _, _, mask in random_masks(5, [1], trials=99, seed=0)] == [(i,) for i in range(5)]
    assert [mask for _, _, mask in random_masks(4, [2], 6, 0)] == list(itertools.combinations(range(4), 2))
    assert [(k, trial) for k, trial, _ in random_masks(12, [2, 4], 3, 0)] == [(k, t) for k in (2, 4) for t in range(3)]


def test_summary_is_mean_and_spread(toy_task):
    report = probe_redundancy(planted(), toy_task, ("mha",), (2,), trials=4, **QUIET)
    losses = report.frame["loss"].to_numpy()
    row = report.summary.iloc[0]
    assert (row["kind"], row["k"], row["trials"]) == ("mha", 2, 4)
    assert row["loss"] == pytest.approx(np.mean(losses))
    assert row["loss_sd"] == pytest.approx(np.std(losses, ddof=1))
    assert row["loss_change"] == pytest.approx(np.mean(losses) - report.dense["loss"])


def test_progress_is_told_and_reports_are_saved(toy_task, tmp_path):
    rows = []
    report = probe_redundancy(planted(), toy_task, num_skipped=(1,), trials=2, limit=4, callback=rows.append, **QUIET)
    assert len(rows) == 4
    report.save(tmp_path / "probe.json")
    loaded = ProbeReport.load(tmp_path / "probe.json")
    pd.testing.assert_frame_equal(loaded.frame, report.frame)
    assert loaded.dense == report.dense
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(ConfigError, match="is not a probe report"):
        ProbeReport.load(tmp_path / "other.json")


def test_probe_refuses(toy_task):
    model = planted()
    with pytest.raises(ConfigError, match=r"kinds: wanted some of .*'layer'.*got 'mlp'"):
        probe_redundancy(model, toy_task, ("mlp",))
    with pytest.raises(ConfigError, match=r"num_skipped: wanted numbers from 1 to 4, got 5"):
        probe_redundancy(model, toy_task, num_skipped=(1, 5))
    with pytest.raises(ConfigError, match=r"kind: wanted one of .*got 'mlp'"):
        score_without(model, toy_task, "mlp", (1,))


# -- the scorers ---------------------------------------------------------------------------------------------------


def streams_by_hand(model, batch):
    """The residual stream before, between and after the parts of each layer, written out in float64."""
    stack = model.model
    ids = batch["input_ids"]
    x = stack.embed_tokens(ids)
    place = torch.arange(ids.shape[1])[None]
    cos_sin = stack.rotary_emb(x, place)
    hidden = torch.full((ids.shape[1], ids.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
    padding = torch.where(batch["attention_mask"].bool(), 0.0, float("-inf")).to(x.dtype)
    found = []
    for layer in stack.layers:
        mask = (hidden[None] + padding[:, None])[:, None]
        between = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=cos_sin, attention_mask=mask)[0]
        after = between + layer.mlp(layer.post_attention_layernorm(between))
        found.append((x, between, after))
        x = after
    return found


@torch.no_grad()
def cosines_by_hand(model, task, which):
    total, count = np.zeros(2), 0
    for example in task.search:  # one by one: no padding at all
        batch = task.collate([example])
        for layer, triple in enumerate(streams_by_hand(model, batch)):
            x, y = triple[which[0]][0].numpy(), triple[which[1]][0].numpy()
            for position in range(len(x)):
                a, b = x[position], y[position]
                total[layer] += 1 - a @ b / np.sqrt((a @ a) * (b @ b))
        count += batch["input_ids"].shape[1]
    return total / count


@pytest.mark.parametrize(("kind", "which"), [("mha", (0, 1)), ("ffn", (1, 2)), ("layer", (0, 2))])
def test_cosine_on_a_two_layer_model_by_brute_force(kind, which):
    task = toys.ToyTask(images=False)
    model = toys.make_llama(num_hidden_layers=2, attn_implementation="eager").double()
    model.train()
    scores = scorers.cosine_similarity(model, task, kind, batch_size=7)
    assert model.training  # as it was
    model.eval()
    np.testing.assert_allclose(scores.numpy(), cosines_by_hand(model, task, which), rtol=1e-9)
    assert scores.dtype == torch.float64
    if kind == "layer":
        for any_kind in ("mha", "ffn"):
            influence = scorers.block_influence(model, task, any_kind, batch_size=5)
            torch.testing.assert_close(influence, scores, rtol=1e-12, atol=0)


def test_single_ablation_on_a_two_layer_model_by_brute_force():
    task = toys.ToyTask(images=False)
    model = toys.make_llama(num_hidden_layers=2)
    dense = task.score(model, "search")["loss"]
    for kind, part, weight in (("mha", "self_attn", "o_proj"), ("ffn", "mlp", "down_proj")):
        expected = []
        for number in range(2):
            zeroed = toys.make_llama(num_hidden_layers=2)
            getattr(getattr(zeroed.model.layers[number], part), weight).weight.data.zero_()
            expected.append(task.score(zeroed, "search")["loss"] - dense)
        scores = scorers.single_ablation(model, task, kind)
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)
        assert np.abs(expected).min() > 1e-3


def test_planted_sites_score_lowest(toy_task):
    model = planted()
    for scorer in (scorers.cosine_similarity, scorers.single_ablation):
        assert scorer(model, toy_task, "mha")[[1, 3]].abs().max() < 1e-7  # these add nothing
        assert scorer(model, toy_task, "ffn")[2].abs() < 1e-7
    assert set(eas.bandit.lowest(scorers.cosine_similarity(model, toy_task, "mha"), 2)) == {1, 3}
    assert scorers.block_influence(model, toy_task).min() > 1e-3  # no whole layer adds nothing


def test_random_scores_know_only_the_seed(toy_task):
    first, again = (scorers.random(planted(), toy_task, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, scorers.random(toys.make_llava(1), toy_task, "ffn", seed=3))
    assert not torch.equal(first, scorers.random(planted(), toy_task, seed=4))


def test_score_table(toy_task):
    table = scorers.score_table(planted(), toy_task, ("mha", "ffn"), limit=6)
    assert list(table.columns) == ["kind", "site", *scorers.SCORERS]
    assert len(table) == 10
    expected = scorers.single_ablation(planted(), toy_task, "ffn", limit=6)
    assert table[table["kind"] == "ffn"]["single_ablation"].tolist() == expected.tolist()
    with pytest.raises(ConfigError, match=r"kind: wanted one of .*got 'mlp'"):
        scorers.cosine_similarity(planted(), toy_task, "mlp")
