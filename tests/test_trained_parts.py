"""Parts of the base model that train beside the adapters: found, trained, saved, put back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from toys import LAYERS, make_llava

from eas_kit import EASConfig, attach, detach, load, measure
from eas_kit.errors import ConfigError
from eas_kit.loop import answer_tokens
from eas_kit.memory import estimate_memory
from eas_kit.trained_parts import TrainedParts

PROJECTOR = "model.multi_modal_projector"


def make_net(parts=(PROJECTOR,), model=None, **changes):
    return attach(model or make_llava(), EASConfig(skip_rank=6, adapt_rank=4, modules_to_save=parts, **changes))


def one_step(net, batch):
    optimizer = torch.optim.SGD(net.trainable_parameters(), lr=0.1)
    net.train()
    net(**batch).loss.backward()
    optimizer.step()
    net.eval()


def projector(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith(PROJECTOR)}


class TestTraining:
    def test_only_what_is_named_moves_beside_the_adapters(self, make_batch):
        base = make_llava()
        before = {name: p.detach().clone() for name, p in base.named_parameters()}
        net = make_net(model=base)
        net.mask = (1,)
        one_step(net, make_batch())
        moved = {name for name, p in base.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(projector(base))
        assert len(moved) == 4  # two linears, each with a bias

    def test_the_control_without_it_does_not_move(self, make_batch):
        base = make_llava()
        before = projector(base)
        net = make_net((), base)
        one_step(net, make_batch())
        assert all(torch.equal(p, before[name]) for name, p in projector(base).items())

    def test_counted_with_what_trains(self):
        net, size = make_net(), sum(p.numel() for p in projector(make_llava()).values())
        plain = make_net(())
        assert measure.parameters(net)["active"]["modules_to_save"] == size
        assert "modules_to_save" not in measure.parameters(plain)["active"]
        assert measure.parameters(net)["active"]["total"] == measure.parameters(plain)["active"]["total"] + size
        assert measure.parameters(net)["trainable"] == measure.parameters(plain)["trainable"] + size
        more = len(net.trainable_parameters(active=True)) - len(plain.trainable_parameters(active=True))
        assert more == 4

    def test_they_train_where_no_adapter_is_at_work(self, make_batch):
        base = make_llava()
        before = projector(base)
        net = attach(base, EASConfig(skip_rank=6, adapt_rank=0, modules_to_save=PROJECTOR))
        assert len(net.trainable_parameters(active=True)) == 4
        one_step(net, make_batch())
        assert not any(torch.equal(p, before[name]) for name, p in projector(base).items())

    def test_a_single_parameter(self):
        name = f"{PROJECTOR}.linear_1.bias"
        net = make_net((name,))
        assert [n for n, p in net.base.named_parameters() if p.requires_grad] == [name]

    def test_their_gradients_are_in_the_estimate(self):
        size = sum(p.numel() for p in projector(make_llava()).values())
        settings = {"prompt_tokens": 13, "new_tokens": 3, "training": True, "mask": (1,)}
        config = EASConfig(skip_rank=6, adapt_rank=4)
        without = estimate_memory(make_llava(), eas=config, **settings).training
        config.modules_to_save = (PROJECTOR,)
        with_it = estimate_memory(make_llava(), eas=config, **settings).training
        assert with_it["gradients"] - without["gradients"] == 4 * size
        assert with_it["optimizer"] - without["optimizer"] == 8 * size


class TestLifeCycle:
    def test_detach_gives_the_base_back(self, make_batch):
        base, batch = make_llava(), make_batch()
        want = {name: p.detach().clone() for name, p in base.named_parameters()}
        with torch.no_grad():
            logits = base(**batch).logits
        net = make_net(model=base)
        one_step(net, batch)
        with torch.no_grad():
            assert not torch.equal(net(**batch).logits, logits)
        again = detach(net)
        assert again is base
        assert all(torch.equal(p, want[name]) for name, p in base.named_parameters())
        assert all(p.requires_grad for p in base.parameters())  # as it was before attach
        with torch.no_grad():
            assert torch.equal(base(**batch).logits, logits)

    def test_what_was_frozen_is_frozen_again(self):
        base = make_llava().requires_grad_(False)
        detach(make_net(model=base))
        assert not any(p.requires_grad for p in base.parameters())

    def test_saved_and_loaded(self, make_batch, tmp_path):
        net, batch = make_net(), make_batch()
        net.mask = (1, 3)
        one_step(net, batch)
        net.save_pretrained(tmp_path / "net")
        tensors = load_file(tmp_path / "net" / "adapter_model.safetensors")
        assert sum(name.startswith(f"modules_to_save.{PROJECTOR}.") for name in tensors) == 4
        assert json.loads((tmp_path / "net" / "adapter_config.json").read_text())["modules_to_save"] == [PROJECTOR]
        base = make_llava()
        before = projector(base)
        again = load(tmp_path / "net", base=base)
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, net(**batch).logits)
        detach(again)
        assert all(torch.equal(p, before[name]) for name, p in projector(base).items())

    def test_loaded_in_the_base_models_own_type(self, tmp_path):
        make_net().save_pretrained(tmp_path / "net")
        again = load(tmp_path / "net", base=make_llava().to(torch.bfloat16))
        assert {p.dtype for p in again.trained_parts.parameters} == {torch.bfloat16}

    def test_a_file_without_them_is_refused_and_the_base_left(self, tmp_path):
        make_net(()).save_pretrained(tmp_path / "net")
        path = tmp_path / "net" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": [PROJECTOR]}))
        base = make_llava()
        before = projector(base)
        with pytest.raises(ConfigError, match=r"modules_to_save\..*linear_1.weight is missing"):
            load(tmp_path / "net", base=base)
        assert all(torch.equal(p, before[name]) for name, p in projector(base).items())


class TestWhichParts:
    def test_a_class_can_name_its_own(self):
        base = make_llava()
        base.eas_modules_to_save = (PROJECTOR,)
        net = attach(base, EASConfig(skip_rank=6, adapt_rank=4))
        assert net.config.modules_to_save == (PROJECTOR,)  # written down, for the file
        assert len(net.trained_parts.parameters) == 4
        detach(net)
        assert attach(base, EASConfig(skip_rank=6, adapt_rank=4, modules_to_save=())).trained_parts.parameters == []

    def test_buffers_come_along(self):
        base = make_llava()
        base.model.multi_modal_projector.register_buffer("seen", torch.tensor(3))
        parts = TrainedParts(base, (PROJECTOR,))
        base.model.multi_modal_projector.seen += 4
        assert len(parts.tensors) == len(parts.parameters) + 1
        parts.train()  # whole numbers take no gradient
        parts.restore()
        assert int(base.model.multi_modal_projector.seen) == 3

    def test_an_unknown_path_is_refused_before_anything_changes(self):
        base = make_llava()
        with pytest.raises(ConfigError, match=r"no weights at 'projector'; wanted the path of a module or parameter"):
            make_net(("projector",), base)
        assert all(p.requires_grad for p in base.parameters())
        assert len(attach(base).sites) == LAYERS

    @pytest.mark.parametrize("wrong", [(3,), ("",), [None]])
    def test_settings_of_the_wrong_kind(self, wrong):
        with pytest.raises(ConfigError, match="modules_to_save: wanted paths of modules in the base model, or None"):
            EASConfig(modules_to_save=wrong)


class TestLabelsOfClassifiers:
    def test_one_answer_an_example(self):
        assert answer_tokens({"labels": torch.tensor([1, 0, 1])}) == 3
        assert answer_tokens({"labels": torch.rand(5, 7)}) == 5
        assert answer_tokens({"labels": torch.tensor([[-100, -100, 4], [-100, 2, 3]])}) == 3
