"""The prompt: which positions it has, that nothing leaks, and that its state lives as the KV cache does.

Everything runs on a random LLaVA with random adapters, some sites skipped, some kept, some rows with an image.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import ClassVar

import pytest
import torch
from toys import LAYERS, PAD, make_llama, make_llava, row_of, stir
from transformers import DynamicCache, GenerationConfig, GPT2Config, GPT2LMHeadModel, StaticCache

from eas_kit.config import EASConfig
from eas_kit.errors import MergeError, PromptError
from eas_kit.model import attach
from eas_kit.prompt import PromptMean, PromptState, forward_prompt, generate_prompt

# what differs by the order of float32 additions alone (RMSNorm is float32 even in a float64 model)
CLOSE = {"atol": 3e-5, "rtol": 0}
MASKS = [(), (0,), (LAYERS - 1,), (1, 3), (0, 1, 2, 4)]


def make_net(mask=(0, 2), model=None, **config):
    net = attach(model or make_llava(), EASConfig(**{"skip_rank": 6, "adapt_rank": 4} | config))
    stir(net.adapters)
    net.mask = mask
    return net


def logits(net, batch, **more):
    with torch.no_grad():
        return net(**batch, **more).logits


class TestPromptMask:
    def test_forward(self):
        kwargs = {
            "input_ids": torch.ones(3, 5, dtype=torch.long),
            "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
            "labels": torch.tensor([[-100, -100, -100, 7, 7], [-100, 7, -100, 7, -100], [-100] * 5]),
        }
        expected = [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
        assert forward_prompt(kwargs, training=True).int().tolist() == expected
        del kwargs["labels"]
        assert torch.equal(forward_prompt(kwargs, training=False), kwargs["attention_mask"].bool())
        assert forward_prompt({"inputs_embeds": torch.ones(2, 3, 7)}, training=False).all()

    def test_generate_rows_are_repeated_and_drafts_are_not_prompt(self):
        given = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool)
        mask = generate_prompt(given, {"input_ids": torch.ones(4, 5, dtype=torch.long)})
        assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]


class TestNoLeak:
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("source", ["attention_norm", "ffn_norm"])
    def test_an_answer_token_changes_no_logit_before_it(self, make_batch, mask, source):
        net, batch = make_net(mask, source=source), make_batch()
        before = logits(net, batch)
        changed = {key: value.clone() for key, value in batch.items()}
        for row in range(len(changed["input_ids"])):
            place = int((batch["labels"][row] != -100).nonzero()[-1])  # the last answer token
            changed["input_ids"][row, place] = changed["labels"][row, place] = 3
        after = logits(net, changed)
        for row in range(len(before)):
            place = int((batch["labels"][row] != -100).nonzero()[-1])
            assert torch.equal(before[row, :place], after[row, :place])
            assert not torch.allclose(before[row, place], after[row, place])

    def test_a_prompt_token_reaches_everything_through_the_mean(self, make_batch):
        """Control: the mean is not causal, and it does enter."""
        net, batch = make_net(), make_batch()
        changed = {key: value.clone() for key, value in batch.items()}
        place = int((batch["labels"][0] != -100).nonzero()[0]) - 1  # the last prompt token
        changed["input_ids"][0, place] = 3
        assert (logits(net, batch) - logits(net, changed))[0, :place].abs().max() > 1e-3

    def test_without_labels_the_answer_leaks(self, make_batch):
        """Control: this is why scoring passes labels."""
        net, batch = make_net(), make_batch()
        bare = {key: value for key, value in batch.items() if key != "labels"}
        assert (logits(net, batch) - logits(net, bare))[0, :3].abs().max() > 1e-3
        prompt = forward_prompt(batch, training=False)
        assert torch.equal(logits(net, bare, prompt_mask=prompt), logits(net, batch))

    @pytest.mark.parametrize("mask", MASKS)
    def test_padding_on_either_side_changes_nothing(self, make_batch, mask):
        net = make_net(mask)
        right, left = make_batch(side="right"), make_batch(side="left")
        a, b = logits(net, right), logits(net, left)
        for row in range(3):
            alone = logits(net, row_of(right, row))[0]
            torch.testing.assert_close(a[row][right["attention_mask"][row].bool()], alone, **CLOSE)
            torch.testing.assert_close(b[row][left["attention_mask"][row].bool()], alone, **CLOSE)

    @pytest.mark.parametrize("kinds", [("mha",), ("ffn",), ("mha", "ffn")])
    def test_batch_is_its_examples_and_what_pads_is_free(self, make_batch, kinds):
        mask = {1: (0, 2), 2: (0, 2, LAYERS, LAYERS + 1)}[len(kinds)]
        net, batch = make_net(mask, kinds=kinds), make_batch()
        changed = dict(batch, input_ids=torch.where(batch["attention_mask"].bool(), batch["input_ids"], 3))
        keep = batch["attention_mask"].bool()
        assert torch.equal(logits(net, batch)[keep], logits(net, changed)[keep])
        for row in range(3):
            torch.testing.assert_close(logits(net, batch)[row][keep[row]], logits(net, row_of(batch, row))[0], **CLOSE)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("source", ["attention_norm", "ffn_norm"])
    def test_teacher_forcing_is_generation(self, make_prompts, mask, source):
        net, prompts = make_net(mask, source=source), make_prompts()
        out = net.generate(**prompts, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
        start = prompts["input_ids"].shape[1]
        whole = out.sequences
        labels = torch.where(torch.arange(whole.shape[1]) < start, -100, whole)
        attention = torch.cat([prompts["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
        forced = logits(
            net,
            {
                "input_ids": whole,
                "attention_mask": attention,
                "labels": labels,
                "pixel_values": prompts["pixel_values"],
            },
        )
        torch.testing.assert_close(forced[:, start - 1 : -1], torch.stack(out.logits, 1), **CLOSE)


class TestGenerate:
    """One prompt mask, many ways to decode: all agree with decoding without any cache."""

    OPTIONS: ClassVar = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "beams, all returned": {"num_beams": 3, "num_return_sequences": 3},
        "samples": {"do_sample": True, "num_return_sequences": 3},
        "beam samples": {"do_sample": True, "num_beams": 2},
    }

    @pytest.mark.parametrize("name", OPTIONS)
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_cached_is_uncached(self, make_prompts, name, implementation):
        net, prompts = make_net((0, 2, LAYERS + 1), kinds=("mha", "ffn")), make_prompts()
        net.base.set_attn_implementation(implementation)
        seen = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            seen.append(net.generate(**prompts, max_new_tokens=4, use_cache=use_cache, **self.OPTIONS[name]))
        assert torch.equal(*seen)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_batch_is_its_examples(self, make_prompts, beams):
        net, prompts = make_net(), make_prompts()
        together = net.generate(**prompts, max_new_tokens=4, num_beams=beams)[:, -4:]
        for row in range(3):
            assert torch.equal(
                net.generate(**row_of(prompts, row), max_new_tokens=4, num_beams=beams)[:, -4:], together[row : row + 1]
            )

    @pytest.mark.parametrize("mask", MASKS[1:4])
    def test_prompt_lookup_decoding(self, mask):
        """Its first forward already holds drafted tokens, which are not prompt."""
        net = make_net(mask, model=make_llama())
        ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
        lengths = []
        handle = net.base.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        drafted = net.generate(input_ids=ids, max_new_tokens=11, prompt_lookup_num_tokens=3)
        handle.remove()
        assert lengths[0] > ids.shape[1]  # the trap was there
        assert torch.equal(drafted, net.generate(input_ids=ids, max_new_tokens=11))

    @pytest.mark.parametrize("mask", MASKS[1:4])
    def test_static_cache(self, make_prompts, mask):
        net, prompts = make_net(mask), make_prompts()
        dynamic = net.generate(**prompts, max_new_tokens=4)
        assert torch.equal(net.generate(**prompts, max_new_tokens=4, cache_implementation="static"), dynamic)
        assert torch.equal(net.generate(**prompts, max_new_tokens=4, past_key_values=DynamicCache()), dynamic)

    @pytest.mark.parametrize("name", ["past_key_values", "cache"])
    def test_either_name_of_a_cache(self, make_prompts, name):
        """transformers 5.24 calls `cache` what was `past_key_values`; net takes both, whichever is installed."""
        net, prompts, cache = make_net(), make_prompts(), DynamicCache()
        expected = net.generate(**prompts, max_new_tokens=4)
        assert torch.equal(net.generate(**prompts, max_new_tokens=4, **{name: cache}), expected)
        filled = cache.get_seq_length()
        assert filled == prompts["input_ids"].shape[1] + 3
        with torch.no_grad():
            net(input_ids=torch.tensor([[5]] * 3), **{name: cache})
        assert cache.get_seq_length() == filled + 1

    def test_one_static_cache_for_prompts_and_masks_in_turn(self, make_prompts):
        net, prompts, others = make_net((0, 2)), make_prompts(), make_prompts(seed=3)
        cache = StaticCache(config=net.base.config.get_text_config(), max_cache_len=40)
        for mask, inputs in (((0, 2), prompts), ((0, 2), others), ((1, 4), prompts), ((), others)):
            net.mask = mask
            expected = net.generate(**inputs, max_new_tokens=4)
            cache.reset()
            assert torch.equal(net.generate(**inputs, max_new_tokens=4, past_key_values=cache), expected)

    def test_an_unsaid_attention_mask_is_the_one_transformers_infers(self, make_prompts):
        net, prompts = make_net(), make_prompts()
        expected = net.generate(**prompts, max_new_tokens=4)
        del prompts["attention_mask"]
        assert torch.equal(net.generate(**prompts, max_new_tokens=4), expected)
        ids = prompts.pop("input_ids")
        assert (ids == PAD).any()
        assert torch.equal(net.generate(ids, **prompts, max_new_tokens=4), expected)

    @pytest.mark.parametrize("merge", [False, True])
    def test_a_generation_config_of_ones_own_is_filled_in(self, make_prompts, merge):
        """transformers takes what it leaves open (here: which token pads) from the model's own."""
        net, prompts = make_net(), make_prompts()
        options = {"generation_config": GenerationConfig(max_new_tokens=4, do_sample=False), "merge": merge}
        expected = net.generate(**prompts, **options)
        del prompts["attention_mask"]
        assert torch.equal(net.generate(**prompts, **options), expected)
        ones = torch.ones_like(prompts["input_ids"])  # what it must not take for the mask
        assert not torch.equal(net.generate(**prompts, attention_mask=ones, **options), expected)

    @pytest.mark.parametrize("merge", [True, "low_rank"])
    def test_no_cache_by_default_and_a_generation_config_of_ones_own(self, make_prompts, merge):
        net, prompts = make_net(), make_prompts((7,), (True,))
        net.base.generation_config.use_cache = False
        config = GenerationConfig(max_new_tokens=3)
        with pytest.raises(MergeError, match="needs the KV cache"):
            net.generate(**prompts, generation_config=config, merge=merge)
        config.use_cache = True
        assert net.generate(**prompts, generation_config=config, merge=merge).shape[1] == 16 + 3

    def test_prompt_of_one_token(self):
        net = make_net(model=make_llama())
        ids = torch.tensor([[5]])
        assert torch.equal(
            net.generate(input_ids=ids, max_new_tokens=5),
            net.generate(input_ids=ids, max_new_tokens=5, use_cache=False),
        )

    def test_two_generations_in_turn_do_not_mix(self, make_prompts):
        net = make_net()
        first, second = make_prompts((7,), (True,)), make_prompts((11,), (False,), seed=1)
        expected = [net.generate(**inputs, max_new_tokens=4)[0, -4:].tolist() for inputs in (first, second)]
        caches, seen = [], []
        for inputs in (first, second):
            out = net.prefill(**inputs)
            caches.append(out.past_key_values)
            seen.append([int(out.logits[0, -1].argmax())])
        with torch.no_grad():
            for _ in range(3):
                for cache, tokens in zip(caches, seen, strict=True):
                    out = net(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=cache)
                    tokens.append(int(out.logits[0, -1].argmax()))
        assert seen == expected

    @pytest.mark.parametrize("mask", [(), (0, 2)])
    def test_a_growing_chat_on_an_old_cache_is_refused(self, mask, make_prompts):
        """The skipped layers' mean would be that of the first turn; read anew, the whole chat has another."""
        net, prompts = make_net(mask), make_prompts((7,), (True,))
        out = net.generate(**prompts, max_new_tokens=3, return_dict_in_generate=True)
        turn = torch.cat([out.sequences, torch.tensor([[11, 12, 13]])], 1)
        for merge in (False, True):
            with pytest.raises(PromptError, match=r"has read prompts of \[16\].*inputs hold \[22\].*read anew"):
                net.generate(input_ids=turn, max_new_tokens=3, past_key_values=out.past_key_values, merge=merge)

    def test_a_prefilled_prompt_goes_on(self, make_prompts):
        net, prompts = make_net(), make_prompts((7, 7, 7), (True,) * 3)
        expected = net.generate(**prompts, max_new_tokens=5, do_sample=False)
        for merge in (False, True):
            cache = net.prefill(**prompts).past_key_values
            cache.crop(-1)
            text = {key: value for key, value in prompts.items() if key != "pixel_values"}
            out = net.generate(**text, past_key_values=cache, merge=merge, max_new_tokens=5, do_sample=False)
            assert torch.equal(out, expected)

    def test_a_pad_token_inside_a_prompt(self):
        """prefill counts it, generate infers that it pads: said with both counts, and goes on with the same mask."""
        net, ids = make_net(model=make_llama()), torch.tensor([[5, 6, PAD, 7, 8, 9]])
        cache = net.prefill(input_ids=ids).past_key_values
        cache.crop(-1)
        with pytest.raises(PromptError, match=r"of \[6\] positions.*hold \[5\]. If it is the same.*attention_mask to"):
            net.generate(ids, past_key_values=cache, max_new_tokens=3)
        ones = torch.ones_like(ids)
        out = net.generate(ids, past_key_values=cache, attention_mask=ones, max_new_tokens=3)
        assert torch.equal(out, net.generate(ids, attention_mask=ones, max_new_tokens=3))


class TestPrefillPositions:
    def make(self):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=97, n_positions=64, n_embd=38, n_layer=LAYERS, n_head=2, initializer_range=0.2)
        model = GPT2LMHeadModel(config).eval()
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
        return make_net(model=model)

    def test_padded_rows_are_read_as_alone(self, make_prompts):
        """Positions that are learnt, and so absolute."""
        net, prompts = self.make(), make_prompts(images=None)
        out = net.prefill(**prompts)
        places = torch.arange(prompts["input_ids"].shape[1]).expand_as(prompts["input_ids"])
        control = net.prefill(**prompts, position_ids=places)
        for row in range(3):
            alone = net.prefill(**row_of(prompts, row))
            torch.testing.assert_close(out.logits[row], alone.logits[0], **CLOSE)
            for one, three in zip(alone.past_key_values.layers, out.past_key_values.layers, strict=True):
                for key, route in one.routes.items():
                    torch.testing.assert_close(three.routes[key].mean[row], route.mean[0], **CLOSE)
            if not prompts["attention_mask"][row].all():
                assert (control.logits[row] - alone.logits[0]).abs().max() > 1e-2
        assert torch.equal(net.prefill(**prompts, position_ids=places).logits, control.logits)  # what is given holds

    @pytest.mark.parametrize("merge", [False, True])
    @pytest.mark.parametrize("make", ["gpt2", "llama"])
    def test_generate_goes_on_with_padded_rows(self, make_prompts, make, merge):
        net, prompts = self.make() if make == "gpt2" else make_net(model=make_llama()), make_prompts(images=None)
        cache = net.prefill(**prompts).past_key_values
        cache.crop(-1)
        out = net.generate(**prompts, past_key_values=cache, merge=merge, max_new_tokens=5)
        assert torch.equal(out, net.generate(**prompts, max_new_tokens=5))

    @pytest.mark.parametrize("own", [False, True])
    def test_a_family_with_a_scheme_of_its_own(self, make_prompts, own):
        net, prompts, seen = make_net(model=make_llama()), make_prompts(images=None), []
        if own:
            net.base.model.rope_deltas = None  # as Qwen-VL keeps them
        net.base.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
        net.prefill(**prompts | {"position_ids": None})
        net.prefill(**row_of(prompts, 0) | {"position_ids": None})  # nothing is padded
        assert [positions is None for positions in seen] == [own, True]
        if not own:
            assert seen[0].tolist()[1] == [0] * 6 + list(range(5))


class TestCacheState:
    def step(self, net, cache, tokens):
        with torch.no_grad():
            return net(input_ids=tokens, past_key_values=cache).logits

    def text_prompts(self, rows=3):
        return {"input_ids": torch.randint(3, 90, (rows, 7), generator=torch.Generator().manual_seed(2))}

    def test_skipped_layers_keep_no_keys(self, make_prompts):
        net = make_net((0, 2))
        cache = net.prefill(**make_prompts()).past_key_values
        for index, entry in enumerate(cache.layers):
            assert isinstance(entry, PromptState)
            if index in (0, 2):
                assert isinstance(entry, PromptMean)
                assert entry.keys is None
                assert entry.values is None
                assert list(entry.routes) == ["skip"]
                assert entry.routes["skip"].pooled.shape == (3, 6)
            else:
                assert entry.keys.shape[:2] == (3, 1)
                assert list(entry.routes) == ["keep"]
                assert entry.routes["keep"].pooled is None
            (route,) = entry.routes.values()
            assert route.mean.shape == (3, 38)
            assert route.weights.shape == (3, 2)

    @pytest.mark.parametrize("change", ["reorder", "select", "repeat", "copy", "crop"])
    def test_state_follows_the_cache(self, change):
        net, prompts = make_net(model=make_llama()), self.text_prompts()
        cache = net.prefill(**prompts).past_key_values
        tokens = torch.tensor([[11], [22], [33]])
        plain = self.step(net, copy.deepcopy(cache), tokens)
        order = torch.tensor([2, 0, 2])
        if change == "reorder":
            cache.reorder_cache(order)
            expected, tokens = plain[order], tokens[order]
        elif change == "select":
            cache.batch_select_indices(order[:2])
            expected, tokens = plain[order[:2]], tokens[order[:2]]
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            expected, tokens = plain.repeat_interleave(2, 0), tokens.repeat_interleave(2, 0)
        elif change == "copy":
            other = copy.deepcopy(cache)
            self.step(net, other, tokens)
            assert other.layers[1].routes["keep"].mean.data_ptr() != cache.layers[1].routes["keep"].mean.data_ptr()
            expected = plain
        elif change == "crop":
            self.step(net, cache, torch.tensor([[44], [55], [66]]))
            cache.crop(-1)
            expected = plain
        torch.testing.assert_close(self.step(net, cache, tokens), expected, **CLOSE)

    @pytest.mark.parametrize("emptied", ["reset", "crop"])
    def test_an_emptied_cache_reads_the_next_prompt(self, emptied):
        net, first, second = make_net(model=make_llama()), self.text_prompts(), self.text_prompts()
        second["input_ids"] = second["input_ids"] + 1
        cache = net.prefill(**first).past_key_values
        cache.reset() if emptied == "reset" else cache.crop(-7)
        expected = net.prefill(**second).logits
        torch.testing.assert_close(net.prefill(**second, past_key_values=cache).logits, expected, **CLOSE)

    @pytest.mark.parametrize("merge", [False, True])
    @pytest.mark.parametrize("longer", [0, 4])
    @pytest.mark.parametrize("emptied", ["reset", "crop"])
    def test_generate_on_an_emptied_cache(self, emptied, longer, merge):
        """The prompt that it held is forgotten: neither folded in place of the new one, nor taken for its beginning."""
        net, ids = make_net(model=make_llama()), self.text_prompts(rows=1)["input_ids"]
        other = torch.randint(3, 90, (1, 7 + longer), generator=torch.Generator().manual_seed(5))
        expected = net.generate(other, max_new_tokens=6, do_sample=False)
        cache = net.prefill(input_ids=ids).past_key_values
        cache.reset() if emptied == "reset" else cache.crop(-7)
        options = {"past_key_values": cache, "merge": merge, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(net.generate(other, **options), expected)
        assert not torch.equal(net.generate(ids, max_new_tokens=6, do_sample=False)[:, -6:], expected[:, -6:])

    @pytest.mark.parametrize("made", ["dynamic", "static", "sliding"])
    @pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
    def test_a_cache_can_be_saved(self, how, made):
        net = make_net(model=make_llama())
        config = copy.deepcopy(net.base.config)
        if made == "sliding":
            config.sliding_window, config.layer_types = 16, ["sliding_attention"] * LAYERS
        cache = StaticCache(config=config, max_cache_len=16) if made == "static" else DynamicCache(config=config)
        cache = net.prefill(**self.text_prompts(), past_key_values=cache).past_key_values
        if how == "pickle":
            other = pickle.loads(pickle.dumps(cache))
        elif how == "torch.save":
            torch.save(cache, file := io.BytesIO())
            other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        else:
            other = copy.deepcopy(cache)
        assert [type(entry) for entry in other.layers] == [type(entry) for entry in cache.layers]
        tokens = torch.tensor([[11], [22], [33]])
        expected = self.step(net, copy.copy(cache), tokens)
        other.reorder_cache(torch.tensor([2, 1, 0]))  # it has its own state
        torch.testing.assert_close(self.step(net, other, tokens.flip(0)), expected.flip(0), **CLOSE)

    def test_stock_cache_classes_stay_as_they_were(self, make_prompts):
        from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

        make_net().prefill(**make_prompts())
        assert DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is DynamicLayer
        assert not hasattr(DynamicLayer, "_change")


class TestErrors:
    def test_training_without_labels(self, make_batch):
        net, batch = make_net(), make_batch()
        del batch["labels"]
        with pytest.raises(PromptError, match="training needs labels, to tell the prompt from the answer"):
            net.train()(**batch)

    def test_empty_prompt(self, make_batch):
        net, batch = make_net(), make_batch()
        batch["labels"] = torch.where(torch.tensor([[False], [True], [False]]), batch["input_ids"], batch["labels"])
        with pytest.raises(PromptError, match="examples \\[1\\] of the batch have an empty prompt"):
            net(**batch)
        with pytest.raises(PromptError, match="examples \\[0\\] of the batch have an empty prompt"):
            net.generate(
                input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.zeros(1, 3, dtype=torch.long)
            )

    def test_chunked_prefill(self, make_prompts):
        net, prompts = make_net(), make_prompts()
        with pytest.raises(PromptError, match="prefill_chunk_size splits the prompt"):
            net.generate(**prompts, prefill_chunk_size=4)
        config = copy.deepcopy(net.base.generation_config)
        config.prefill_chunk_size = 4
        with pytest.raises(PromptError, match="prefill_chunk_size splits the prompt"):
            net.generate(**prompts, generation_config=config)
        with pytest.raises(PromptError, match="continuous batching"):
            net.generate_batch([[1, 2]])

    def test_a_paged_cache(self, make_prompts):
        net, prompts = make_net(), make_prompts()
        with pytest.raises(PromptError, match=r'cache_implementation="paged" \(continuous batching\).*leave it out'):
            net.generate(**prompts, cache_implementation="paged", max_new_tokens=3)

    @pytest.mark.parametrize("merge", [False, True])
    @pytest.mark.parametrize("said", ["keyword", "config", "default"])
    def test_guidance(self, said, merge):
        """A second prompt, of the unconditional branch, would be run with the state of the first."""
        net, ids = make_net(model=make_llama()), torch.tensor([[5, 6, 7, 8, 9]])
        options = {"merge": merge, "max_new_tokens": 3, "do_sample": False}
        expected = net.generate(ids, **options)
        for scale in (None, 1, 1.0):
            assert torch.equal(net.generate(ids, guidance_scale=scale, **options), expected)
        if said == "keyword":
            options["guidance_scale"] = 2.0
        elif said == "config":
            options["generation_config"] = GenerationConfig(guidance_scale=2.0, max_new_tokens=3)
        else:
            net.base.generation_config.guidance_scale = 2.0
        with pytest.raises(PromptError, match=r"guidance_scale=2.0 runs the model on a second.*leave it out"):
            net.generate(ids, **options)

    def test_a_cache_filled_without_the_adapters(self, make_prompts):
        model, prompts = make_llava(), make_prompts()
        with torch.no_grad():
            cache = model(**prompts, use_cache=True).past_key_values
        net = make_net(model=model)
        with pytest.raises(PromptError, match=r"past_key_values holds 20 positions but nothing of their prompt"):
            net(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)

    @pytest.mark.parametrize(("before", "after"), [((0, 2), (0,)), ((0,), (0, 2)), ((0, 2), ())])
    @pytest.mark.parametrize("adapt_rank", [0, 4])
    def test_a_cache_filled_under_another_mask(self, make_prompts, before, after, adapt_rank):
        net = make_net(before, adapt_rank=adapt_rank)
        cache = net.prefill(**make_prompts()).past_key_values
        net.mask = after
        with pytest.raises(PromptError, match="under another mask|the mask changed since"):
            net(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)

    def test_packed_rows(self):
        net = make_net(model=make_llama())
        packed = {"input_ids": torch.arange(3, 10)[None], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}
        with pytest.raises(PromptError, match="packs several examples into one row"):
            net(**packed)

    def test_labels_in_generate_and_prefill(self, make_batch):
        net = make_net()
        with pytest.raises(PromptError, match="collate it with answers=False"):
            net.generate(**make_batch())
        with pytest.raises(PromptError, match="prefill takes prompts, without labels"):
            net.prefill(**make_batch())
        with pytest.raises(PromptError, match=r"call net.eval\(\) first"):
            net.train().prefill(input_ids=torch.ones(1, 3, dtype=torch.long))

    def test_masks_of_another_shape(self, make_batch, make_prompts):
        net, batch = make_net(), make_batch()
        with pytest.raises(PromptError, match=r"prompt_mask: wanted \(B, S\) = \(3, 25\), got \(3, 2\)"):
            net(**batch, prompt_mask=torch.ones(3, 2, dtype=torch.bool))
        four = torch.zeros(3, 1, 25, 25)
        with pytest.raises(PromptError, match="wanted a 2D attention_mask"):
            net(**dict(batch, attention_mask=four))
        with pytest.raises(PromptError, match="generate: wanted a 2D attention_mask"):
            net.generate(**dict(make_prompts(), attention_mask=four))
        with pytest.raises(PromptError, match="wanted input_ids or inputs_embeds, got neither"):
            net.generate(max_new_tokens=3)

    def test_parts_of_the_base_model(self, make_prompts):
        net, prompts = make_net(), make_prompts()
        with pytest.raises(PromptError, match="outside a forward of the whole model"):
            net.base.model(**prompts)
        with pytest.raises(PromptError, match="whole prompt in one forward"):
            net._given = torch.ones(3, 50, dtype=torch.bool)
            net(**prompts)
