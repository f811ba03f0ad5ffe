"""The per-prompt merge: exact after real training, as cheap as said, refused where wrong, gone without a trace."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_prompt import make_net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from toys import LAYERS, WIDTH, make_batch, make_llama, make_llava, make_prompts, row_of, snapshot, text_config
from transformers import GemmaConfig, GemmaForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import eas_kit.merging
from eas_kit.config import EASConfig
from eas_kit.errors import MergeError
from eas_kit.merging import MergedLinear, condense, fold_linear, merged
from eas_kit.model import attach
from eas_kit.pia import PIA
from eas_kit.proof import check_merge
from eas_kit.seats import Seat
from eas_kit.sites import find_sites

MASKS = [(), (0,), (LAYERS - 1,), (1, 3), (0, 1, 2, 4)]


def trained(model, mask=(), steps=4, images=True, **config):
    """A net after real optimiser steps, its adapters far from where they started."""
    torch.manual_seed(3)
    net = attach(model, EASConfig(**{"skip_rank": 6, "adapt_rank": 4} | config))
    batch = make_batch(images=(True, False, True) if images else None)
    net.train()
    optimizer = torch.optim.AdamW(net.trainable_parameters(), lr=0.1)
    for step in range(steps):
        net.mask = mask if step % 2 else tuple(s for s in range(LAYERS - 1) if s not in mask)
        loss = net(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.mask = mask
    return net.eval()


def prompt(model_has_images=True):
    return make_prompts((7,), (True,) if model_has_images else None)


def greedy(net, inputs, **more):
    return net.generate(**inputs, max_new_tokens=8, do_sample=False, **more)


class TestExact:
    @pytest.mark.parametrize(
        ("mask", "source"), [*((mask, "attention_norm") for mask in MASKS), ((0,), "ffn_norm"), ((1, 3), "ffn_norm")]
    )
    def test_merged_is_unmerged_after_training(self, mask, source):
        net = trained(make_llava(), mask, source=source)
        inputs = prompt()
        with torch.no_grad():
            moved = net.prefill(**inputs).logits
            net.mask = ()
            for parameter in net.adapters.parameters():
                parameter.data, parameter.kept = torch.zeros_like(parameter), parameter.data
            assert (net.prefill(**inputs).logits - moved).abs().max() > 0.1  # the adapters do something
            for parameter in net.adapters.parameters():
                parameter.data = parameter.kept
        net.mask = mask
        proof = check_merge(net, inputs, max_new_tokens=11)
        assert proof
        assert proof.same_tokens
        assert 0 < proof.max_rel_diff <= 1e-4
        assert proof.steps == 11
        assert proof.mask == mask
        assert proof.folded == 2 * len(mask) + 3 * (LAYERS - len(mask))

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_with_any_attention_implementation(self, implementation):
        model = make_llava()
        model.set_attn_implementation(implementation)
        assert check_merge(trained(model, (0, 2)), prompt(), max_new_tokens=7)

    def test_without_adapters_at_kept_sites(self):
        net = trained(make_llama(), (0, 2), images=False, adapt_rank=0)
        proof = check_merge(net, prompt(False))
        assert proof
        assert proof.folded == 4

    @pytest.mark.parametrize("family", ["llama with biases", "qwen2", "gemma"])
    def test_other_forms_of_norm_and_linear(self, family):
        sizes = {key: value for key, value in text_config().to_dict().items() if key != "model_type"}
        torch.manual_seed(0)
        if family == "llama with biases":
            model = make_llama(mlp_bias=True, attention_bias=True)
        elif family == "qwen2":  # biases on q, k and v
            model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        else:  # gain 1 + w, tied embeddings, scaled inputs
            model = GemmaForCausalLM(GemmaConfig(**sizes))
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.generation_config.eos_token_id = None
        proof = check_merge(trained(model.eval(), (0, 2), images=False), prompt(False))
        assert proof, str(proof)

    def test_control_bias_with_the_merged_weight_is_wrong(self, monkeypatch):
        """A slip seen elsewhere: W' b + c in place of W b + c."""

        def slip(linear, factors, gain=None, shift=None):
            weight, _ = fold_linear(linear, factors, gain, shift)
            wrong = weight @ factors.bias[0]
            return weight, wrong if linear.bias is None else wrong + linear.bias

        net = trained(make_llava(), (1, 3))
        monkeypatch.setattr(eas_kit.merging, "fold_linear", slip)
        proof = check_merge(net, prompt(), max_new_tokens=4)
        assert not proof
        assert proof.max_rel_diff > 1e-3

    def test_control_a_forgotten_gain_is_wrong(self, monkeypatch):
        net = trained(make_llava(), (1, 3))
        monkeypatch.setattr(
            eas_kit.merging, "fold_linear", lambda linear, factors, gain, shift: fold_linear(linear, factors)
        )
        assert not check_merge(net, prompt(), max_new_tokens=4)

    def test_half_precision(self):
        net = trained(make_llava(), (1, 3))
        net.base.to(torch.bfloat16)
        inputs = prompt()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        proof = check_merge(net, inputs, max_new_tokens=4)
        assert proof.dtype == torch.bfloat16
        assert proof.max_rel_diff < proof.tolerance

    def test_half_precision_may_turn_tokens_that_are_nearly_level(self, monkeypatch):
        net, inputs = trained(make_llama(), (1, 3), images=False), prompt(False)
        net.base.to(torch.bfloat16)
        proof = next(
            proof
            for seed in range(20)
            if not (proof := check_merge(net, make_prompts((7,), None, seed=seed), 32)).same_tokens
        )
        assert proof.max_rel_diff <= proof.tolerance
        assert proof
        assert "merged = unmerged" in str(proof)
        assert "tokens not all identical (nearly level ones, turned by rounding)" in str(proof)
        assert not replace(proof, max_rel_diff=0.2)
        for dtype in (torch.float32, torch.float64):  # control: there it would be a fault
            assert not replace(proof, dtype=dtype, max_rel_diff=0.0)
            assert "DIFFERENT" in str(replace(proof, dtype=dtype, max_rel_diff=0.0))
        monkeypatch.setattr(
            eas_kit.merging, "fold_linear", lambda linear, factors, gain, shift: fold_linear(linear, factors)
        )
        assert not check_merge(net, inputs, 4)

    def test_the_bound_in_float64_is_one_that_generate_can_show(self, monkeypatch):
        """It hands float32 logits over: a difference of one of their roundings must not fail, more must."""
        net, inputs = trained(make_llama(), (1, 3), images=False).double(), prompt(False)
        proof = check_merge(net, inputs, 4)
        assert proof
        assert torch.finfo(torch.float32).eps < proof.tolerance < 1e-5
        whole = fold_linear

        def slip(*args):
            weight, bias = whole(*args)
            return weight * (1 + 1e-4), bias

        monkeypatch.setattr(eas_kit.merging, "fold_linear", slip)
        assert not check_merge(net, inputs, 4)

    @pytest.mark.parametrize("paths", [1, 2])
    def test_autocast_lowers_no_folded_weight(self, paths):
        torch.manual_seed(0)
        pia, linear, gain, shift = PIA(14, 6, 2, paths=paths), nn.Linear(14, 11), torch.randn(14), torch.randn(14)
        for parameter in pia.parameters():
            parameter.data = torch.randn_like(parameter)
        route = pia.route(torch.randn(1, 14))

        def all_of_it():
            condensed = condense(pia, route, gain, shift)
            return [*fold_linear(linear, pia.factors(route), gain, shift), *pia.factors(route), condensed.bias]

        with torch.no_grad():
            expected = all_of_it()
            with torch.autocast("cpu", torch.bfloat16):
                for tensor, wanted in zip(all_of_it(), expected, strict=True):
                    assert tensor.dtype == torch.float32
                    assert torch.equal(tensor, wanted)

    @pytest.mark.parametrize("merge", [True, "per_prompt", "low_rank"])
    def test_merging_under_autocast(self, merge):
        net, inputs = trained(make_llava(), (0, 2)), prompt()
        with torch.autocast("cpu", torch.bfloat16):
            proof = check_merge(net, inputs, max_new_tokens=4, form=merge)
        assert proof.max_rel_diff < 1e-1  # the bound of bfloat16, in which the linears run

    def test_fold_linear_is_the_product_of_matrices(self):
        torch.manual_seed(0)
        pia, linear, gain = PIA(14, 6, 2).double(), nn.Linear(14, 11).double(), torch.randn(14, dtype=torch.float64)
        for parameter in pia.parameters():
            parameter.data = torch.randn_like(parameter)
        mean, n = torch.randn(1, 14, dtype=torch.float64), torch.randn(5, 14, dtype=torch.float64)
        M, b = pia.fold(mean)
        weight, bias = fold_linear(linear, pia.factors(pia.route(mean)), gain)
        torch.testing.assert_close(n @ weight.T + bias, linear(gain * (n @ M[0].T + b[0])), atol=1e-12, rtol=0)

    def test_no_product_as_large_as_the_width_squared(self):
        pia, linear = PIA(62, 4, 2), nn.Linear(62, 122)
        with torch.no_grad(), FlopCounterMode(display=False) as count:
            fold_linear(linear, pia.factors(pia.route(torch.randn(1, 62))), torch.ones(62))
        assert (
            count.get_total_flops() < 5 * 2 * 122 * 62 * 4
        )  # a product with a d x d matrix alone is 2 * 122 * 62 * 62

    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
    def test_beams_of_one_prompt(self, options):
        net, inputs = trained(make_llava(), (0, 2)), prompt()
        assert torch.equal(greedy(net, inputs, merge=True, **options), greedy(net, inputs, **options))

    @pytest.mark.parametrize("rows", [1, 3])
    def test_streaming_and_stopping_pass_through(self, rows):
        """What generate takes reaches it: a streamer (one row), stopping criteria, a length, processors of logits."""
        from transformers import LogitsProcessorList, StoppingCriteriaList

        class Streamer:
            def __init__(self):
                self.tokens, self.ended = [], 0

            def put(self, value):
                self.tokens += value.flatten().tolist()

            def end(self):
                self.ended += 1

        net = trained(make_llava(), (0, 2))
        prompts = make_prompts((7, 5, 11)[:rows], (True, False, True)[:rows])
        expected = greedy(net, prompts)
        length = prompts["input_ids"].shape[1]

        def three_more(input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= length + 3)

        def never_first(input_ids, scores):
            return scores.scatter(1, expected[:, length, None], -torch.inf) if input_ids.shape[1] == length else scores

        for merge in (False, True):
            stopped = greedy(net, prompts, merge=merge, stopping_criteria=StoppingCriteriaList([three_more]))
            assert torch.equal(stopped, expected[:, : length + 3])
            other = greedy(net, prompts, merge=merge, logits_processor=LogitsProcessorList([never_first]))
            assert (other[:, length] != expected[:, length]).all()
            if rows == 1:
                streamer = Streamer()
                greedy(net, prompts, merge=merge, streamer=streamer)
                assert streamer.tokens == expected[0].tolist()
                assert streamer.ended == 1

    def test_sampling_and_padding_and_prompt_lookup(self):
        net = trained(make_llama(), (0, 2), images=False)
        ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
        inputs = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
        seen = []
        for merge in (False, True):
            torch.manual_seed(7)
            seen.append(net.generate(**inputs, merge=merge, max_new_tokens=8, do_sample=True, num_return_sequences=2))
        assert torch.equal(*seen)
        plain = {"input_ids": ids[:, 2:]}
        assert torch.equal(greedy(net, plain, merge=True, prompt_lookup_num_tokens=3), greedy(net, plain))
        assert torch.equal(greedy(net, plain, merge=True, cache_implementation="static"), greedy(net, plain))


class TestLowRank:
    """A batch of different prompts: condensed adapters, every row exact."""

    @pytest.mark.parametrize(
        ("mask", "source"), [*((mask, "attention_norm") for mask in MASKS), ((0,), "ffn_norm"), ((1, 3), "ffn_norm")]
    )
    def test_every_row_is_unmerged_after_training(self, mask, source):
        net, prompts = trained(make_llava(), mask, source=source), make_prompts()
        proof = check_merge(net, prompts, max_new_tokens=7)
        assert proof, str(proof)
        assert (proof.form, proof.prompts, proof.folded) == ("low_rank", 3, 0)
        assert 0 < proof.max_rel_diff <= 1e-5
        assert str(proof).startswith(f"merged = unmerged: 3 prompts, mask {list(mask)}, adapters condensed, 7 tokens")
        both = greedy(net, prompts, merge=True)
        length = prompts["input_ids"].shape[1]
        for row in range(3):  # the same text as alone, per prompt
            alone = row_of(prompts, row)
            assert torch.equal(greedy(net, alone, merge=True)[0, alone["input_ids"].shape[1] :], both[row, length:])

    def test_one_prompt_may_be_condensed_too(self):
        net, inputs = trained(make_llava(), (0, 2)), prompt()
        proof = check_merge(net, inputs, max_new_tokens=5, form="low_rank")
        assert proof
        assert proof.form == "low_rank"

    def test_condensed_is_gain_times_adapter_plus_shift(self):
        torch.manual_seed(0)
        for paths in (1, 2):
            pia = PIA(14, 6, 2, scale=0.7, paths=paths).double().eval()
            for parameter in pia.parameters():
                parameter.data = torch.randn_like(parameter)
            route = pia.route(torch.randn(3, 14, dtype=torch.float64))
            n, gain, shift = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 5, 14), (14,), (14,)))
            expected = pia(n, route=route) * gain + shift
            torch.testing.assert_close(condense(pia, route, gain, shift)(n), expected, atol=1e-12, rtol=0)
            torch.testing.assert_close(condense(pia, route)(n), pia(n, route=route), atol=1e-12, rtol=0)
            assert not torch.allclose(condense(pia, route, gain, shift)(n.flip(0)), expected.flip(0))  # rows differ

    @pytest.mark.parametrize(
        "options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}]
    )
    def test_ways_of_generating(self, options):
        net, prompts = trained(make_llava(), (0, 2)), make_prompts()
        assert torch.equal(greedy(net, prompts, merge=True, **options), greedy(net, prompts, **options))

    def test_rows_must_be_those_of_the_prompts(self):
        net, prompts = make_net((0, 2)), make_prompts()
        cache = net.prefill(**prompts).past_key_values
        with merged(net, cache):
            assert net._merge.form == "low_rank"
            cache.batch_select_indices(torch.tensor([0, 2]))
            with pytest.raises(
                MergeError, match="condensed for a batch of 3 rows and this forward has 2; generate with"
            ):
                net(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)

    def test_condensed_takes_on_the_type_of_what_it_reads(self):
        """Norms that are kept in float32, or autocast: n does not come in the type of the norm's weight."""
        pia = PIA(14, 6, 2).eval()
        for parameter in pia.parameters():
            parameter.data = torch.randn_like(parameter)
        route, n = pia.route(torch.randn(3, 14)), torch.randn(3, 5, 14)
        gain = torch.randn(14)
        low_rank = condense(pia, route, gain, dtype=torch.float32)
        out = low_rank(n.bfloat16())
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), pia(n, route=route) * gain, atol=0.3, rtol=0.05)

    def test_where_linears_cannot_be_rewritten(self):
        model = make_llama()
        for layer in model.model.layers:
            layer.mlp.up_proj.__class__ = type("Quantised", (nn.Linear,), {})
        net = make_net((0, 2), model=model)
        inputs = prompt(False)
        for prompts in (inputs, make_prompts(images=None)):
            expected = greedy(net, prompts)
            with pytest.raises(MergeError, match=r"cannot merge site 0 \(model.layers.0\).*Quantised"):
                net.generate(**prompts, merge=True)
            assert torch.equal(greedy(net, prompts, merge="low_rank"), expected)


class TestCompiled:
    """Static cache and torch.compile, as generate does it: one graph for all prompts."""

    def decode(self, net, prompts, **options):
        from transformers import CompileConfig

        config = CompileConfig(backend="eager", fullgraph=True)
        config._compile_all_devices = True
        return greedy(net, prompts, cache_implementation="static", compile_config=config, **options)

    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("merge", [False, True])
    def test_a_second_prompt_compiles_nothing_anew(self, rows, merge):
        net = trained(make_llava(), (0, 2))
        batches = [
            {key: value[:rows] for key, value in make_prompts((7, 7, 7), (True,) * 3, seed=seed).items()}
            for seed in (0, 1, 2)
        ]
        expected = [greedy(net, batch) for batch in batches]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        graphs = []
        for batch, text in zip(batches, expected, strict=True):
            assert torch.equal(self.decode(net, batch, merge=merge), text)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[0] >= 1
        assert graphs == graphs[:1] * 3, graphs
        assert not torch._dynamo.utils.counters["graph_break"]

    def test_folded_tensors_keep_their_place(self):
        net, places = trained(make_llava(), (0, 2)), []
        for seed in (0, 1):
            inputs = make_prompts((7,), (True,), seed=seed)
            with merged(net, net.prefill(**inputs).past_key_values):
                linear = net.base.get_submodule("model.language_model.layers.0.mlp.up_proj")
                places.append((id(linear), *(t.data_ptr() for t in linear.folded)))
        assert places[0] == places[1]
        with torch.inference_mode():  # and may be written to inside and outside of inference mode
            greedy(net, inputs, merge=True)
        greedy(net, inputs, merge=True)
        net.mask = (1,)
        assert not net._folded  # given back


class Touched(TorchDispatchMode):
    """Collects the addresses of all tensors that any operation reads or writes."""

    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self.addresses.add(value.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))

    def any_of(self, module: nn.Module) -> bool:
        return any(p.untyped_storage().data_ptr() in self.addresses for p in module.parameters())


class TestCost:
    def decode(self, net, cache, mode):
        with torch.no_grad(), mode:
            net.base(input_ids=torch.tensor([[5]]), past_key_values=cache)
        return mode

    def test_merged_decoding_touches_no_adapter_and_no_skipped_attention(self):
        net = trained(make_llava(), (0, 2))
        cache = net.prefill(**prompt()).past_key_values
        attention = {site.layer: net.base.get_submodule(site.path) for site in find_sites(net)}
        norms = [layer.post_attention_layernorm for layer in net.base.model.language_model.layers]
        seen = self.decode(net, copy.deepcopy(cache), Touched())  # control: unmerged reads adapters
        assert all(seen.any_of(pia) for pia in net.active_adapters().values())
        assert [seen.any_of(attention[i]) for i in range(LAYERS)] == [False, True, False, True, True]
        with merged(net, cache):
            seen = self.decode(net, cache, Touched())
            assert not seen.any_of(net.adapters)
            assert [seen.any_of(attention[i].o_proj) for i in range(LAYERS)] == [False, True, False, True, True]
            assert not any(seen.any_of(attention[i]) for i in (0, 2))
            assert [seen.any_of(norm) for norm in norms] == [False, True, False, True, True]
            assert not any(layer._forward_pre_hooks for layer in net.base.model.language_model.layers)

    def test_merged_decoding_costs_the_dense_model_less_the_skipped_attentions(self):
        inputs, mask = prompt(False), (0, 2)
        model = make_llama()
        with torch.no_grad():
            dense_cache = model(**inputs, use_cache=True).past_key_values
            with FlopCounterMode(display=False) as dense:
                model(input_ids=torch.tensor([[5]]), past_key_values=dense_cache)
        net = trained(model, mask, images=False)
        cache = net.prefill(**inputs).past_key_values
        unmerged = self.decode(net, copy.deepcopy(cache), FlopCounterMode(display=False)).get_total_flops()
        with merged(net, cache):
            seen = self.decode(net, cache, FlopCounterMode(display=False)).get_total_flops()
        heads, kv_heads, size, length = 2, 1, 14, inputs["input_ids"].shape[1] + 1
        attention = 2 * WIDTH * size * (2 * heads + 2 * kv_heads) + 2 * 2 * heads * size * length
        assert seen == dense.get_total_flops() - len(mask) * attention
        assert unmerged > seen

    def test_skipped_layers_keep_no_keys_or_values(self):
        net = trained(make_llava(), (0, 2))
        out = net.generate(**prompt(), merge=True, max_new_tokens=4, return_dict_in_generate=True)
        assert [entry.keys is None for entry in out.past_key_values.layers] == [True, False, True, False, False]

    def test_prefill_runs_once(self):
        net, lengths = trained(make_llava(), (0, 2)), []
        inputs = prompt()
        net.base.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        greedy(net, inputs, merge=True)
        assert lengths == [inputs["input_ids"].shape[1]] + [1] * 7


class TestRefused:
    def test_several_prompts(self):
        net, prompts = make_net((0, 2)), make_prompts()
        with pytest.raises(MergeError, match='for one prompt, but the inputs hold 3; .*merge="low_rank"'):
            net.generate(**prompts, merge="per_prompt")
        with (
            pytest.raises(MergeError, match='the cache holds different prompts.*use form "low_rank"'),
            merged(net, net.prefill(**prompts).past_key_values, "per_prompt"),
        ):
            pass
        with pytest.raises(MergeError, match="wanted merge=False, True or one of .*got 'static'"):
            net.generate(**prompts, merge="static")
        with pytest.raises(MergeError, match="merged: wanted one of .*got 'x'"):
            merged(net, net.prefill(**prompts).past_key_values, "x").__enter__()
        assert not net.is_merged

    def test_stale_merge(self):
        """A forward of another prompt with merged weights would be silently wrong."""
        net, inputs, other = make_net((0, 2)), prompt(), make_prompts((5,), (False,), seed=2)
        cache = net.prefill(**inputs).past_key_values
        step = {"input_ids": torch.tensor([[5]])}
        with merged(net, cache):
            for stale in (
                lambda: net(**other),
                lambda: net(**make_batch()),
                lambda: net(**step, past_key_values=copy.deepcopy(cache)),
                lambda: net.base(**other),
            ):
                with pytest.raises(MergeError, match="merged for one prompt and its KV cache, and this forward is for"):
                    stale()
            net(**step, past_key_values=cache)  # its own prompt goes on
            cache.reset()
            with pytest.raises(MergeError, match="merged for one prompt"):
                net(**other, past_key_values=cache)

    def test_twice_and_in_the_wrong_order(self, tmp_path):
        net, inputs = make_net((0, 2)), prompt()
        cache, other = net.prefill(**inputs).past_key_values, net.prefill(**inputs).past_key_values
        with merged(net, cache):
            for action in (
                lambda: net._start_merge(cache),
                lambda: merged(net, other).__enter__(),
                lambda: net.generate(**inputs, merge=True),
                lambda: net.generate(**inputs),
                lambda: check_merge(net, inputs),
                lambda: setattr(net, "mask", (1,)),
                lambda: net.detach(),
                lambda: net.save_pretrained(tmp_path / "x"),
            ):
                with pytest.raises(MergeError, match=r"leave the block of merged\(net, cache\) or of"):
                    action()
            assert net.is_merged
            merged_once = torch.stack(net.base.get_submodule("model.language_model.layers.0.mlp.up_proj").folded[:1])
        net._end_merge()  # ending twice is harmless
        with merged(net, cache):  # merging again, once left, gives the same weights
            again = torch.stack(net.base.get_submodule("model.language_model.layers.0.mlp.up_proj").folded[:1])
        assert torch.equal(merged_once, again)

    def test_a_cache_without_its_prompt(self):
        net, inputs = make_net((0, 2)), prompt()
        cache = net.prefill(**inputs).past_key_values
        net.mask = (0, 1)
        with pytest.raises(MergeError, match="the cache knows no prompt for site 1; prefill with this net and mask"):
            merged(net, cache).__enter__()
        with pytest.raises(MergeError, match="merge=True needs the KV cache"):
            net.generate(**inputs, merge=True, use_cache=False)
        with pytest.raises(MergeError, match="wanted max_new_tokens of 2 or more"):
            check_merge(net, inputs, max_new_tokens=1)

    def test_linears_that_are_not_plain(self):
        class Quantised(nn.Linear):
            pass

        def change(model, name, module):
            model.model.layers[2].mlp._modules[name] = module
            return make_net((0, 2), model=model)

        meta, whole = nn.Linear(WIDTH, 53, bias=False, device="meta"), nn.Linear(WIDTH, 53, bias=False)
        whole.weight = nn.Parameter(torch.zeros(53, WIDTH, dtype=torch.int8), requires_grad=False)
        for module, message in (
            (
                Quantised(WIDTH, 53, bias=False),
                "up_proj is a .*Quantised, not a plain nn.Linear.*load the model unquantised",
            ),
            (meta, "on the meta device"),
            (whole, r"LlamaMLP.up_proj.weight \(torch.int8\)"),
        ):
            model = make_llama()
            net = change(model, "up_proj", model.model.layers[2].mlp.up_proj)
            cache = net.prefill(**prompt(False)).past_key_values
            model.model.layers[2].mlp.up_proj = module
            before = snapshot(model)["modules"]
            with pytest.raises(MergeError, match=r"cannot merge site 2 \(model.layers.2\).*" + message):
                merged(net, cache).__enter__()
            assert snapshot(model)["modules"] == before
            assert not net.is_merged

    @pytest.mark.parametrize("merge", [True, "low_rank"])
    @pytest.mark.parametrize("said", ["keyword", "config", "default"])
    def test_an_assistant_of_the_first_layers(self, said, merge):
        net, inputs = trained(make_llama(), (0, 2), images=False), prompt(False)
        options = {"max_new_tokens": 8, "do_sample": False}
        if said == "keyword":
            options["assistant_early_exit"] = 3
        elif said == "config":
            options["generation_config"] = GenerationConfig(assistant_early_exit=3, max_new_tokens=8)
        else:
            net.base.generation_config.assistant_early_exit = 3
        with pytest.raises(MergeError, match=r"whole model has read the prompt.*assistant_early_exit=3.*leave out one"):
            net.generate(**inputs, merge=merge, **options)
        assert net.base.config.num_hidden_layers == LAYERS
        drafted = net.generate(**inputs, **options)
        net.base.generation_config.assistant_early_exit = None
        assert torch.equal(drafted, greedy(net, inputs))

    def test_skipped_feed_forwards(self):
        net, inputs = make_net((0, LAYERS + 1), kinds=("mha", "ffn")), prompt()
        with pytest.raises(MergeError, match=r"site 6 \(model.language_model.layers.1.mlp\) is a skipped feed-forward"):
            net.generate(**inputs, merge=True)
        net.mask = (0, 2)
        assert check_merge(net, inputs)


class TestRestored:
    @pytest.mark.parametrize("mask", MASKS)
    def test_bit_for_bit(self, mask):
        net, inputs = make_net(mask), prompt()
        expected = greedy(net, inputs)  # transformers notes some things on the model here, once
        before = snapshot(net)
        out = greedy(net, inputs, merge=True)
        assert snapshot_without_new_hooks(net) == without_hooks(before)
        assert torch.equal(expected, out)
        check_merge(net, inputs, max_new_tokens=2)
        assert snapshot_without_new_hooks(net) == without_hooks(before)

    def test_after_an_exception(self):
        class Fails:
            def __init__(self, after):
                self.after = after

            def put(self, value):
                self.after -= 1
                if self.after < 0:
                    raise KeyError("stop")

            def end(self):
                pass

        net, inputs = make_net((0, 2)), prompt()
        expected = greedy(net, inputs)
        before = snapshot(net)
        for after in (0, 1, 3):
            with pytest.raises(KeyError, match="stop"):
                greedy(net, inputs, merge=True, streamer=Fails(after))
            assert snapshot_without_new_hooks(net) == without_hooks(before)
            assert torch.equal(greedy(net, inputs), expected)
        cache = net.prefill(**inputs).past_key_values
        with pytest.raises(KeyError), merged(net, cache):
            raise KeyError
        assert torch.equal(greedy(net, inputs), expected)

    @pytest.mark.parametrize(
        ("form", "owner", "name"),
        [("per_prompt", eas_kit.merging, "place"), ("per_prompt", Seat, "merge"), ("low_rank", Seat, "merge")],
    )
    @pytest.mark.parametrize("done", [False, True])
    def test_interrupted_while_modules_are_placed(self, monkeypatch, form, owner, name, done):
        def state():  # hooks are registered anew, under other numbers
            now = snapshot(net)
            return now | {"hooks": [[len(table) for table in tables] for tables in now["hooks"]]}

        net, inputs = trained(make_llava(), (0, 2)), prompt()
        expected, before = greedy(net, inputs), state()
        calls, whole = [], getattr(owner, name)

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 3 and not done:
                raise KeyboardInterrupt
            whole(*args)
            if len(calls) == 3:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                net.generate(**inputs, merge=form, max_new_tokens=3)
        assert len(calls) == 3
        assert not net.is_merged
        assert state() == before
        assert torch.equal(greedy(net, inputs), expected)

    def test_weights_on_show_stay_the_originals(self):
        """Inside the block, too: folded weights are no parameters, so saving or counting sees the base model."""
        net, inputs = make_net((0, 2)), prompt()
        before = snapshot(net)
        with merged(net, net.prefill(**inputs).past_key_values):
            inside = snapshot(net)
            assert isinstance(net.base.get_submodule("model.language_model.layers.0.mlp.up_proj"), MergedLinear)
        assert inside["values"] == before["values"]
        assert inside["parameters"] == before["parameters"]

    def test_mode_is_restored(self):
        net = make_net((0, 2)).train()
        check_merge(net, prompt(), max_new_tokens=2)
        assert net.training
        assert all(module.training for module in net.modules())


def without_hooks(state):
    """Hooks are set anew after a merge, with new numbers: how many there are must be the same."""
    return state | {"hooks": [[len(kind) for kind in hooks] for hooks in state["hooks"]]}


def snapshot_without_new_hooks(net):
    return without_hooks(snapshot(net))


def test_proof_reads_well():
    proof = check_merge(make_net((0, 2)), prompt(), max_new_tokens=4)
    assert str(proof).startswith("merged = unmerged: mask [0, 2], 13 linears folded, 4 tokens identical, largest logit")
    assert "<table>" in proof._repr_html_()
    assert "merged = unmerged" in proof._repr_html_()
    worse = replace(proof, max_rel_diff=1e-3)
    assert not worse
    assert str(worse).startswith("MERGED DIFFERS")
    assert not replace(proof, same_tokens=False)
