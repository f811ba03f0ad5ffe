"""Every property of eas_kit on every family of models: one test a property, one row of `families.FAMILIES` a family.

All models are random and tiny, their adapters stirred, skipped and kept ones at work. What a family cannot do is said
in its row (`lacks`) and checked on transformers' own model before a test is skipped for it.
`benchmarks/conformance.py` makes a table of the results.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import pytest
import torch
from families import FAMILIES, VIDEO, Family, Row, collate, make_rows
from torch import Tensor, nn
from toys import snapshot, stir
from transformers import StaticCache

import eas_kit as eas
from eas_kit.errors import MergeError, PromptError, UnsupportedModelError

NEW = 6  # tokens generated
PROMPTS = ((7, 0), (5, 0), (11, 0))  # lengths, without the images
EXAMPLES = ((7, 3), (5, 2), (11, 5))  # prompts and answers
IMAGES = (True, False, True)
CLOSE = 3e-5  # share of the logits' scale that the order of float32 additions may change


def rows(*, refused: bool) -> list[Any]:
    """The families that are, or are not, to be refused, as parameters of a test."""
    return [pytest.param(family, id=family.name) for family in FAMILIES if (family.expect == "refused") == refused]


def attach(base: nn.Module, **config: Any) -> eas.EASModel:
    net = eas.attach(base, eas.EASConfig(**{"skip_rank": 6, "adapt_rank": 4, "dropout": 0.0} | config))
    stir(net.adapters)
    return net


class Subject:
    """A family's model with adapters, and inputs for it; made once for all its tests."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._greedy: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def net(self) -> eas.EASModel:
        net = attach(self.family.build())
        assert net.num_sites == self.family.sites
        return net

    def masked(self, mask: tuple[int, ...]) -> eas.EASModel:
        self.net.mask = mask
        return self.net

    @cached_property
    def masks(self) -> list[tuple[int, ...]]:
        """None, the first, the last, a random one, all but one."""
        n, draw = self.family.sites, random.Random(self.family.name)
        some = tuple(sorted(draw.sample(range(n), n // 2)))
        keep = draw.randrange(n)
        return list(dict.fromkeys([(), (0,), (n - 1,), some, tuple(i for i in range(n) if i != keep)]))

    @property
    def hard_masks(self) -> list[tuple[int, ...]]:
        """Those that skip most, where every mask would take long."""
        return self.masks[-2:]

    def merges(self, mask: tuple[int, ...]) -> bool:
        return self.family.kept_merge and not set(mask) & set(self.family.unmergeable)

    @cached_property
    def rows(self) -> list[Row]:
        return make_rows(self.family, PROMPTS, IMAGES, seed=0)

    @cached_property
    def prompts(self) -> dict[str, Tensor]:
        return collate(self.family, self.rows, side="left", labels=False)

    @cached_property
    def alone(self) -> list[dict[str, Tensor]]:
        return [collate(self.family, [row], side="left", labels=False) for row in self.rows]

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        """Labelled and right-padded, as for training."""
        return collate(self.family, make_rows(self.family, EXAMPLES, IMAGES, seed=1), side="right", labels=True)

    @cached_property
    def repeating(self) -> dict[str, Tensor]:
        """One prompt that says everything twice, for those who look drafts up in it."""
        (row,) = make_rows(self.family, ((7, 0),), (True,), seed=2)
        text = row.tokens[-6:]
        return collate(self.family, [replace(row, tokens=[*row.tokens, *text, *text[:3]])], side="left", labels=False)

    def greedy(self, mask: tuple[int, ...]) -> Tensor:
        """(3, NEW): what the prompts, in one batch, are continued with on an ordinary KV cache."""
        if mask not in self._greedy:
            self._greedy[mask] = generate(self.masked(mask), self.prompts)
        return self._greedy[mask]

    def skip_if_lacking(self, name: str, check: Callable[[nn.Module], None]) -> None:
        """Skips where transformers' own model fails `check`; fails if the row says so and it does not."""
        if name in self.family.lacks:
            with pytest.raises((AssertionError, ValueError, RuntimeError, NotImplementedError)):
                check(self.family.build())
            pytest.skip(f"transformers' own model has not got this: {self.family.lacks[name]}")


@pytest.fixture(scope="module", params=rows(refused=False))
def subject(request):
    return Subject(request.param)


@pytest.fixture
def outcome(record_property):
    """Says more than "passed" in the table: what was refused, and why."""
    return lambda text: record_property("outcome", text)


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """The new tokens, (B, NEW), greedy if nothing else is said."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    with torch.no_grad():
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def logits(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


def assert_close(seen: Tensor, expected: Tensor, what: Any = "", share: float = CLOSE) -> None:
    difference, scale = (seen - expected).abs().max(), expected.abs().max()
    assert difference <= share * scale, f"{what}: off by {difference:.1e}, scale {scale:.1e}"


def count_forwards(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `run` returns, and how many positions each forward of the model was for."""
    lengths: list[int] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = kwargs.get("input_ids")
        lengths.append((tokens if tokens is not None else kwargs["inputs_embeds"]).shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return run(), lengths
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------------- sites


def test_describe(subject):
    table = eas.describe(subject.family.build())
    sites = table[table.site.notna() & (table.site != "")]
    assert len(sites) == subject.family.sites
    for site, mergeable, reason in zip(sites.site, sites.mergeable, sites.reason, strict=True):
        wanted = int(site) not in subject.family.unmergeable
        assert (bool(mergeable), reason == "") == (wanted, wanted), f"site {site}: {reason}"
        assert wanted or subject.family.says in reason
    rest = table.drop(sites.index)
    assert (subject.family.expect == "hybrid") == (len(rest) > 0)
    assert all(rest.reason)  # what is left out says why


@pytest.mark.parametrize("family", rows(refused=True))
def test_refused_by_name(family, outcome):
    model = family.build()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=family.says) as error:
        eas.attach(model, eas.EASConfig(skip_rank=6, adapt_rank=4))
    assert snapshot(model) == before
    outcome(f"refused: {error.value}")


# ------------------------------------------------------------------------------------------- the adapters at work


def test_adapters_matter(subject):
    """Control: what is compared below depends on the adapters, on what is skipped, and on the images."""
    base = subject.family.build()
    dense = logits(base, subject.batch)
    with torch.no_grad():
        new = eas.attach(base, eas.EASConfig(skip_rank=6, adapt_rank=4))
        assert torch.equal(logits(new, subject.batch), dense)  # adapters that are new change nothing
    seen = {mask: logits(subject.masked(mask), subject.batch) for mask in subject.masks}
    far = 0.01 * dense.abs().max()
    keep = subject.batch["attention_mask"].bool()
    assert (seen[()] - dense)[keep].abs().max() > far
    for mask in subject.masks:
        assert all((seen[mask] - seen[other])[keep].abs().max() > far for other in subject.masks if other != mask)
        assert torch.equal(logits(subject.masked(mask), subject.batch), seen[mask])  # and back again
    if subject.family.image:
        negative = subject.batch | {"pixel_values": -subject.batch["pixel_values"]}
        assert (logits(subject.net, negative) - logits(subject.net, subject.batch)).abs().max() > far


def gain_and_bias(norm: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """g and b2 of any norm, seen from outside: on vectors of +1 and -1 it does nothing but g * v + b2."""
    v = torch.tensor([1.0, -1.0]).repeat(width // 2)
    up, down = norm(v[None]), norm(-v[None])
    return v * (up - down)[0] / 2, (up + down)[0] / 2


def by_hooks(subject: Subject, mask: tuple[int, ...]) -> Tensor:
    """Logits of the stock model, made by hooks to compute x + FFN(g * PIA(LN1 x) + b2) and adapted attentions."""
    base, net, batch = subject.family.build(), subject.net, subject.batch
    prompt = batch["attention_mask"].bool() & ((batch["labels"] != -100).cumsum(1) == 0)
    for site in net.sites:
        layer, names, adapters = base.get_submodule(site.layer_path), site.names, net.adapters[str(site.index)]
        seen: dict[str, Tensor] = {}

        def adapt(module, args, kwargs, pia=adapters["keep"]):
            if args:
                return (pia(args[0], prompt), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": pia(kwargs["hidden_states"], prompt)}

        def note(module, args, kwargs, output, seen=seen):
            seen["n"] = args[0] if args else kwargs["hidden_states"]
            return torch.zeros_like(output) if torch.is_tensor(output) else (torch.zeros_like(output[0]), *output[1:])

        def replaced(module, args, seen=seen, pia=adapters["skip"], layer=layer, names=names):
            y = pia(seen["n"], prompt)
            if names.norm_ffn is not None:
                gain, bias = gain_and_bias(getattr(layer, names.norm_ffn), y.shape[-1])
                y = gain * y + bias
            return (y, *args[1:])

        attention, ffn = getattr(layer, names.attention), getattr(layer, names.ffn)
        if site.index in mask:
            attention.register_forward_hook(note, with_kwargs=True)
            ffn.register_forward_pre_hook(replaced)
        else:
            attention.register_forward_pre_hook(adapt, with_kwargs=True)
    return logits(base, batch, use_cache=False)


def test_formula(subject):
    """The logits are those of the formula, put together independently."""
    for mask in subject.masks:
        keep = subject.batch["attention_mask"].bool()
        expected = by_hooks(subject, mask)[keep]
        # the gain is read off through the norm, to 1e-7, of which a gated delta rule (Qwen3-Next) makes 5e-5
        assert_close(logits(subject.masked(mask), subject.batch)[keep], expected, mask, share=1e-4)


def test_no_leak(subject):
    """Changing an answer token after position t changes no logit at or before t; nor does what pads a row."""
    changed = {key: value.clone() for key, value in subject.batch.items()}
    places = []
    for row, labels in enumerate(changed["labels"]):
        place = int((labels != -100).nonzero()[-1])
        changed["input_ids"][row, place] = labels[place] = 3 + (int(labels[place]) + 1) % 50
        places.append(place)
    blank = subject.batch["attention_mask"] == 0
    padded = subject.batch | {"input_ids": subject.batch["input_ids"].masked_fill(blank, VIDEO - 1)}
    for mask in subject.masks:
        net = subject.masked(mask)
        before, after = logits(net, subject.batch), logits(net, changed)
        for row, place in enumerate(places):
            assert_close(after[row, :place], before[row, :place], mask)
            assert not torch.allclose(after[row, place], before[row, place], rtol=0.01)
        assert_close(logits(net, padded)[~blank], before[~blank], mask)


# --------------------------------------------------------------------------------------------- ways to decode


def test_uncached(subject):
    """Greedy decoding with a KV cache = without, where every step reads prompt and answer again."""
    for mask in subject.masks:
        seen = generate(subject.masked(mask), subject.prompts, use_cache=False)
        assert torch.equal(seen, subject.greedy(mask)), mask


def test_teacher_forcing(subject):
    """The logits of generate are those of a labelled forward over prompt and answer, which training uses."""
    for mask in subject.masks:
        net = subject.masked(mask)
        for row, inputs in zip(subject.rows, subject.alone, strict=True):
            with torch.no_grad():
                out = net.generate(
                    **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
                )
            new = out.sequences[0, -NEW:].tolist()
            whole = replace(row, tokens=row.tokens + new, answer=NEW)
            forced = logits(net, collate(subject.family, [whole], side="right", labels=True))
            assert_close(torch.stack(out.logits, 1), forced[:, -NEW - 1 : -1], mask)


def test_static_cache(subject):
    for mask in subject.masks:
        seen = generate(subject.masked(mask), subject.prompts, cache_implementation="static")
        assert torch.equal(seen, subject.greedy(mask)), mask


def test_one_static_cache_in_turn(subject):
    """The user's own static cache, emptied between masks."""
    longest = subject.prompts["input_ids"].shape[1] + NEW
    cache = StaticCache(config=subject.net.base.config.get_text_config(), max_cache_len=longest)
    for mask in [*subject.masks, ()]:
        cache.reset()
        seen = generate(subject.masked(mask), subject.prompts, past_key_values=cache)
        assert torch.equal(seen, subject.greedy(mask)), mask


def test_single_example(subject):
    """A row of a left-padded batch, some rows with an image and some without = that example alone."""
    for mask in subject.masks:
        net = subject.masked(mask)
        for row, inputs in enumerate(subject.alone):
            assert torch.equal(generate(net, inputs)[0], subject.greedy(mask)[row]), (mask, row)


def test_beams(subject):
    for mask in subject.hard_masks:
        net = subject.masked(mask)
        beams = generate(net, subject.prompts, num_beams=3)
        assert torch.equal(beams, generate(net, subject.prompts, num_beams=3, use_cache=False)), mask
        for row, inputs in enumerate(subject.alone):
            assert torch.equal(generate(net, inputs, num_beams=3)[0], beams[row]), (mask, row)


def test_prompt_lookup(subject):
    """The first forward holds drafted tokens already, which are not prompt."""
    inputs, longer = subject.repeating, {"max_new_tokens": 2 * NEW}

    def check(model: Any) -> None:
        base = getattr(model, "base", model)
        drafted, lengths = count_forwards(base, lambda: generate(model, inputs, prompt_lookup_num_tokens=3, **longer))
        assert lengths[0] > inputs["input_ids"].shape[1]  # the trap is there
        assert torch.equal(drafted, generate(model, inputs, **longer)), getattr(model, "mask", "without adapters")

    subject.skip_if_lacking("drafts", check)
    for mask in subject.hard_masks:
        check(subject.masked(mask))


def test_assisted(subject):
    """An assistant with the same adapters, whose drafts are taken, and one without, whose drafts are mostly not."""

    def assisted(model: Any, inputs: dict[str, Tensor], assistant: nn.Module) -> Tensor:
        config = assistant.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = 3, "constant"
        config.assistant_confidence_threshold = 0.0
        return generate(model, inputs, assistant_model=assistant)

    with_image = subject.alone[0]
    text = collate(subject.family, make_rows(subject.family, ((7, 0),), (False,), seed=3), side="left", labels=False)

    def check(base: nn.Module) -> None:
        assert torch.equal(assisted(base, with_image, subject.family.build()), generate(base, with_image))

    subject.skip_if_lacking("drafts", check)
    for mask in subject.hard_masks:
        net = subject.masked(mask)
        seen = assisted(net, with_image, subject.family.build())
        assert torch.equal(seen, generate(net, with_image)), mask
        # transformers drafts no right word about an image, so here the prompt is text
        twin = copy.deepcopy(net).base
        seen, lengths = count_forwards(net.base, lambda net=net, twin=twin: assisted(net, text, twin))
        assert torch.equal(seen, generate(net, text)), mask
        assert len(lengths) == 2, mask  # drafts were taken


# --------------------------------------------------------------------------------------------------------- merge


def test_merge(subject, outcome):
    """Folded for one prompt, with an image where the family has them: the same tokens, the same logits."""
    inputs, refused = subject.alone[0], None
    for mask in subject.masks:
        net = subject.masked(mask)
        if not subject.merges(mask):
            with pytest.raises(MergeError, match=subject.family.says) as refused:
                eas.check_merge(net, inputs)
            before = logits(net, inputs)
            with pytest.raises(MergeError, match=subject.family.says):
                generate(net, inputs, merge=True)
            assert torch.equal(logits(net, inputs), before)
            continue
        proof = eas.check_merge(net, inputs, max_new_tokens=NEW)
        assert proof, (mask, str(proof))
        assert proof.folded > 0
        before = logits(net, inputs)
        assert torch.equal(generate(net, inputs, merge=True)[0], subject.greedy(mask)[0]), mask
        assert torch.equal(logits(net, inputs), before)  # restored
    assert bool(subject.family.unmergeable) == (refused is not None)
    if refused is not None:
        outcome(f"refused: {refused.value}")


def test_merge_batch(subject):
    """Prompts of different lengths in one batch, some with an image: condensed row by row, whatever reads the input."""
    for mask in subject.masks:
        net = subject.masked(mask)
        before = logits(net, subject.prompts)
        assert torch.equal(generate(net, subject.prompts, merge="low_rank"), subject.greedy(mask)), mask
        assert torch.equal(logits(net, subject.prompts), before)


# ------------------------------------------------------------------------------------------------ life cycle, training


def test_detach_bit_for_bit(subject):
    base = subject.family.build()
    with torch.no_grad():  # transformers puts hooks of its own here, once
        before = base(**subject.batch, output_hidden_states=True).logits
    generate(base, subject.prompts, num_beams=2)
    state = snapshot(base)
    net = attach(base)
    for mask in subject.masks:
        net.mask = mask
        net(**subject.batch).loss.backward()
        generate(net, subject.prompts, max_new_tokens=2)
        if subject.merges(mask):
            generate(net, subject.alone[0], merge=True, max_new_tokens=2)
    assert eas.detach(net) is base
    assert snapshot(base) == state
    assert torch.equal(logits(base, subject.batch), before)


def test_hidden_states(subject):
    for mask in subject.masks:
        net = subject.masked(mask)
        with torch.no_grad():
            out = net(**subject.batch, output_hidden_states=True)
        layers = net.base.config.get_text_config().num_hidden_layers
        assert len(out.hidden_states) == layers + 1, mask
        assert torch.equal(out.logits, logits(net, subject.batch))
        assert all(not torch.equal(a, b) for a, b in zip(out.hidden_states, out.hidden_states[1:], strict=False))


def gradients(net: eas.EASModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    net.zero_grad()
    torch.manual_seed(0)  # for a dropout of the family's own
    net(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in net.adapters.named_parameters() if p.grad is not None}


def test_gradient_checkpointing(subject, outcome):
    net, refusal = subject.net.train(), subject.family.refuses.get("checkpointing")
    try:
        for mask in subject.masks:
            net.mask = mask
            plain = gradients(net, subject.batch)
            net.gradient_checkpointing_enable()
            assert net.is_gradient_checkpointing
            try:
                checkpointed = gradients(net, subject.batch)
            except PromptError as error:  # some versions of transformers pass keywords on where others do not
                assert refusal, error
                assert re.search(refusal, str(error))
                outcome(f"refused: {error}")
                continue
            finally:
                net.gradient_checkpointing_disable()
            assert plain.keys() == checkpointed.keys()
            used = {".".join(name.split(".")[:2]) for name in plain}
            assert used == set(net.active_adapters())
            for name, gradient in plain.items():
                torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)
            assert all(gradient.abs().max() > 0 for name, gradient in plain.items() if "up_" in name), mask
    finally:
        net.zero_grad()
        net.eval()


def test_save_and_load(subject, tmp_path):
    net = subject.masked(subject.hard_masks[0])
    net.save_pretrained(tmp_path / "adapters")
    again = eas.load(tmp_path / "adapters", base=subject.family.build())
    assert again.mask == net.mask
    assert torch.equal(logits(again, subject.batch), logits(net, subject.batch))


# ------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_5_vl"])
def test_half_precision(name, dtype):
    """Merged is as close to float32 as unmerged is, over the same tokens."""
    family = next(family for family in FAMILIES if family.name == name)
    exact, half = attach(family.build()), attach(family.build().to(dtype))
    exact.mask = half.mask = (0, 2)
    errors = {False: 0.0, True: 0.0}
    for seed in range(8):
        (row,) = make_rows(family, ((11, NEW),), (True,), seed)
        split = len(row.tokens) - NEW
        prompt = collate(family, [replace(row, tokens=row.tokens[:split], answer=0)], side="left", labels=False)
        answer = torch.tensor([row.tokens[split:]])
        expected = decode(exact, prompt, answer, merge=False)
        prompt = {key: value.to(dtype) if value.is_floating_point() else value for key, value in prompt.items()}
        for merge in errors:
            seen = decode(half, prompt, answer, merge=merge)
            errors[merge] += float((seen.double() - expected.double()).pow(2).mean().sqrt())
    assert 0 < errors[True] <= 1.5 * errors[False]


def decode(net: eas.EASModel, prompt: dict[str, Tensor], answer: Tensor, *, merge: bool) -> Tensor:
    """Logits (1, NEW, vocab) of the positions of an answer, fed token by token after the prompt."""

    class Follow:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            forced = torch.full_like(scores, -torch.inf)
            forced[:, answer[0, input_ids.shape[1] - prompt["input_ids"].shape[1]]] = 0
            return forced

    options = {"output_logits": True, "return_dict_in_generate": True, "logits_processor": [Follow()]}
    with torch.no_grad():
        out = net.generate(**prompt, merge=merge, max_new_tokens=NEW, do_sample=False, **options)
    return torch.stack(out.logits[1:], 1)  # the first token's are of the prefill, which is not merged


def test_every_row_says_what_it_expects():
    assert {family.expect for family in FAMILIES} == {"plain", "tail", "variant", "hybrid", "moe", "refused"}
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert bool(family.says) == (family.expect == "refused" or bool(family.unmergeable)), family.name
        assert family.expect != "moe" or family.unmergeable, family.name
