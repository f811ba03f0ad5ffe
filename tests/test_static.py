"""The static merge is the averaged model exactly; what averaging costs is measured; exports compute the same."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from nas_reader import NasModel
from test_prompt import make_net
from toys import LAYERS, ToyTask, make_batch, make_llama, make_llava, make_prompts, snapshot, stir, text_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GemmaConfig,
    GemmaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from eas_kit.config import EASConfig
from eas_kit.errors import ConfigError, MergeError, UnsupportedModelError
from eas_kit.export import read_report
from eas_kit.model import attach
from eas_kit.pia import PIA
from eas_kit.static import static_merge

MASKS = [(), (0,), (1, 3), (0, 1, 2, 4)]
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def make_static(mask=(1, 3), model=None, images=True, **options):
    net = make_net(mask, model=model or make_llava(), **options.pop("config", {}))
    options = {"num_examples": 11, "score_on": None, "batch_size": 4} | options
    return net, static_merge(net, ToyTask(images=images), **options)


class TestAveraged:
    @pytest.mark.parametrize("mask", MASKS)
    def test_is_the_model_with_averaged_routes(self, mask, monkeypatch):
        """Reference: the unmerged adapters, each made to take the mean of the routes it took prompt by prompt."""
        net, static = make_static(mask)
        task, batch = ToyTask(), make_batch()
        plain = PIA.route
        seen: dict[int, list] = {}

        def noting(pia, mean):
            route = plain(pia, mean)
            seen.setdefault(id(pia), []).append(route)
            return route

        import random

        chosen = random.Random(0).sample(range(len(task.train)), 11)
        monkeypatch.setattr(PIA, "route", noting)
        for number in chosen:
            net.prefill(**task.collate([task.train[number]], answers=False))
        averaged = {
            key: (torch.cat([r.weights for r in routes]).mean(0), [r.pooled for r in routes])
            for key, routes in seen.items()
        }

        def fixed(pia, mean):
            weights, pooled = averaged[id(pia)]
            pooled = None if pooled[0] is None else torch.cat(pooled).mean(0).expand(len(mean), -1)
            return plain(pia, mean)._replace(weights=weights.expand(len(mean), -1), pooled=pooled)

        with torch.no_grad():
            monkeypatch.setattr(PIA, "route", plain)
            exact = net(**batch).logits
            monkeypatch.setattr(PIA, "route", fixed)
            expected = net(**batch).logits
            with static:
                assert net.is_merged
                torch.testing.assert_close(net(**batch).logits, expected, **CLOSE)
        assert (expected - exact).abs().max() > 1e-2  # averaging does something

    @pytest.mark.parametrize("mask", MASKS)
    def test_any_way_of_generating(self, mask):
        """It is causal again: any cache, any batch, a prefill in chunks, a chat that grows."""
        net, static = make_static(mask)
        prompts, options = make_prompts(), {"max_new_tokens": 6, "do_sample": False}
        with static:
            expected = net.generate(**prompts, **options)
            for more in ({"use_cache": False}, {"cache_implementation": "static"}):
                assert torch.equal(net.generate(**prompts, **options, **more), expected)
            text = {"input_ids": torch.arange(3, 14)[None]}
            whole = net.generate(**text, **options)
            assert torch.equal(net.generate(**text, **options, prefill_chunk_size=4), whole)
            first = net.generate(**text, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
            again = net.generate(input_ids=first.sequences, past_key_values=first.past_key_values, max_new_tokens=4)
            assert torch.equal(again, whole)

    def test_restored_and_guarded(self, tmp_path):
        net, static = make_static((0, 2))
        greedy = net.generate(**make_prompts(), max_new_tokens=3)
        before = snapshot(net)
        with static:
            for action in (
                lambda: setattr(net, "mask", (1,)),
                lambda: net.save_pretrained(tmp_path / "x"),
                lambda: net.detach(),
                lambda: static.__enter__(),
                lambda: static.export(tmp_path / "y"),
                lambda: static_merge(net, ToyTask()),
                lambda: net.generate(**make_prompts(), merge=True),
            ):
                with pytest.raises(MergeError, match="the adapters are folded away; leave the block"):
                    action()
        after = snapshot(net)
        assert after["values"] == before["values"]
        assert after["modules"] == before["modules"]
        assert torch.equal(net.generate(**make_prompts(), max_new_tokens=3), greedy)
        net.mask = (1,)
        with pytest.raises(MergeError, match=r"made for mask \[0, 2\], the net's is \[1\] now"), static:
            pass
        with pytest.raises(MergeError, match=r"made for mask \[0, 2\], the net's is \[1\] now; set it back"):
            static.export(tmp_path / "z")

    def test_adapters_that_changed_need_another(self, tmp_path):
        net, static = make_static((1, 3))
        before = [parameter.detach().clone() for parameter in net.adapters.parameters()]
        stir(net.adapters["0"]["skip"], seed=9)  # not at work under this mask: nothing that was averaged
        with static:
            pass
        with torch.no_grad():
            net.adapters["2"]["keep"].up_1.bias[7] += 1e-3
        for use in (static.__enter__, lambda: next(static.folded()), lambda: static.export(tmp_path / "x")):
            with pytest.raises(MergeError, match="the adapters have changed since.*make another with static_merge"):
                use()
        assert not net.is_merged
        assert not (tmp_path / "x").exists()
        for parameter, value in zip(net.adapters.parameters(), before, strict=True):
            parameter.data = value
        with static:
            assert net.is_merged

    def test_a_cache_of_the_unmerged_net_is_refused(self):
        """Its entries know a prompt that the averaged weights do not."""
        net, static = make_static((1, 3))
        prompts, token = make_prompts(), torch.tensor([[5], [7], [11]])
        exact = net.prefill(**prompts).past_key_values
        with static, torch.no_grad():
            with pytest.raises(MergeError, match="filled by the unmerged net.*prefill again inside of this block"):
                net(input_ids=token, past_key_values=exact)
            with pytest.raises(MergeError, match="filled by the unmerged net"):
                net.generate(**prompts, past_key_values=exact, max_new_tokens=2)
            own = net.prefill(**prompts).past_key_values
            assert net(input_ids=token, past_key_values=own).logits.isfinite().all()
            exact.reset()  # knows no prompt any more
            assert torch.equal(
                net.generate(**prompts, past_key_values=exact, max_new_tokens=3),
                net.generate(**prompts, max_new_tokens=3),
            )

    def test_refused(self):
        net = make_net((0, 2))
        with pytest.raises(ConfigError, match="wanted one prompt or more, got num_examples=0 of 48"):
            static_merge(net, ToyTask(), num_examples=0)
        net.base.model.language_model.layers[2].mlp.up_proj.__class__ = type("Quantised", (torch.nn.Linear,), {})
        with pytest.raises(MergeError, match="cannot merge site 2 .*Quantised, not a plain nn.Linear"):
            static_merge(net, ToyTask())


class TestReport:
    def test_one_prompt_costs_nothing(self):
        task = ToyTask({"train": 1, "val": 24})
        task.val[:] = [task.train[0]] * 3
        net = make_net((1, 3))
        static = static_merge(net, task)
        report = static.report
        assert report["mean_logit_change"] < report["max_logit_change"] < 1e-5
        assert abs(report["kl"]) < 1e-6
        assert report["same_token"] == 1
        assert report["loss"] == pytest.approx(report["loss_static"], abs=1e-5)
        assert static.calibration == {"split": "train", "count": 1, "seed": 0, "router_spread": 0.0}

    def test_several_prompts_cost_what_is_counted(self):
        """Against plain loops, one example at a time."""
        net, task = make_net((1, 3)), ToyTask()
        static = static_merge(net, task, num_examples=11, num_scored=7, batch_size=3)
        report = static.report
        kl, same, change, scale, positions = 0.0, 0, [], 0.0, 0
        for example in task.val[:7]:
            batch = task.collate([example])
            with torch.no_grad():
                before = net(**batch).logits[0].double()
                with static:
                    after = net(**batch).logits[0].double()
            for position in range(batch["labels"].shape[1] - 1):
                if batch["labels"][0, position + 1] != -100:
                    p, q = before[position].softmax(0), after[position].softmax(0)
                    kl += float((p * (p / q).log()).sum())
                    same += int(before[position].argmax() == after[position].argmax())
                    change.append((before[position] - after[position]).abs())
                    scale = max(scale, float(before[position].abs().max()))
                    positions += 1
        assert report["count"] == 7
        assert report["kl"] == pytest.approx(kl / positions, rel=1e-3)
        assert report["same_token"] == pytest.approx(same / positions)
        assert report["mean_logit_change"] == pytest.approx(float(torch.stack(change).mean()) / scale, rel=1e-3)
        assert report["max_logit_change"] == pytest.approx(float(torch.stack(change).max()) / scale, rel=1e-3)
        with static:
            assert task.evaluate(net, "val", limit=7)["accuracy"] == report["accuracy_static"]
        assert task.evaluate(net, "val", limit=7)["loss"] == pytest.approx(report["loss"])
        assert static.calibration["router_spread"] > 1e-3
        assert str(static).startswith(
            "static merge: mask [1, 3], averaged over 11 prompts of train (router weights vary"
        )
        assert "on 7 of val: accuracy" in str(static)


def stirred(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.eos_token_id = None
    return model.eval()


def sizes(**changes):
    return {key: value for key, value in text_config().to_dict().items() if key != "model_type"} | changes


def make_llava_qwen2():
    config = copy.deepcopy(make_llava().config)
    config.text_config = Qwen2Config(**sizes())
    torch.manual_seed(0)
    return stirred(LlavaForConditionalGeneration(config))


BASES = {
    "llama": make_llama,
    "llama with biases": lambda: stirred(make_llama(mlp_bias=True, attention_bias=True)),
    "llama, tied": lambda: make_llama(tie_word_embeddings=True),
    "mistral": lambda: stirred(MistralForCausalLM(MistralConfig(**sizes(sliding_window=None)))),
    "qwen2": lambda: stirred(Qwen2ForCausalLM(Qwen2Config(**sizes()))),
    "llava": make_llava,
    "llava on qwen2": make_llava_qwen2,
}


class TestExport:
    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("mask", [(1, 3), (0, 4)])
    def test_a_stock_llama_computes_the_same(self, base, mask, tmp_path):
        model = BASES[base]()
        images = hasattr(model.config, "vision_config")
        net, static = make_static(mask, model, images=images)
        folder = static.export(tmp_path / "stock")
        loader = AutoModelForImageTextToText if images else AutoModelForCausalLM
        stock = loader.from_pretrained(folder).eval()
        assert type(stock).__module__.startswith("transformers.models.llava" if images else "transformers.models.llama")
        assert stock.config.get_text_config().model_type == "llama"
        batch = make_batch(images=(True, False, True) if images else None)
        with torch.no_grad(), static:
            expected = net(**batch).logits
        with torch.no_grad():
            torch.testing.assert_close(stock(**batch).logits, expected, **CLOSE)
            assert (net(**batch).logits - expected).abs().max() > 1e-2  # it is the static one, not the exact
        decoder = stock.get_decoder()
        assert all(decoder.layers[i].self_attn.o_proj.weight.abs().max() == 0 for i in mask)
        report = read_report(folder)
        assert report["skipped"] == list(mask)
        assert report["format"] == "llama"
        assert report["calibration"]["count"] == 11

    @pytest.mark.parametrize("config", [{"source": "ffn_norm"}, {"adapt_rank": 0}])
    def test_other_settings(self, config, tmp_path):
        net, static = make_static((1, 3), make_llama(), images=False, config=config)
        stock = AutoModelForCausalLM.from_pretrained(static.export(tmp_path / "stock")).eval()
        batch = make_batch(images=None)
        with torch.no_grad(), static:
            torch.testing.assert_close(stock(**batch).logits, net(**batch).logits, **CLOSE)

    @pytest.mark.parametrize(
        ("base", "width"),  # engines are told the size of the feed-forward in one of two ways
        [*((base, 53) for base in BASES if base != "llava on qwen2"), ("llama", 256)],
    )
    @pytest.mark.filterwarnings("ignore:export. this model has")
    def test_nemotron_nas_read_independently(self, base, width, tmp_path):
        model = make_llama(intermediate_size=256) if width == 256 else BASES[base]()
        net, static = make_static((1, 3), model, images=base == "llava")
        folder = static.export(tmp_path / "nas", "nemotron-nas", language_model_only=base == "llava")
        read = NasModel(folder)
        blocks = read.config["block_configs"]
        assert [block["attention"]["no_op"] for block in blocks] == [i in (1, 3) for i in range(LAYERS)]
        assert ("ffn_mult" in blocks[0]["ffn"]) == (width == 256)
        tokens = torch.tensor([5, 17, 29, 3, 88, 61, 7])
        with torch.no_grad(), static:
            expected = net(input_ids=tokens[None]).logits[0]
        torch.testing.assert_close(read.logits(tokens), expected, **CLOSE)
        assert read.read == set(read.tensors)  # nothing that a reader would not look for
        assert not any("layers.1.self_attn" in name or "layers.1.input_layernorm" in name for name in read.tensors)

    def test_nemotron_nas_config_loads_as_engines_load_it(self, tmp_path, monkeypatch):
        """With the code beside it and attributes all the way down; and what some engines cannot read is said."""
        import transformers.dynamic_module_utils

        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        told = "heads of 14 x 2 that are not the width 38 and a feed-forward of 53, no multiple of 256; .*mlx-lm"
        _, odd = make_static((1, 3), make_llama(), images=False)
        with pytest.warns(UserWarning, match=told) as caught:
            folder = odd.export(tmp_path / "odd", "nemotron-nas")
        assert caught[0].filename == __file__
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert [block.attention.no_op for block in config.block_configs] == [i in (1, 3) for i in range(LAYERS)]
        assert config.block_configs[0].attention.n_heads_in_group == 2
        assert config.block_configs[0].ffn.intermediate_size == 53
        assert not hasattr(config.block_configs[0].ffn, "ffn_mult")  # what vLLM asks first
        assert config.architectures == ["DeciLMForCausalLM"]
        written = json.loads((folder / "config.json").read_text())
        assert config.to_dict()["block_configs"] == written["block_configs"]
        assert config.head_dim == 14
        assert config.rope_parameters == written["rope_parameters"] == odd.net.base.config.rope_parameters
        config.save_pretrained(tmp_path / "again")
        again = json.loads((tmp_path / "again" / "config.json").read_text())
        assert again["block_configs"] == written["block_configs"]
        assert again["hidden_size"] == 38

        even = make_llama(intermediate_size=256, head_dim=19 * 2, num_attention_heads=1)
        _, static = make_static((1, 3), even, images=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            static.export(tmp_path / "even", "nemotron-nas")

    def test_processor_goes_along_and_folders_are_not_overwritten(self, tmp_path):
        class Processor:
            def save_pretrained(self, folder):
                (folder / "processor.json").write_text("{}")

        _, static = make_static((1, 3), make_llama(), images=False)
        folder = static.export(tmp_path / "stock", processor=Processor())
        assert (folder / "processor.json").exists()
        with pytest.raises(ConfigError, match="wanted a new or empty folder.*pass overwrite=True"):
            static.export(folder)
        static.export(folder, overwrite=True)
        assert not (folder / "processor.json").exists()
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]

    def test_a_failed_export_leaves_all_as_it_was(self, tmp_path):
        _, static = make_static((1, 3))
        folder = static.export(tmp_path / "stock")
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(UnsupportedModelError, match="holds a language model only"):
            static.export(folder, "nemotron-nas", overwrite=True)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

        class FullDisk:
            def save_pretrained(self, folder):
                raise OSError("no space left")

        for name, overwrite in (("stock", True), ("new", False)):
            with pytest.raises(OSError, match="no space left"):
                static.export(tmp_path / name, processor=FullDisk(), overwrite=overwrite)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert [file.name for file in tmp_path.iterdir()] == ["stock"]  # nothing half written, nothing temporary

    def test_refused(self, tmp_path):
        net, static = make_static((1, 3))
        with pytest.raises(ConfigError, match=r"wanted format one of \['llama', 'nemotron-nas'\], got 'gguf'"):
            static.export(tmp_path / "x", "gguf")
        with pytest.raises(UnsupportedModelError, match="reads images, and nemotron-nas holds a language model only"):
            static.export(tmp_path / "x", "nemotron-nas")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("x")
        with pytest.raises(ConfigError, match="wanted a new or empty folder"):  # no earlier export: not ours to empty
            static.export(tmp_path / "mine", overwrite=True)
        _, first = make_static((0, 3), make_llama(), images=False)
        with pytest.raises(UnsupportedModelError, match=r"need an attention in layer 0 .*the mask skips it: \[0, 3\]"):
            first.export(tmp_path / "x", "nemotron-nas")
        for model in (
            GemmaForCausalLM(GemmaConfig(**sizes())),
            MistralForCausalLM(MistralConfig(**sizes(sliding_window=5))),
        ):
            net = attach(model.eval(), EASConfig(skip_rank=6, adapt_rank=4))
            stir(net.adapters)
            net.mask = (1, 3)
            static = static_merge(net, ToyTask(images=False), score_on=None)
            with pytest.raises(UnsupportedModelError, match="does not compute what a Llama computes"):
                static.export(tmp_path / "x")
        assert not (tmp_path / "x").exists()
