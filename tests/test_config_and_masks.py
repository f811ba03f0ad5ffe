"""Settings and mask files: checked when made, round trips, tolerant of newer files, errors that help."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from eas_kit import pia
from eas_kit.config import PARTS, EASConfig, SearchConfig
from eas_kit.errors import ConfigError, EASError
from eas_kit.masks import check_mask, load_mask, read_mask, save_mask


def test_the_parts_of_pia_are_those_that_it_knows():
    assert PARTS == pia.PARTS


def test_defaults_are_the_contract():
    assert EASConfig().to_dict() == {
        "skip_rank": 32,
        "adapt_rank": 16,
        "groups": 2,
        "scale": 1.0,
        "temperature": 10.0,
        "dropout": 0.1,
        "kinds": ("mha",),
        "modules_to_save": None,
        "source": "attention_norm",
        "adapter": "pia",
        "parts": "frozen",
        "pool": "prompt",
        "path_factor": 0.5,
    }


def test_settings_that_came_later_do_not_make_another_run_of_an_old_one():
    """Checkpoints and results are told apart by `identity`: at their defaults it is that of before."""
    old = {"skip_rank", "adapt_rank", "groups", "scale", "temperature", "dropout", "kinds", "source"}
    assert set(EASConfig().identity()) == old
    assert EASConfig(pool="sequence", modules_to_save=("a",)).identity() == EASConfig().identity() | {
        "pool": "sequence",
        "modules_to_save": ("a",),
    }
    assert "draws" not in SearchConfig().identity()
    assert SearchConfig(draws="multinomial").identity()["draws"] == "multinomial"
    assert "resume" not in SearchConfig().identity()
    with pytest.raises(ConfigError, match="SearchConfig.draws: wanted one of"):
        SearchConfig(draws="softmax")


def test_round_trip_through_a_file(tmp_path):
    config = EASConfig(skip_rank=6, adapt_rank=0, kinds=("ffn", "mha"), source="ffn_norm")
    config.save(tmp_path / "config.json")
    assert EASConfig.load(tmp_path / "config.json") == config


def test_unknown_keys_warn_and_are_dropped(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"skip_rank": 6, "from_the_future": 1}))
    with pytest.warns(UserWarning, match="ignoring unknown settings \\['from_the_future'\\]"):
        assert EASConfig.load(tmp_path / "config.json") == EASConfig(skip_rank=6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"skip_rank": 7}, "skip_rank: wanted a whole number from 1 up, divisible by groups=2, got 7"),
        ({"skip_rank": 0}, "skip_rank"),
        ({"skip_rank": True}, "skip_rank"),
        ({"adapt_rank": 3}, "adapt_rank: wanted 0 \\(no adapter at kept sites\\)"),
        ({"groups": 0}, "groups: wanted a whole number from 1 up"),
        ({"scale": float("inf")}, "scale: wanted a finite number"),
        ({"scale": "1"}, "scale"),
        ({"temperature": 0}, "temperature: wanted a number above 0"),
        ({"dropout": 1.0}, "dropout: wanted a number from 0 up to, not with, 1"),
        ({"kinds": ()}, "kinds: wanted one or more of"),
        ({"kinds": ("mha", "mha")}, "kinds"),
        ({"kinds": ("conv",)}, "kinds"),
        ({"source": "both"}, "source: wanted one of"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message) as caught:
        EASConfig(**wrong)
    assert isinstance(caught.value, EASError)
    assert isinstance(caught.value, ValueError)


def test_files_that_are_no_settings(tmp_path):
    with pytest.raises(ConfigError, match="EASConfig: no file"):
        EASConfig.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(ConfigError, match="is not JSON"):
        EASConfig.load(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="should hold one JSON object, it holds a list"):
        EASConfig.load(tmp_path / "list.json")


def test_masks_are_sorted_and_take_any_integers():
    assert check_mask([5, 2], 7) == (2, 5)
    assert check_mask((), 7) == ()
    assert check_mask(np.array([3, 1]), 7) == (1, 3)
    assert check_mask(torch.tensor([3, 1]), 7) == (1, 3)
    assert check_mask({4}, 7) == (4,)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([7], "sites are numbered 0 to 6, so there is no \\[7\\]"),
        ([-1], "there is no \\[-1\\]"),
        ([2, 2], "names a site twice"),
        ([True, False], "for a list of true and false, pass the positions"),
        ([0.5], "got 0.5"),
        (3, "for one site write \\[3\\]"),
        ("23", "a mask is a list of site numbers"),
    ],
)
def test_wrong_masks(mask, message):
    with pytest.raises(ConfigError, match=message):
        check_mask(mask, 7)


def test_mask_file_is_the_contract(tmp_path):
    path = tmp_path / "mask.json"
    save_mask(path, [5, 2], num_sites=12, model="tiny", made_by="search", seed=0)
    assert json.loads(path.read_text()) == {
        "format": 1,
        "kind": "mha",
        "num_sites": 12,
        "skipped": [2, 5],
        "model": "tiny",
        "made_by": "search",
        "seed": 0,
    }
    assert load_mask(path) == (2, 5)
    assert load_mask(path, num_sites=12) == (2, 5)
    assert read_mask(path)["made_by"] == "search"
    with pytest.raises(ConfigError, match="was made for 12 sites \\(tiny\\), this model has 5"):
        load_mask(path, num_sites=5)


def test_wrong_mask_files(tmp_path):
    path = tmp_path / "mask.json"
    with pytest.raises(ConfigError, match="mask: no file"):
        load_mask(path)
    path.write_text('{"format": 2, "num_sites": 3, "skipped": [1], "new": 5}')
    with pytest.warns(UserWarning, match="has format 2, this version of eas_kit knows format 1"):
        assert load_mask(path) == (1,)
    path.write_text('{"format": 1}')
    with pytest.raises(ConfigError, match="has no \\['num_sites', 'skipped'\\]"):
        load_mask(path)
    for wrong in ({"format": "1"}, {"num_sites": "three"}, {"skipped": None}, {"skipped": 1}):
        path.write_text(json.dumps({"format": 1, "num_sites": 3, "skipped": []} | wrong))
        with pytest.raises(ConfigError, match="wanted whole numbers for format and num_sites and a list for skipped"):
            load_mask(path)


def test_a_mask_is_read_in_the_numbering_of_the_sites_here(tmp_path):
    path, both = tmp_path / "mask.json", ["mha"] * 5 + ["ffn"] * 5
    save_mask(path, [1, 3], num_sites=5, kind="mha")
    assert load_mask(path, site_kinds=both) == (1, 3)
    assert load_mask(path, site_kinds=["ffn"] * 5 + ["mha"] * 5) == (6, 8)
    save_mask(path, [0, 4], num_sites=5, kind="ffn")
    assert load_mask(path, site_kinds=both) == (5, 9)
    save_mask(path, [2, 9], num_sites=10, kind="mha+ffn")
    assert load_mask(path, site_kinds=both) == (2, 9)
    with pytest.raises(ConfigError, match="skips site 9, a ffn; here only mha can be skipped"):
        load_mask(path, site_kinds=["mha"] * 5)
    save_mask(path, [2], num_sites=10, kind="mha+ffn")
    assert load_mask(path, site_kinds=["mha"] * 5) == (2,)


@pytest.mark.parametrize(("num_sites", "kind"), [(7, "mha"), (9, "mha+ffn"), (5, "layer")])
def test_a_mask_of_other_sites_is_refused(tmp_path, num_sites, kind):
    path = tmp_path / "mask.json"
    save_mask(path, [1], num_sites=num_sites, kind=kind, model="other")
    message = rf"was made for {num_sites} sites of {re.escape(kind)} \(other\), here are 5 mha, 5 ffn"
    with pytest.raises(ConfigError, match=message):
        load_mask(path, site_kinds=["mha"] * 5 + ["ffn"] * 5)
