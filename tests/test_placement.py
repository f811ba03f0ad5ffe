"""Weights that are not plain tensors in memory: quantised, on meta, offloaded, under another adapter, sharded, cast.

Unmerged works wherever the layers themselves run. A merge needs the weights, and where it cannot have them it says
which, why and what to do, before anything is generated, and leaves the model as it was.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_process
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from test_prompt import CLOSE, make_net
from torch import nn
from toys import LAYERS, make_batch, make_llama, make_prompts, snapshot, stir, text_config
from transformers import LlamaForCausalLM
from two_processes import run_two

import eas_kit as eas
from eas_kit.errors import ConfigError, MergeError, UnsupportedModelError
from eas_kit.processes import make_accelerator

MASK = (0, 2)
PROMPT, PROMPTS = make_prompts((7,), None), make_prompts((7, 7, 7), None, seed=1)


def answer(net, **options):
    return net.generate(**PROMPT, max_new_tokens=5, **options)


def logits(net):
    with torch.no_grad():
        return net(**PROMPTS).logits


def refuses_to_merge(net, message: str) -> None:
    """By name, before the first forward; the model is as before, and answers as before."""
    unmerged, modules, forwards = answer(net), snapshot_of_modules(net.base), []
    handle = net.base.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(MergeError, match=message + '.*or run unmerged or with merge="low_rank"'):
        answer(net, merge=True)
    handle.remove()
    assert not forwards
    assert snapshot_of_modules(net.base) == modules
    assert not net.is_merged
    assert torch.equal(answer(net), unmerged)
    assert torch.equal(answer(net, merge="low_rank"), unmerged)  # the way out


def snapshot_of_modules(model: nn.Module) -> list:
    return [(name, id(module), type(module)) for name, module in model.named_modules()]


# ---------------------------------------------------------------------------------------------------- quantised


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
class TestQuantised:
    """With torch's own dynamic int8 linears, which need no package and no GPU."""

    def quantise(self, module: nn.Module) -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)

    def test_feed_forwards(self):
        model = make_llama()
        exact, dense_exact = logits(make_net(MASK, model=make_llama())), logits(model)
        for layer in model.model.layers:
            layer.mlp = self.quantise(layer.mlp)
        dense = logits(model)
        net = make_net(MASK, model=model)
        assert torch.equal(answer(net), answer(net, use_cache=False))
        off, dense_off = (logits(net) - exact).abs().mean(), (dense - dense_exact).abs().mean()
        assert 0 < off < 2 * dense_off  # int8 costs what it costs without adapters too
        table = eas.describe(net)
        assert not table.mergeable.any()
        assert table.reason[0].startswith("LlamaMLP.gate_proj is a torch.ao.nn.quantized.dynamic")
        refuses_to_merge(net, r"cannot merge site 0 \(model.layers.0\): LlamaMLP.gate_proj.*load the model unquantised")
        assert torch.equal(logits(eas.detach(net.eval())), dense)

    def test_one_feed_forward_of_a_kept_layer_does_not_hinder(self):
        model = make_llama()
        model.model.layers[1].mlp = self.quantise(model.model.layers[1].mlp)
        net = make_net(MASK, model=model)
        assert eas.describe(net).mergeable.tolist() == [True, False, True, True, True]
        assert torch.equal(answer(net, merge=True), answer(net))
        net.mask = (1,)
        refuses_to_merge(net, r"cannot merge site 1 \(model.layers.1\): LlamaMLP.gate_proj")

    def test_the_whole_model(self):
        net = make_net(MASK, model=self.quantise(make_llama()))
        assert torch.equal(answer(net), answer(net, use_cache=False))
        refuses_to_merge(net, "LlamaMLP.gate_proj is a torch.ao.nn.quantized.dynamic.*not a plain nn.Linear")


class Int8Tensor(torch.Tensor):
    """What torchao puts into a plain nn.Linear: a subclass of Tensor that says it is float."""


def test_a_weight_of_another_tensor_class():
    model = make_llama()
    up = model.model.layers[2].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().as_subclass(Int8Tensor), requires_grad=False)
    net = make_net(MASK, model=model)
    assert torch.equal(logits(net), logits(make_net(MASK, model=make_llama())))
    refuses_to_merge(
        net, r"LlamaMLP.up_proj.weight \(torch.float32\) is a Int8Tensor; merge needs a whole floating.*unquantised"
    )


# ------------------------------------------------------------------------------------------------- other adapters


class TestPeft:
    def wrapped(self):
        torch.manual_seed(3)
        config = LoraConfig(r=3, target_modules=["gate_proj", "q_proj"], init_lora_weights=False)
        return get_peft_model(make_llama(), config).eval()

    def test_the_wrapper_is_refused_at_attach(self):
        peft_model = self.wrapped()
        before = snapshot(peft_model)
        with pytest.raises(
            UnsupportedModelError, match=r"PeftModel is peft's wrapper.*attach to what model.merge_and_unload"
        ):
            eas.attach(peft_model)
        assert snapshot(peft_model) == before

    def test_the_model_inside_works_unmerged(self):
        peft_model = self.wrapped()
        net = make_net(MASK, model=peft_model.get_base_model())
        folded = make_net(MASK, model=self.wrapped().merge_and_unload())
        torch.testing.assert_close(logits(net), logits(folded), **CLOSE)
        assert not torch.equal(logits(net), logits(make_net(MASK, model=make_llama())))  # the LoRA is at work
        assert not eas.describe(net).mergeable.any()
        refuses_to_merge(
            net, r"LlamaMLP.gate_proj is a peft.*fold the other adapter in first \(attach to what peft_model.merge_and"
        )
        assert eas.check_merge(folded, PROMPT)  # the way out leads out
        assert eas.detach(net) is peft_model.get_base_model()


class TestChanged:
    """A linear that somebody made compute something else than its weight says, without changing its class."""

    @pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
    def test_hooks_on_a_linear(self, kind):
        net = make_net(MASK, model=make_llama())
        linear = net.base.model.layers[MASK[0]].mlp.gate_proj
        change = (lambda m, x, y: 2 * y) if kind == "register_forward_hook" else (lambda m, x: 2 * x[0])
        handle = getattr(linear, kind)(change)
        refuses_to_merge(net, r"LlamaMLP.gate_proj has forward hooks.*remove them first \(handle.remove\(\)\)")
        assert list(eas.describe(net).index[~eas.describe(net).mergeable]) == [MASK[0]]
        handle.remove()
        assert eas.check_merge(net, PROMPT)  # the way out leads out

    def test_a_forward_on_the_instance(self):
        net = make_net(MASK, model=make_llama())
        linear = net.base.model.layers[MASK[0]].mlp.up_proj
        linear.forward = lambda x: 2 * torch.nn.functional.linear(x, linear.weight)
        refuses_to_merge(net, "LlamaMLP.up_proj has a forward of its own, put on the instance.*del it first")
        del linear.forward
        assert eas.check_merge(net, PROMPT)


# -------------------------------------------------------------------------------------- meta, device maps, offload


def spread(*devices: str) -> dict[str, str]:
    """A device map with one device a decoder layer, and all else on the CPU."""
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    return dict.fromkeys(names, "cpu") | {f"model.layers.{i}": device for i, device in enumerate(devices)}


class TestDeviceMap:
    def test_hooks_on_every_module(self):
        plain = make_net(MASK, model=make_llama())
        model = dispatch_model(make_llama(), {"": "cpu"}, force_hooks=True)
        assert all(hasattr(layer.mlp, "_hf_hook") for layer in model.model.layers)
        before = snapshot(model)
        net = make_net(MASK, model=model)
        assert torch.equal(logits(net), logits(plain))
        assert torch.equal(answer(net, merge=True), answer(plain, merge=True))
        assert torch.equal(answer(net, num_beams=3), answer(plain, num_beams=3))
        eas.detach(net)
        assert snapshot(model) == before

    @pytest.mark.parametrize("source", ["attention_norm", "ffn_norm"])
    @pytest.mark.parametrize("offload", ["layers to disk", "all to cpu", "all to disk"])
    def test_offloaded_layers_work_unmerged(self, offload, source, tmp_path):
        plain, model = make_net(MASK, model=make_llama(), source=source), make_llama()
        if offload == "layers to disk":
            model = dispatch_model(model, spread("disk", "cpu", "disk", "disk", "cpu"), offload_dir=tmp_path)
        elif offload == "all to cpu":
            model = cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            model = disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
        dense = logits(model)
        net = make_net((), model=model, source=source)
        assert {p.device.type for p in net.adapters.parameters()} == {"cpu"}
        for mask in ((), MASK, (1, 3)):
            net.mask = plain.mask = mask
            assert torch.equal(logits(net), logits(plain))
            assert torch.equal(answer(net), answer(plain))
            refuses_to_merge(net, r"cannot merge site 0.*offloaded to CPU or disk.*load the model without offloading")
        self.gradients_are_equal(net, plain)
        assert eas.describe(net).mergeable.tolist() == (
            [False, True, False, False, True] if offload == "layers to disk" else [False] * LAYERS
        )
        assert model.model.layers[0].post_attention_layernorm.weight.is_meta  # taken back after each call
        assert torch.equal(logits(eas.detach(net)), dense)

    def gradients_are_equal(self, net, plain):
        batch = make_batch(images=None)
        for one in (net, plain):
            one(**batch).loss.backward()
        for (name, p), (_, q) in zip(net.adapters.named_parameters(), plain.adapters.named_parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name

    def test_layers_in_memory_merge_beside_offloaded_ones(self, tmp_path):
        """Without adapters at the kept sites, a merge touches the skipped layers alone."""
        plain = make_net((1, 3), model=make_llama(), adapt_rank=0)
        model = dispatch_model(make_llama(), spread("disk", "cpu", "disk", "cpu", "cpu"), offload_dir=tmp_path)
        net = make_net((1, 3), model=model, adapt_rank=0)
        assert torch.equal(answer(net, merge=True), answer(plain, merge=True))
        net.mask = (0, 1)
        refuses_to_merge(net, r"cannot merge site 0 \(model.layers.0\): LlamaMLP.gate_proj")

    def test_weights_that_are_nowhere(self):
        with torch.device("meta"):
            model = LlamaForCausalLM(text_config(attn_implementation="eager")).eval()
        net = eas.attach(model)
        assert net.device.type == "meta"
        reason = eas.describe(net).reason[0]
        assert reason.startswith("LlamaMLP.gate_proj.weight (torch.float32) is on the meta device; merge needs a whole")
        assert "load the model's weights first, or run unmerged" in reason


# --------------------------------------------------------------------------------------------------- casts, moves


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_a_cast_while_masked_is_a_cast_before(cast):
    """A stand-in shares its original's table of parameters: what is swapped out is cast and moved with the rest."""
    net = make_net(MASK, model=make_llama())
    cast(net)
    before = eas.attach(cast(make_llama()), eas.EASConfig(skip_rank=6, adapt_rank=4))
    stir(before.adapters.float())
    cast(before.adapters)
    dtype = next(net.base.parameters()).dtype
    assert {p.dtype for p in net.parameters()} == {dtype}
    for mask in (MASK, (1, 3), ()):
        net.mask = before.mask = mask
        assert logits(net).dtype == dtype
        torch.testing.assert_close(logits(net), logits(before))
        assert torch.equal(answer(net, merge=True), answer(before, merge=True))
    assert {p.dtype for p in eas.detach(net).parameters()} == {dtype}


def test_a_move_while_masked_reaches_what_is_swapped_out():
    net = make_net(MASK, model=make_llama()).to("meta")
    assert {p.device.type for p in net.parameters()} == {"meta"}
    net.mask = ()
    assert {p.device.type for p in eas.detach(net).parameters()} == {"meta"}


# -------------------------------------------------------------------------------------------------------- sharded


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, list[dict]]:
    """What two processes saw that share one model; see sharded_process.py."""
    folder = tmp_path_factory.mktemp("sharded")
    sharded_process.model().save_pretrained(folder / "base")
    run_two("sharded_process.py", folder, CUDA_VISIBLE_DEVICES="")
    return folder, [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]


def alone(mask) -> eas.EASModel:
    return make_net(mask, model=sharded_process.model(), dropout=0.0)


@pytest.mark.slow
class TestSharded:
    def test_fsdp_trains_as_one_process(self, found):
        for mask in sharded_process.MASKS:
            net = alone(mask).train()
            parameters = dict(net.adapters.named_parameters())
            expected = [sharded_process.gradients(net, rank, parameters) for rank in range(2)]
            for rank in range(2):
                seen = found[1][rank]["fsdp"][mask]
                assert seen["loss"] == pytest.approx(expected[rank]["loss"], rel=1e-5)
                assert seen["grads"].keys() == expected[0]["grads"].keys()
                for name, gradient in seen["grads"].items():
                    mean = (expected[0]["grads"][name] + expected[1]["grads"][name]) / 2
                    torch.testing.assert_close(gradient, mean, **CLOSE)
            assert expected[0]["loss"] != pytest.approx(expected[1]["loss"], rel=1e-2)  # two examples

    @pytest.mark.parametrize("how", ["fsdp", "tensor_parallel"])
    def test_unmerged_works_under_two_masks(self, found, how):
        for mask in sharded_process.MASKS:
            expected = sharded_process.answers(alone(mask).eval())
            for rank in range(2):
                seen = found[1][rank][how]
                assert seen["sharded"] == "DTensor"
                torch.testing.assert_close(seen[mask]["logits"], expected["logits"], **CLOSE)
                assert torch.equal(seen[mask]["tokens"], expected["tokens"])
                assert torch.equal(seen[mask]["condensed"], expected["tokens"])  # merge="low_rank" leaves linears alone

    def test_generate_before_any_forward(self, found):
        for rank in range(2):
            seen = found[1][rank]["fsdp"]
            assert 'register_fsdp_forward_method(net, "generate")' in seen["not_gathered"]
            assert torch.equal(seen["generated_first"], seen[sharded_process.MASKS[0]]["tokens"])

    @pytest.mark.parametrize("how", ["fsdp", "tensor_parallel"])
    def test_a_merge_is_refused_by_name(self, found, how):
        for rank in range(2):
            seen = found[1][rank][how]
            assert seen["refusal"].startswith("cannot merge site 0 (model.layers.0): Llama")
            for message in (seen["reason"], seen["refusal"]):
                assert "is sharded (a DTensor); merge needs a whole" in message
                assert "without FSDP or tensor parallelism, or run unmerged" in message
            before, after = seen[sharded_process.MASKS[-1]], seen["after"]
            assert torch.equal(after["logits"], before["logits"])
            assert torch.equal(after["tokens"], before["tokens"])

    def test_sharded_adapters_are_saved_whole(self, found):
        folder, seen = found
        net = eas.load(folder / "adapters", base=sharded_process.model())
        expected = alone(sharded_process.MASKS[-1])
        assert net.mask == expected.mask
        for (name, p), (_, q) in zip(
            net.adapters.named_parameters(), expected.adapters.named_parameters(), strict=True
        ):
            assert torch.equal(p, q), name
        assert seen[0]["fsdp"]["detached"] == "LlamaAttention"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("FSDP", r"an Accelerator with FSDP exists in this process already.*call them before, or without"),
        ("DEEPSPEED", r"accelerate is set up for DEEPSPEED.*whole copy of the model.*--use_fsdp --fsdp_version 2"),
    ],
)
def test_the_training_loop_refuses_what_would_shard_its_adapters(kind, message, monkeypatch):
    from accelerate import Accelerator, DistributedType

    net = nn.Linear(2, 3)
    assert make_accelerator("no", net).distributed_type == DistributedType.NO
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(ConfigError, match=message):
        make_accelerator("no", net)
