"""On disk: adapters alone, the mask with them, all or nothing; and the base model saved whole while adapters are on."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_prompt import make_net
from toys import Bits, make_llama, make_llava, snapshot, stir
from transformers import LlavaForConditionalGeneration

import eas_kit.models
import eas_kit.saving
from eas_kit.config import EASConfig
from eas_kit.errors import ConfigError
from eas_kit.model import attach, detach, load
from eas_kit.models import load_model


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
            "README.md",
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
        assert set(about) == set(eas_kit.saving.ABOUT) | set(net.config.to_dict())

    def test_base_is_found_by_its_name(self, tmp_path, monkeypatch, make_batch):
        import eas_kit.models

        asked = []

        def load_base(name, **kwargs):
            asked.append((name, kwargs))
            return make_llava()

        monkeypatch.setattr(eas_kit.models, "load_base", load_base)
        model, batch = make_llava(), make_batch()
        model.name_or_path = "tiny"
        net = make_net((1, 3), model=model)
        net.save_pretrained(tmp_path / "net")
        with torch.no_grad():
            for kwargs in ({"dtype": "float32"}, {}):  # the dtype of the base is noted in the folder
                assert torch.equal(load(tmp_path / "net", **kwargs)(**batch).logits, net(**batch).logits)
        assert asked == [("tiny", {"dtype": "float32"})] * 2

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
        with pytest.raises(ConfigError, match="there is no such folder: .*nowhere"):
            load(tmp_path / "nowhere", base=make_llava())
        with pytest.raises(ConfigError, match="has no adapter_config.json, adapter_model.safetensors, mask.json"):
            load(tmp_path, base=make_llava())
        make_llava().config.save_pretrained(tmp_path / "model")
        with pytest.raises(ConfigError, match="model holds a model and has no .*for a model: eas_kit.load_model"):
            load(tmp_path / "model")
        make_net().save_pretrained(tmp_path / "net")
        (tmp_path / "net" / "mask.json").unlink()
        with pytest.raises(ConfigError, match=r"has no mask.json; wanted a folder of net.save_pretrained"):
            load(tmp_path / "net", base=make_llava())

    def test_a_base_that_does_not_fit_comes_back_untouched(self, tmp_path):
        make_net().save_pretrained(tmp_path)
        for other, message in (
            (make_llava(num_hidden_layers=3), "with num_sites 5, this base model has 3"),
            (make_llava(hidden_size=44), "with hidden_size 38, this base model has 44"),
            (make_llama(), "says LlavaForConditionalGeneration, this base model is LlamaForCausalLM; pass the base"),
        ):
            before = snapshot(other)
            with pytest.raises(ConfigError, match=message):
                load(tmp_path, base=other)
            assert snapshot(other) == before
        edit(tmp_path / "adapter_config.json", base_model_class="LlamaForCausalLM")  # the way out, if it is meant
        assert load(tmp_path, base=make_llama()).mask == (0, 2)

    def test_the_class_under_fully_sharded_data_parallel(self, tmp_path):
        model = make_llava()
        model.__class__ = type("FSDPLlavaForConditionalGeneration", (type(model),), {})  # as fully_shard does
        make_net(model=model).save_pretrained(tmp_path)
        assert load(tmp_path, base=make_llava()).mask == (0, 2)

    def test_adapters_come_back_in_their_own_type(self, make_batch, tmp_path):
        batch = make_batch()
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            net = make_net((1, 3))
            net.adapters.to(dtype)
            net.save_pretrained(tmp_path)
            again = load(tmp_path, base=make_llava())
            assert {p.dtype for p in again.adapters.parameters()} == {dtype}
            with torch.no_grad():
                assert torch.equal(again(**batch).logits, net(**batch).logits)

    def test_adapters_do_not_live_in_the_file(self, tmp_path):
        make_net().save_pretrained(tmp_path)
        again = load(tmp_path, base=make_llava())
        values = {name: value.clone() for name, value in again.adapters.state_dict().items()}
        with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
            size = file.seek(0, 2)
            file.seek(size // 2)
            file.write(b"\0" * (size - size // 2))
        assert Bits(dict(again.adapters.state_dict())) == Bits(values)

    def test_a_base_of_another_revision_warns(self, tmp_path):
        model = make_llava()
        model.name_or_path, model.eas_kit_source = "someone/llava", {"revision": "a" * 40}
        make_net(model=model).save_pretrained(tmp_path)
        other = make_llava()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(tmp_path, base=other).detach()  # nobody knows
            other.eas_kit_source = {"revision": "a" * 40}
            load(tmp_path, base=other).detach()
        other.eas_kit_source = {"revision": "b" * 40}
        with pytest.warns(
            UserWarning, match=f"revision {'a' * 40} of someone/llava, this base model is rev.* {'b' * 40}"
        ):
            load(tmp_path, base=other)

    def test_base_and_how_to_load_one(self, tmp_path):
        make_net().save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"\['dtype', 'revision'\] are for loading the base model, but base= is"):
            load(tmp_path, base=make_llava(), dtype="float32", revision="main")
        assert load(tmp_path, base=make_llava(), local_files_only=True).num_sites == 5

    def test_nothing_but_the_folder_is_needed(self, tmp_path):
        base, _ = load_model("tiny")
        make_net((1, 3), model=base).save_pretrained(tmp_path)
        about = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (about["base_model_name_or_path"], about["base_model_dtype"]) == ("tiny", "float32")
        assert about["processor_class"] == "LlavaProcessor"
        assert about["torch_version"] == torch.__version__
        assert about["transformers_version"] == transformers.__version__
        again = load(tmp_path)
        assert again.mask == (1, 3)
        assert Bits(dict(again.adapters.state_dict())) == Bits(dict(attached_to(base).adapters.state_dict()))


def attached_to(base):
    return next(hook.__self__ for hook in base._forward_pre_hooks.values())


def newer(folder, **changes):
    edit(folder / "adapter_config.json", eas_kit_version="99.1.0", format=2, **changes)


class TestNewer:
    """A folder that a newer version of eas_kit wrote."""

    def test_what_is_unknown_is_named_and_the_rest_is_loaded(self, make_batch, tmp_path):
        net, batch = make_net((1, 3)), make_batch()
        net.save_pretrained(tmp_path)
        newer(tmp_path, from_the_future=3)
        told = rf"by eas_kit 99.1.0 \(format 2\), this is {eas_kit.__version__} \(format 1\).*: from_the_future\."
        with pytest.warns(UserWarning, match=told):
            again = load(tmp_path, base=make_llava())
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, net(**batch).logits)

    def test_a_version_or_a_key_alone_warns(self, tmp_path):
        make_net().save_pretrained(tmp_path)
        for changes, told in (
            ({"eas_kit_version": "99.1.0"}, "99.1.0.*unknown here: nothing"),
            ({"eas_kit_version": "0.0.1", "more": 1}, "0.0.1.*unknown here: more"),
            ({"eas_kit_version": "unreadable"}, "unreadable.*unknown here: more"),
        ):
            edit(tmp_path / "adapter_config.json", **changes)
            with pytest.warns(UserWarning, match=told):
                load(tmp_path, base=make_llava())

    def test_tensors_that_are_unknown_are_named_and_left_out(self, make_batch, tmp_path):
        net, batch = make_net((1, 3)), make_batch()
        net.save_pretrained(tmp_path)
        more = {f"{i}.skip.third_path.weight": torch.ones(3) for i in range(5)}
        save_file(net.adapters.state_dict() | more, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match="third_path.weight is unknown"):  # of this version: no such file is ours
            load(tmp_path, base=make_llava())
        newer(tmp_path)
        told = "left out: 0.skip.third_path.weight, 1.skip.*, 2.skip.* and 2 more; .*by eas_kit 99.1.0.*update"
        with pytest.warns(UserWarning, match="written by eas_kit 99.1.0") as caught:
            again = load(tmp_path, base=make_llava())
        (warning,) = (one for one in caught if re.search(told, str(one.message)))
        assert warning.filename == __file__
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, net(**batch).logits)

    @pytest.mark.filterwarnings("ignore:load")
    def test_what_cannot_be_loaded_is_an_error_that_says_why(self, tmp_path):
        net, base = make_net(), make_llava()
        before = snapshot(base)
        net.save_pretrained(tmp_path)
        own = dict(net.adapters.state_dict())
        more, first = {"0.skip.third_path.weight": torch.ones(3)}, "0.skip.router.weight"
        newer(tmp_path)
        for changed, told in (
            ({first: own[first][:, :5].contiguous()}, r"router.weight has shape \(2, 5\), wanted \(2, 38\)"),
            ({"0.skip.router_2.weight": own[first].clone(), first: None}, "router.weight is missing"),
        ):
            tensors = {name: value for name, value in (own | more | changed).items() if value is not None}
            save_file(tensors, tmp_path / "adapter_model.safetensors")
            with pytest.raises(ConfigError, match=told + "; it was written by eas_kit 99.1.0.*update"):
                load(tmp_path, base=base)
        newer(tmp_path, source="somewhere_else")
        with pytest.raises(ConfigError, match=r"settings that do not fit: EASConfig.source.*by eas_kit 99.1.0.*update"):
            load(tmp_path, base=base)
        assert snapshot(base) == before


def cut(name, part=0.5):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * part)])

    return damage


def change_mask(**changes):
    return lambda folder: edit(folder / "mask.json", **changes)


def change_config(**changes):
    return lambda folder: edit(folder / "adapter_config.json", **changes)


def change_tensor(name, change):
    def damage(folder):
        tensors = {name: t.clone() for name, t in load_file(folder / "adapter_model.safetensors").items()}
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def pickle_instead(folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Evil()))


def torch_pickle_instead(folder):
    tensors = load_file(folder / "adapter_model.safetensors")  # maps the file that is written next
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def pickle_beside(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


DAMAGED = "is cut off, damaged, or no safetensors file"
UNFIT = "does not fit its adapter_config.json: "
DAMAGES = {  # what is done to the folder, and what is said
    "weights cut off": (cut("adapter_model.safetensors"), DAMAGED),
    "weights cut in the header": (cut("adapter_model.safetensors", 0.001), DAMAGED),
    "weights empty": (cut("adapter_model.safetensors", 0), DAMAGED),
    "a pickle": (pickle_instead, rf"{DAMAGED}.*\(pickles are not read\)"),
    "a pickle of torch": (torch_pickle_instead, rf"{DAMAGED}.*\(pickles are not read\)"),
    "a pickle beside": (pickle_beside, "has no adapter_model.safetensors.*adapter_model.bin will not do"),
    "config cut off": (cut("adapter_config.json"), "adapter_config.json is not JSON"),
    "config a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "should hold one JSON object"),
    "config without mask": (lambda f: (f / "mask.json").unlink(), "has no mask.json; wanted a folder of"),
    "config missing": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json; wanted"),
    "settings of another kind": (change_config(kinds=3), "has settings that do not fit"),
    "settings out of range": (change_config(skip_rank=-2), "settings that do not fit: EASConfig.skip_rank"),
    "format no number": (change_config(format="one"), "format 'one'; wanted 'EAS' and a whole number"),
    "mask cut off": (cut("mask.json"), "mask.json is not JSON"),
    "mask of another length": (change_mask(num_sites=7), "mask.json has num_sites 7, but adapter_config.json .* 5"),
    "mask of another kind": (change_mask(kind="ffn"), "mask.json has kind 'ffn', but adapter_config.json .* 'mha'"),
    "mask out of range": (change_mask(skipped=[5]), "sites are numbered 0 to 4, so there is no"),
    "mask of everything": (change_mask(skipped=[0, 1, 2, 3, 4]), "skips all 5 attentions"),
    "another shape": (
        change_tensor("0.skip.router.weight", lambda t: t[:, :-1].contiguous()),
        rf"{UNFIT}0.skip.router.weight has shape \(2, 37\), wanted \(2, 38\)",
    ),
    "another rank": (change_config(skip_rank=4), rf"{UNFIT}.* and \d+ more"),
    "another dtype": (
        change_tensor("0.skip.router.weight", torch.Tensor.int),
        f"{UNFIT}0.skip.router.weight has dtype torch.int32, wanted 16, 32 or 64 bits",
    ),
}


class TestDamaged:
    """A clear error, nothing loaded by half, and the base as it was, bit for bit."""

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damage(self, tmp_path, damage):
        act, message = DAMAGES[damage]
        make_net().save_pretrained(tmp_path)
        base = make_llava()
        assert load(tmp_path, base=base).detach() is base  # it was whole
        before = snapshot(base)
        act(tmp_path)
        with pytest.raises(ConfigError, match=message):
            load(tmp_path, base=base)
        assert snapshot(base) == before
        assert not (tmp_path / "ran").exists()

    def test_the_pickle_would_have_run(self, tmp_path):
        make_net().save_pretrained(tmp_path)
        pickle_instead(tmp_path)
        pickle.loads((tmp_path / "adapter_model.safetensors").read_bytes())
        assert (tmp_path / "ran").exists()

    def test_a_tensor_missing(self, tmp_path):
        net = make_net()
        net.save_pretrained(tmp_path)
        tensors = net.adapters.state_dict()
        tensors.pop("0.skip.router.bias")
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match=f"{UNFIT}0.skip.router.bias is missing"):
            load(tmp_path, base=make_llava())

    def test_files_are_checked_before_a_base_model_is_loaded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(eas_kit.models, "load_base", lambda *a, **k: pytest.fail("loaded the base model"))
        model = make_llava()
        model.name_or_path = "tiny"
        make_net(model=model).save_pretrained(tmp_path)
        cut("adapter_model.safetensors")(tmp_path)
        with pytest.raises(ConfigError, match=DAMAGED):
            load(tmp_path)

    def test_other_adapters(self, tmp_path):
        make_net().save_pretrained(tmp_path)
        edit(tmp_path / "adapter_config.json", peft_type="LORA")
        with pytest.raises(ConfigError, match="peft_type 'LORA'.*load other adapters with peft"):
            load(tmp_path, base=make_llava())


class TestCard:
    """README.md beside the adapters."""

    def test_what_it_says(self, tmp_path):
        model = make_llava()
        model.name_or_path = "someone/some-llava"
        make_net((1, 3), model=model).save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert (card.data.base_model, card.data.library_name) == ("someone/some-llava", "eas_kit")
        loading = ('eas.load("path/to/this/folder")', 'load_processor("someone/some-llava")')
        for part in (
            "| skipped (zero-based) | 1, 3 |",
            "| 6, 4 |",
            "| 5: mha |",
            "one prompt, or a left-padded batch",
            *loading,
        ):
            assert part in card.text

    def test_no_folder_of_this_machine_is_named(self, tmp_path):
        model = make_llava()
        model.name_or_path = str(tmp_path)
        make_net(model=model).save_pretrained(tmp_path / "net")
        card = ModelCard.load(tmp_path / "net" / "README.md")
        assert card.data.base_model is None and str(tmp_path) not in card.content
        assert "base=model" in card.text  # else the others could not load it

    def test_its_own_card_is_replaced_and_an_edited_one_is_kept(self, tmp_path):
        net, file = make_net((1, 3)), tmp_path / "README.md"
        net.save_pretrained(tmp_path)
        net.mask = (0,)
        net.save_pretrained(tmp_path)
        assert "| skipped (zero-based) | 0 |" in file.read_text()
        for edited in (file.read_text().replace("# Adapters", "# My adapters"), file.read_text() + "More.\n", "Mine."):
            file.write_text(edited)
            net.mask = (2,)
            net.save_pretrained(tmp_path)
            assert file.read_text() == edited
            assert json.loads((tmp_path / "mask.json").read_text())["skipped"] == [2]
        file.unlink()
        net.save_pretrained(tmp_path)
        assert "| skipped (zero-based) | 2 |" in file.read_text()


class TestNames:
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
