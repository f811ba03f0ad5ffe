"""On disk: adapters alone, the mask with them, all or nothing; and the base model saved whole while adapters are on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prompt import make_net
from toys import make_llama, make_llava, snapshot, stir
from transformers import LlavaForConditionalGeneration

import eas_kit.saving
from eas_kit.config import EASConfig
from eas_kit.errors import ConfigError
from eas_kit.model import attach, detach, load


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestAdapters:
    def test_round_trip(self, make_batch, make_prompts, tmp_path):
        net, batch = make_net((1, 3), source="ffn_norm", temperature=3.0), make_batch()
        with torch.no_grad():
            expected = net(**batch).logits
        folder = tmp_path / "a" / "net"
        net.save_pretrained(folder)
        assert sorted(path.name for path in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "mask.json",
        ]
        assert [path.name for path in folder.parent.iterdir()] == ["net"]  # nothing temporary is left
        again = load(folder, base=make_llava())
        assert again.mask == (1, 3)
        assert again.config == net.config
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, expected)
        assert not again.training

    def test_files_say_what_they_are_for(self, tmp_path):
        model = make_llava()
        model.name_or_path = "someone/some-llava"
        net = make_net((1, 3), model=model)
        net.save_pretrained(tmp_path)
        about = json.loads((tmp_path / "adapter_config.json").read_text())
        assert about | EASConfig(skip_rank=6, adapt_rank=4).to_dict() | {"kinds": ["mha"]} == about
        assert about["peft_type"] == "EAS"
        assert about["base_model_name_or_path"] == "someone/some-llava"
        assert about["base_model_class"] == "LlavaForConditionalGeneration"
        assert (about["num_sites"], about["hidden_size"], about["format"]) == (5, 38, 1)
        mask = json.loads((tmp_path / "mask.json").read_text())
        assert (mask["skipped"], mask["num_sites"], mask["kind"]) == ([1, 3], 5, "mha")
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert sorted(tensors) == sorted(net.adapters.state_dict())

    def test_base_is_found_by_its_name(self, tmp_path, monkeypatch, make_batch):
        import eas_kit.models

        asked = []

        def load_model(name, **kwargs):
            asked.append((name, kwargs))
            return make_llava(), None

        monkeypatch.setattr(eas_kit.models, "load_model", load_model)
        model, batch = make_llava(), make_batch()
        model.name_or_path = "tiny"
        net = make_net((1, 3), model=model)
        net.save_pretrained(tmp_path / "net")
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "net", dtype="float32")(**batch).logits, net(**batch).logits)
        assert asked == [("tiny", {"dtype": "float32"})]

    def test_saving_again_replaces_and_keeps_other_files(self, tmp_path):
        net = make_net((1, 3))
        net.save_pretrained(tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        net.mask = (0,)
        net.save_pretrained(tmp_path)
        assert load(tmp_path, base=make_llava()).mask == (0,)
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_crash_leaves_the_old_files(self, tmp_path, monkeypatch):
        net = make_net((1, 3))
        net.save_pretrained(tmp_path / "net")
        old = {path.name: path.read_bytes() for path in (tmp_path / "net").iterdir()}
        stir(net.adapters, seed=7)

        def fails(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(eas_kit.saving, "save_file", fails)
        with pytest.raises(OSError, match="disk full"):
            net.save_pretrained(tmp_path / "net")
        assert {path.name: path.read_bytes() for path in (tmp_path / "net").iterdir()} == old
        assert [path.name for path in tmp_path.iterdir()] == ["net"]

    @pytest.mark.parametrize("failing", [1, 2])
    def test_a_rename_that_fails_leaves_the_old_files(self, tmp_path, monkeypatch, failing):
        net, folder = make_net((1, 3)), tmp_path / "net"
        net.save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
        old = {path.name: path.read_bytes() for path in folder.iterdir()}
        net.mask = [0]
        rename, calls = Path.rename, []

        def fails(self, target):
            calls.append(self)
            if len(calls) == failing:
                raise OSError("busy")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="busy"):
            net.save_pretrained(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
        assert [path.name for path in tmp_path.iterdir()] == ["net"]

    def test_missing_files(self, tmp_path):
        with pytest.raises(ConfigError, match="has no adapter_config.json, adapter_model.safetensors, mask.json"):
            load(tmp_path / "nowhere", base=make_llava())
        make_net().save_pretrained(tmp_path / "net")
        (tmp_path / "net" / "mask.json").unlink()
        with pytest.raises(ConfigError, match=r"has no mask.json; wanted a folder of net.save_pretrained"):
            load(tmp_path / "net", base=make_llava())

    def test_a_base_that_does_not_fit_comes_back_untouched(self, tmp_path):
        make_net().save_pretrained(tmp_path)
        for changes, message in (
            ({"num_hidden_layers": 3}, "with num_sites 5, this base model has 3"),
            ({"hidden_size": 44}, "with hidden_size 38, this base model has 44"),
        ):
            other = make_llama(**changes)
            before = snapshot(other)
            with pytest.raises(ConfigError, match=message):
                load(tmp_path, base=other)
            assert snapshot(other) == before

    def test_weights_that_do_not_fit_their_config(self, tmp_path):
        net = make_net()
        net.save_pretrained(tmp_path)
        weights = tmp_path / "adapter_model.safetensors"
        tensors = net.adapters.state_dict()
        tensors.pop("0.skip.router.bias")
        save_file(tensors, weights)
        with pytest.raises(ConfigError, match="does not fit its adapter_config.json"):
            load(tmp_path, base=make_llava())
        weights.write_bytes(b"broken")
        with pytest.raises(ConfigError, match="does not fit its adapter_config.json"):
            load(tmp_path, base=make_llava())

    def test_other_adapters_and_newer_formats(self, tmp_path):
        make_net().save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        edit(path, peft_type="LORA")
        with pytest.raises(ConfigError, match="peft_type 'LORA'.*load other adapters with peft"):
            load(tmp_path, base=make_llava())
        edit(path, peft_type="EAS", format=2)
        with pytest.raises(ConfigError, match="newer ones with a newer eas_kit"):
            load(tmp_path, base=make_llava())
        edit(path, format=1, from_the_future=3)
        with pytest.warns(UserWarning, match="from_the_future"):
            load(tmp_path, base=make_llava())

    def test_no_name_and_a_file_in_the_way(self, tmp_path):
        net = make_net()
        net.save_pretrained(tmp_path / "net")
        with pytest.raises(ConfigError, match="does not name its base model; pass it as"):
            load(tmp_path / "net")
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="wanted a folder, .*file is a file"):
            net.save_pretrained(tmp_path / "file")


class TestBase:
    def test_base_is_saved_whole_while_attached(self, make_batch, tmp_path):
        model, batch = make_llava(), make_batch()
        with torch.no_grad():
            expected = model(**batch).logits
        net = make_net((0, 2, 6), model=model, kinds=("mha", "ffn"))
        net.base.save_pretrained(tmp_path)
        again, report = LlavaForConditionalGeneration.from_pretrained(
            tmp_path, output_loading_info=True, attn_implementation="eager"
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        with torch.no_grad():
            assert torch.equal(again.eval()(**batch).logits, expected)

    def test_state_dict_of_the_base_does_not_change(self):
        model = make_llava()
        before = snapshot(model)["values"]
        net = make_net((0, 2), model=model)
        assert snapshot(net.base)["values"] == before
        assert sum(p.numel() for p in net.base.parameters()) == sum(p.numel() for p in make_llava().parameters())

    def test_weights_can_be_loaded_while_attached(self, make_batch):
        net, batch = make_net((0, 2)), make_batch()
        net.base.load_state_dict(make_llava(seed=3).state_dict())
        other = attach(make_llava(seed=3), net.config)
        other.adapters.load_state_dict(net.adapters.state_dict())
        other.mask = (0, 2)
        with torch.no_grad():
            assert torch.equal(net(**batch).logits, other(**batch).logits)
            net.mask = other.mask = ()
            assert torch.equal(net(**batch).logits, other(**batch).logits)
        detach(net)
