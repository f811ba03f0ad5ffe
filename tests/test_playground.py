"""What stands behind the panel: numbers and answers under a mask are the library's own; the model stays as it was."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import eas_kit as eas
from eas_kit import figures
from eas_kit.errors import ConfigError, TaskError
from eas_kit.measure import flops
from eas_kit.playground import Playground
from eas_kit.scorers import cosine_similarity
from eas_kit.slots import StandIn, skipping

COUNT, LAYERS = 6, 12


@pytest.fixture(scope="module")
def base():
    return eas.load_model("tiny", device="cpu")[0]


@pytest.fixture(scope="module")
def task():
    return eas.load_task("reading", eas.load_model("tiny", device="cpu")[1])


@pytest.fixture
def play(base, task):
    return Playground(base, task, task.val[:COUNT], batch_size=4, new_tokens=3, rounds=1)


def test_sites_are_numbered_kind_after_kind(play):
    assert play.site_kinds == ["mha"] * LAYERS + ["ffn"] * LAYERS
    assert (play.num_sites, len(play)) == (2 * LAYERS, COUNT)


def test_numbers_are_those_of_score_under_skipping(base, task, play):
    found = play.evaluate((3, LAYERS + 5))
    with skipping(base, mha=[3], ffn=[5]):
        wanted = task.score(base, "val", limit=COUNT, batch_size=4)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["accuracy"] == wanted["accuracy"]
    assert found["count"] == COUNT
    dense = play.evaluate(())
    assert dense["loss"] == pytest.approx(task.score(base, "val", limit=COUNT)["loss"], rel=1e-5)
    assert dense["loss"] != pytest.approx(found["loss"], rel=1e-3)


def test_share_of_multiply_accumulates(base, task, play):
    inputs = task.collate([task.val[0]], answers=False)
    parts = flops(base, inputs)
    one_ffn, one_mha = parts["ffn"] / LAYERS, (parts["total"] - parts["ffn"]) / LAYERS
    assert play.flops_saved(()) == 0
    assert play.flops_saved((2, 7, LAYERS)) == pytest.approx((2 * one_mha + one_ffn) / parts["total"])


def test_times_are_taken_beside_the_dense_model(play):
    dense, masked = play.times(()), play.times((1,))
    assert dense["speedup"] == 1.0
    assert dense["ms_per_token"] == dense["dense_ms_per_token"] > 0
    assert masked["ms_per_token"] != masked["dense_ms_per_token"]
    assert masked["speedup"] == pytest.approx(masked["dense_ms_per_token"] / masked["ms_per_token"])  # of one round


def test_answers_are_the_models_own(base, task, play):
    said = [play.answer((), i) for i in range(COUNT)]
    assert [task.parse(text, e) for text, e in zip(said, task.val[:COUNT], strict=True)] == task.answers(
        base, task.val[:COUNT]
    )
    for i in range(COUNT):
        assert play.right(i, task.val[i].answer)
        assert not play.right(i, "something else entirely")
        assert play.question(i) == task.question_text(task.val[i])
        assert play.wanted(i) == task.val[i].answer
    ruined = [play.answer((LAYERS,), i) for i in range(COUNT)]  # the first feed-forward: nothing is right without it
    assert ruined != said


def test_pictures_are_the_examples(task, play):
    picture = Image.open(io.BytesIO(play.image(0)))
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(task.val[0].images[0].convert("RGB")))
    words = next(e for e in task.val[:60] if not len(e.images))
    assert Playground(play.model, task, [words]).image(0) == b""


def test_without_any_attention_it_still_answers(play):
    everything = tuple(range(LAYERS))
    assert play.evaluate(everything)["loss"] > 0
    assert isinstance(play.answer(everything, 0), str)


def test_the_model_is_as_before_also_after_an_error(base, play):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    play.evaluate((0, LAYERS + 1))
    with pytest.raises(RuntimeError, match="on purpose"), play.skipped((0,)):
        raise RuntimeError("on purpose")
    assert not [module for module in base.modules() if isinstance(module, StandIn)]
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_it_stops_between_batches(play):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 3

    assert play.evaluate((1,), stop=stop) is None
    assert play.evaluate((1,), stop=lambda: True) is None
    assert play.evaluate((1,), stop=lambda: False)["count"] == COUNT


def test_threads_take_turns(base, task, play):
    masks = [(), (1,), (LAYERS,), (2, LAYERS + 3)]
    alone = {mask: Playground(base, task, play.examples, batch_size=4).evaluate(mask)["loss"] for mask in masks}
    found = {}  # by a playground that has collated nothing yet
    threads = [
        threading.Thread(target=lambda mask=mask: found.update({mask: play.evaluate(mask)["loss"]})) for mask in masks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == alone
    assert [len(opened) for opened, _ in play._batches] == [4, 2]


def test_rankings_by_scorers(base, task, play):
    found = play.rank(("cosine_similarity", "random"), limit=3, seed=5)
    parts = [cosine_similarity(base, task, kind=kind, limit=3, seed=5).numpy() for kind in ("mha", "ffn")]
    np.testing.assert_array_equal(found["cosine_similarity"], np.concatenate(parts))
    assert len(set(found["random"])) == play.num_sites
    with pytest.raises(ConfigError, match="unknown scorer: cosine; there are cosine_similarity, block_influence"):
        play.rank(("cosine",))


def test_preferences_of_a_search_go_to_their_places(play):
    placed = play.place(range(LAYERS), ("ffn",))
    np.testing.assert_array_equal(placed, [np.nan] * LAYERS + list(range(LAYERS)))
    with pytest.raises(ConfigError, match="5 preferences of mha sites; this model has 12 of them"):
        play.place(range(5))


def test_masks_side_by_side(play):
    table = play.compare({"nothing": (), "first": [LAYERS]})
    assert table["name"].tolist() == ["nothing", "first"]
    assert table["mask"].tolist() == [(), (LAYERS,)]
    assert table["loss"].tolist() == [play.evaluate(())["loss"], play.evaluate((LAYERS,))["loss"]]
    assert {"accuracy", "flops_saved", "ms_per_token", "speedup"} <= set(table)


def test_what_does_not_fit_is_refused(base, task, play):
    with pytest.raises(ConfigError, match="sites are numbered 0 to 23"):
        play.evaluate((24,))
    with pytest.raises(TaskError, match="at least one example"):
        Playground(base, task, [])


def test_adapters_are_under_the_mask_of_their_model(base, task):
    net = eas.attach(base, eas.EASConfig(skip_rank=4, adapt_rank=0, dropout=0.0))
    try:
        net.mask = (1,)
        net.mask_origin = {"made_by": "search", "seed": 3}
        play = Playground(net, task, task.val[:COUNT], new_tokens=3, rounds=1)
        assert play.site_kinds == ["mha"] * LAYERS
        found = play.evaluate((4, 6))
        assert (net.mask, net.mask_origin) == ((1,), {"made_by": "search", "seed": 3})
        net.mask = (4, 6)
        assert found["loss"] == pytest.approx(task.score(net, "val", limit=COUNT)["loss"], rel=1e-5)
        assert 0 < found["flops_saved"] < play.flops_saved((2, 4, 6))
        assert play.flops_saved(()) == pytest.approx(0, abs=1e-9)
        assert play.answer((4, 6), 0) == play.answer([6, 4], 0)
        with pytest.raises(ConfigError, match="skips all 12 attentions"):
            play.evaluate(range(LAYERS))
    finally:
        eas.detach(net)


def test_a_gallery_can_show_what_it_says(play):
    said = [play.answer((), i) for i in range(2)]
    assert figures.gallery(play.examples[:2], predictions=said).data
