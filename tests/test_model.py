"""EASModel: the formula, the mask, training, and that detach gives the base model back bit for bit."""

from __future__ import annotations

import copy
import pickle
from threading import Thread

import pytest
import torch
from test_prompt import CLOSE, MASKS, make_net
from test_sites_and_slots import Squashed
from torch import nn
from toys import LAYERS, WIDTH, make_batch, make_llama, make_llava, snapshot, stir, text_config
from transformers import DynamicCache, LlamaForCausalLM, StableLmConfig, StableLmForCausalLM

from eas_kit.config import EASConfig
from eas_kit.errors import ConfigError, EASError, PromptError, UnsupportedModelError
from eas_kit.model import EASModel, attach, detach, is_attached
from eas_kit.prompt import forward_prompt
from eas_kit.slots import skipping


def by_hand(net: EASModel, batch: dict) -> torch.Tensor:
    """Logits of a Llama with adapters by the formulas of the paper, on the detached base's own parts."""
    mask, config, adapters = set(net.mask), net.config, net.adapters
    base = detach(net)
    model, prompt = base.model, forward_prompt(batch, training=False)
    x = model.embed_tokens(batch["input_ids"])
    S = x.shape[1]
    positions = torch.arange(S)[None]
    rotary = model.rotary_emb(x, position_ids=positions)
    allowed = torch.ones(S, S, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None, :]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for i, layer in enumerate(model.layers):
        site = adapters[str(i)]
        n = layer.input_layernorm(x)
        if i in mask and config.source == "attention_norm":
            ffn_input = layer.post_attention_layernorm.weight * site["skip"](n, prompt)
        elif i in mask:
            ffn_input = site["skip"](layer.post_attention_layernorm(x), prompt)
        else:
            if config.adapt_rank:
                n = site["keep"](n, prompt)
            x = x + layer.self_attn(n, position_embeddings=rotary, attention_mask=bias)[0]
            ffn_input = layer.post_attention_layernorm(x)
        x = x + layer.mlp(ffn_input)
    return base.lm_head(model.norm(x))


class TestFormula:
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize(
        "config", [{}, {"source": "ffn_norm"}, {"adapt_rank": 0}], ids=["paper", "variant", "bare"]
    )
    def test_forward_is_the_paper(self, make_batch, mask, config):
        net, batch = make_net(mask, model=make_llama(), **config), make_batch(images=None)
        with torch.no_grad():
            seen = net(**batch).logits
            expected = by_hand(net, batch)
        keep = batch["attention_mask"].bool()
        torch.testing.assert_close(seen[keep], expected[keep], **CLOSE)

    def test_new_adapters_change_nothing(self, make_batch):
        model, batch = make_llava(), make_batch()
        with torch.no_grad():
            before = model(**batch).logits
            assert torch.equal(attach(model)(**batch).logits, before)

    @pytest.mark.parametrize("mask", [(0,), (1, 3)])
    def test_variant_starts_as_attention_removed(self, make_batch, mask):
        model, batch = make_llava(), make_batch()
        with torch.no_grad(), skipping(model, mha=mask):
            removed = model(**batch).logits
        net = attach(model, EASConfig(skip_rank=6, adapt_rank=4, source="ffn_norm"))
        net.mask = mask
        with torch.no_grad():
            assert torch.equal(net(**batch).logits, removed)
        detach(net)
        net = attach(model, EASConfig(skip_rank=6, adapt_rank=4))  # control: the paper's form starts elsewhere
        net.mask = mask
        with torch.no_grad():
            assert not torch.allclose(net(**batch).logits, removed)

    def test_skipped_feed_forward_is_what_the_adapter_adds(self, make_batch):
        net, batch = (
            make_net((LAYERS + 1,), model=make_llama(), kinds=("mha", "ffn"), adapt_rank=0),
            make_batch(images=None),
        )
        with torch.no_grad():
            hidden = net(**batch, output_hidden_states=True).hidden_states
            pia = net.adapters[str(LAYERS + 1)]["skip"]
            base = detach(net)
            layer, seen = base.model.layers[1], {}
            handle = layer.mlp.register_forward_pre_hook(lambda module, args: seen.update(n=args[0]))
            dense = base(**batch, output_hidden_states=True).hidden_states
            handle.remove()
            n = seen["n"]
            expected = dense[2] - layer.mlp(n) + pia(n, forward_prompt(batch, training=False)) - n
        torch.testing.assert_close(hidden[2], expected, **CLOSE)

    @pytest.mark.parametrize("mask", MASKS)
    def test_hidden_states_are_complete(self, make_batch, mask):
        net, batch = make_net(mask), make_batch()
        with torch.no_grad():
            out = net(**batch, output_hidden_states=True)
        assert len(out.hidden_states) == LAYERS + 1
        assert out.loss.isfinite()
        with torch.no_grad():
            assert torch.equal(net.base.lm_head(out.hidden_states[-1]), out.logits)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_base_with_float32_adapters(self, make_batch, make_prompts, dtype):
        exact, net = make_net((0, 2)), make_net((0, 2), model=make_llava().to(dtype))
        assert {p.dtype for p in net.adapters.parameters()} == {torch.float32}
        batch = make_batch()
        half = batch | {"pixel_values": batch["pixel_values"].to(dtype)}
        with torch.no_grad():
            expected, seen = exact(**batch).logits, net(**half).logits
        assert seen.dtype == dtype
        assert (seen.float() - expected).abs().max() < 0.1 * expected.abs().max()
        prompts = make_prompts()
        prompts["pixel_values"] = prompts["pixel_values"].to(dtype)
        assert net.generate(**prompts, max_new_tokens=3).shape[1] == prompts["input_ids"].shape[1] + 3

    def test_autocast(self, make_batch):
        net, batch = make_net((0, 2)), make_batch()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seen = net(**batch).logits
        with torch.no_grad():
            expected = net(**batch).logits
        assert (seen.float() - expected).abs().max() < 0.1 * expected.abs().max()


class TestMask:
    def test_any_time_and_back(self, make_batch):
        net, batch = make_net(()), make_batch()
        seen = {}
        with torch.no_grad():
            for mask in [*MASKS, *reversed(MASKS)]:
                net.mask = list(mask)
                assert net.mask == mask
                out = net(**batch).logits
                assert torch.equal(seen.setdefault(mask, out), out)
        assert len({float(out.sum()) for out in seen.values()}) == len(MASKS)

    def test_between_two_steps_of_training(self, make_batch):
        net, batch = make_net(()).train(), make_batch()
        for mask, role in (((), "keep"), ((1,), "skip")):
            net.zero_grad()
            net.mask = mask
            net(**batch).loss.backward()
            used = {name for name, p in net.adapters.named_parameters() if p.grad is not None}
            assert {name for name in used if name.startswith("1.")} == {
                f"1.{role}.{name}" for name, _ in net.adapters["1"][role].named_parameters()
            }

    def test_wrong_masks(self):
        net = make_net((0, 2))
        with pytest.raises(ConfigError, match="sites are numbered 0 to 4, so there is no \\[5\\]"):
            net.mask = [5]
        with pytest.raises(ConfigError, match="skips all 5 attentions; keep at least one"):
            net.mask = range(LAYERS)
        assert net.mask == (0, 2)  # as before the error
        both = make_net((), kinds=("ffn", "mha"))
        both.mask = range(LAYERS)  # all feed-forwards may go
        with pytest.raises(ConfigError, match="skips all 5 attentions"):
            both.mask = range(LAYERS, 2 * LAYERS)

    def test_modes_and_casts_reach_what_is_swapped_out(self, make_batch):
        net, batch = make_net((1,)), make_batch()
        attention = net.base.get_submodule(net.sites[1].path).original
        net.train()
        net.mask = ()
        assert attention.training
        net.mask = (1,)
        net.eval()
        net.to(torch.float64)
        net.mask = ()
        assert not attention.training
        batch["pixel_values"] = batch["pixel_values"].double()
        with torch.no_grad():
            assert net(**batch).logits.dtype == torch.float64


class TestAttachDetach:
    @pytest.mark.parametrize("make", [make_llama, make_llava])
    @pytest.mark.parametrize("kinds", [("mha",), ("mha", "ffn")])
    def test_bit_for_bit(self, make, kinds, make_batch, make_prompts):
        images = None if make is make_llama else (True, False, True)
        model, batch, prompts = make(), make_batch(images=images), make_prompts(images=images)
        next(model.parameters()).requires_grad_(False)  # a flag of the user's own
        with torch.no_grad():
            dense = model(**batch, output_hidden_states=True).logits
        model.generate(**prompts, max_new_tokens=2, num_beams=2)
        before = snapshot(model)
        net = make_net((0, 2), model=model, kinds=kinds)
        assert not any(p.requires_grad for p in model.parameters())
        net(**batch).loss.backward()
        for mask in MASKS:
            net.mask = mask
            net.generate(**prompts, max_new_tokens=2)
        assert detach(net) is model
        assert snapshot(model) == before
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, dense)
        assert all(p.grad is None for p in model.parameters())

    def test_attach_twice(self):
        model = make_llama()
        net = attach(model)
        assert is_attached(model)
        with pytest.raises(ConfigError, match=r"carries eas_kit adapters already; eas_kit.detach\(net\) it first"):
            attach(model)
        detach(net)
        assert not is_attached(model)
        attach(model)

    def test_a_detached_net_says_so(self, make_batch, make_prompts, tmp_path):
        net = make_net()
        detach(net)
        for action in (
            lambda: net(**make_batch()),
            lambda: net.generate(**make_prompts()),
            lambda: setattr(net, "mask", [1]),
            lambda: net.save_pretrained(tmp_path / "x"),
            lambda: detach(net),
        ):
            with pytest.raises(EASError, match="this EASModel was detached from its base"):
                action()

    def test_a_failing_attach_leaves_the_base_alone(self):
        model = make_llama()
        before = snapshot(model)
        with pytest.raises(ConfigError, match=f"groups=4 must divide the model's width {WIDTH}"):
            attach(model, EASConfig(skip_rank=4, adapt_rank=4, groups=4))
        assert snapshot(model) == before

    def test_norms_that_are_more_than_a_gain(self):
        model = make_llama()
        for layer in model.model.layers:
            layer.post_attention_layernorm = Squashed(WIDTH)
        with pytest.raises(
            UnsupportedModelError, match='is more than a gain and a bias.*use EASConfig\\(source="ffn_norm"\\)'
        ):
            attach(model)
        net = make_net((0, 2), model=model, source="ffn_norm")
        assert net(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()

    @pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
    @pytest.mark.parametrize("make", [make_llama, make_llava])
    def test_outputs_recorded_for_the_first_time_under_a_mask(self, asked, make):
        """transformers puts its recorders on modules by class, once; it must find the attentions themselves."""
        ids = {"input_ids": torch.tensor([[5, 6, 7]])}
        expected = make()(**ids, output_attentions=True).attentions
        model = make()
        net = make_net((1, 3), model=model)
        out = net(**ids, **{asked: True})
        assert len(out.attentions if asked == "output_attentions" else out.hidden_states) == (
            LAYERS - 2 if asked == "output_attentions" else LAYERS + 1
        )
        base = detach(net)
        assert len(expected) == LAYERS
        found = base(**ids, output_attentions=True, output_hidden_states=True)
        assert len(found.hidden_states) == LAYERS + 1  # and not twice
        for ours, theirs in zip(found.attentions, expected, strict=True):
            assert torch.equal(ours, theirs)

    def test_a_layer_that_passes_no_keywords_on(self):
        """StableLM's: the prompt reaches its attention all the same, but not in a recomputation."""
        sizes = {key: value for key, value in text_config().to_dict().items() if key != "model_type"}
        net = attach(StableLmForCausalLM(StableLmConfig(**sizes)), EASConfig(skip_rank=6, adapt_rank=4, dropout=0))
        stir(net.adapters)
        net.mask = (0, 2)
        batch = make_batch(images=None)
        net.train()
        loss = net(**batch).loss
        loss.backward()
        net.eval()
        torch.testing.assert_close(net(**batch).loss, loss)
        other = batch["labels"].clone()
        other[:, 4] = batch["input_ids"][:, 4]  # a shorter prompt
        assert not torch.allclose(net(**batch | {"labels": other}).logits, net(**batch).logits)
        net.train().gradient_checkpointing_enable()
        with pytest.raises(
            PromptError, match="Gradient checkpointing recomputes so, and this family does not allow it"
        ):
            net(**batch).loss.backward()

    def test_on_the_meta_device(self):
        """Where operations are counted without any weights."""
        with torch.device("meta"):
            model = LlamaForCausalLM(text_config(attn_implementation="eager")).eval()
            ids = torch.ones(2, 7, dtype=torch.long)
        net = attach(model, EASConfig(skip_rank=6, adapt_rank=4))
        net.mask = (0, 2)
        assert net.device.type == "meta"
        assert net(input_ids=ids, attention_mask=ids, use_cache=False).logits.shape == (2, 7, 97)

    def test_under_the_hooks_of_accelerate(self, make_prompts):
        """A device map puts a forward of its own on every module; slots are swapped all the same."""
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        prompts = make_prompts()
        expected = make_net((0, 2)).generate(**prompts, max_new_tokens=3)
        model = make_llava()
        for module in model.modules():
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        assert torch.equal(make_net((0, 2), model=model).generate(**prompts, max_new_tokens=3), expected)

    def test_copies_are_independent(self, make_batch):
        net, batch = make_net((0, 2)), make_batch()
        with torch.no_grad():
            before = net(**batch).logits
            twin = copy.deepcopy(net)
            assert torch.equal(twin(**batch).logits, before)
            twin.mask = ()
            stir(twin.adapters, seed=9)
            assert not torch.equal(twin(**batch).logits, before)
            assert torch.equal(net(**batch).logits, before)
        assert net.mask == (0, 2)
        detach(twin)

    def test_attach_follows_the_mode_of_the_base(self):
        assert not attach(make_llama()).training
        assert attach(make_llama().train()).training

    def test_active_adapters_and_trainable_parameters(self):
        net = make_net((1,))
        assert list(net.active_adapters()) == ["0.keep", "1.skip", "2.keep", "3.keep", "4.keep"]
        everything = net.trainable_parameters()
        assert len(everything) == sum(1 for _ in net.adapters.parameters())
        assert len(net.trainable_parameters(active=True)) < len(everything)
        assert all(p.requires_grad for p in everything)
        assert not any(p.requires_grad for p in net.base.parameters())
        bare = make_net((1,), adapt_rank=0)
        assert list(bare.active_adapters()) == ["1.skip"]
        assert "keep" not in bare.adapters["0"]


class TestTraining:
    def gradients(self, net, batch, interfere=None):
        net.zero_grad()
        loss = net(**batch).loss
        if interfere is not None:
            with torch.no_grad():
                net(**interfere)
        loss.backward()
        return {name: p.grad.clone() for name, p in net.adapters.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("kinds", [("mha",), ("mha", "ffn")])
    def test_gradient_checkpointing_gives_equal_gradients(self, make_batch, reentrant, kinds):
        mask = (0, 2) if kinds == ("mha",) else (0, 2, LAYERS + 2, LAYERS + 3)
        net = make_net(mask, dropout=0.0, kinds=kinds).train()
        batch, other = make_batch(), make_batch(((3, 2), (13, 2), (2, 7)), seed=4)
        plain = self.gradients(net, batch)
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        # another batch passes between forward and backward: the recomputation must still see this one's prompt
        checked = self.gradients(net, batch, interfere=other)
        assert plain.keys() == checked.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checked[name], gradient, atol=1e-6, rtol=1e-5)
        assert net.is_gradient_checkpointing
        net.gradient_checkpointing_disable()
        assert not net.is_gradient_checkpointing
        control = self.gradients(net, dict(batch, labels=batch["labels"].roll(1, 0)))
        assert not torch.allclose(control["0.skip.up_0.weight"], plain["0.skip.up_0.weight"])

    def test_the_toy_task_is_learnt(self, toy_task):
        torch.manual_seed(0)
        net = attach(make_llava(), EASConfig(skip_rank=6, adapt_rank=4, dropout=0.0))
        net.mask = (1, 3)
        frozen = {name: p.clone() for name, p in net.base.named_parameters()}
        before = toy_task.score(net, "train", limit=16)
        optimizer = torch.optim.AdamW(net.trainable_parameters(), lr=3e-2)
        net.train()
        for _ in range(12):
            loss = net(**toy_task.collate(toy_task.train[:16])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert toy_task.score(net, "train", limit=16)["loss"] < 0.6 * before["loss"]
        assert net.training
        assert all(torch.equal(p, frozen[name]) for name, p in net.base.named_parameters())

    def test_no_cache_is_kept_where_there_is_a_loss(self, make_batch):
        net, batch = make_net(), make_batch()
        assert net.train()(**batch).past_key_values is None
        assert net.eval()(**batch).past_key_values is None
        assert isinstance(net(**batch, use_cache=True).past_key_values, DynamicCache)
        del batch["labels"]
        assert isinstance(net(**batch).past_key_values, DynamicCache)

    def test_data_parallel(self, make_batch, tmp_path):
        net, batch = make_net((0, 2), dropout=0.0).train(), make_batch()
        plain = self.gradients(net, batch)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
            net.zero_grad()
            wrapped(**batch).loss.backward()
            for name, gradient in plain.items():
                torch.testing.assert_close(dict(net.adapters.named_parameters())[name].grad, gradient)
        finally:
            torch.distributed.destroy_process_group()

    def test_labels_as_positions(self, make_batch):
        """Arguments may come by position, as the base model takes them."""
        net, batch = make_net(model=make_llama()), make_batch(images=None)
        with torch.no_grad():
            by_name = net(**batch).logits
            by_place = net(batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"]).logits
        assert torch.equal(by_name, by_place)
        with pytest.raises(PromptError, match="training needs labels"):
            net.train()(batch["input_ids"], batch["attention_mask"])


class TestThreads:
    """What a forward knows of its prompt is kept on the net, so that a second thread has to wait for its turn."""

    @pytest.mark.parametrize("merge", [False, True])
    @pytest.mark.parametrize("call", ["generate", "forward", "prefill"])
    def test_a_second_thread_waits(self, merge, call):
        net = make_net(model=make_llama())
        first, second = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[31, 32, 33]])

        def generate(ids):
            return net.generate(ids, merge=merge, max_new_tokens=5, do_sample=False)

        def other():
            with torch.no_grad():
                if call == "generate":
                    return generate(second)
                return (net if call == "forward" else net.prefill)(input_ids=second).logits

        expected, other_expected = generate(first), other()
        seen, threads, calls = [], [], []

        def start(*args):
            calls.append(args)
            if len(calls) > merge and not threads:  # in the middle of the prefill, or in a merged decoding step
                threads.append(Thread(target=lambda: seen.append(other())))
                threads[0].start()
                threads[0].join(0.3)  # by far enough to get in between

        place = net.base.lm_head if merge else net.base.model.layers[2].mlp
        handle = place.register_forward_hook(start)
        assert torch.equal(generate(first), expected)
        handle.remove()
        threads[0].join()
        assert torch.equal(seen[0], other_expected)

    def test_copies_do_not_wait_for_each_other(self):
        net = make_net(model=make_llama())
        other = copy.deepcopy(net)
        assert other._turn.lock is not net._turn.lock
        assert pickle.loads(pickle.dumps(net._turn)).lock is not net._turn.lock
        ids, seen = torch.tensor([[5, 6, 7, 8, 9]]), []
        with net._turn.lock:
            thread = Thread(target=lambda: seen.append(other.generate(ids, max_new_tokens=3)))
            thread.start()
            thread.join()
        assert torch.equal(seen[0], net.generate(ids, max_new_tokens=3))
