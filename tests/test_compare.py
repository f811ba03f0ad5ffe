"""Baselines, the table of arms and its cache, and the stability of choices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import toys
from transformers import GPTJConfig, GPTJForCausalLM, Lfm2Config, Lfm2ForCausalLM

import eas_kit as eas
from eas_kit import cache, compare
from eas_kit.arms import CANDIDATES, CHOICES, GRIDS, LEARNING_RATES, METHODS, Arm, Plan, standard_arms
from eas_kit.baselines import bottlenecks, full_tuning, language_linears, lora, skip_layers
from eas_kit.cache import Busy, cached
from eas_kit.compare import run_arms, summary
from eas_kit.errors import ConfigError, NothingOpenedError
from eas_kit.stability import agreement, overlap, rank_correlation, score_masks

# -- baselines -----------------------------------------------------------------------------------------------------


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_full_tuning_leaves_the_vision_tower_alone():
    model, share = full_tuning(toys.make_llava())
    names = {name for name, _ in model.named_parameters()}
    tower = {name for name in names if "vision_tower" in name}
    assert trained(model) == names - tower
    assert len(tower) > 10
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert share == sum(sizes[name] for name in names - tower) / sum(sizes.values())
    without, smaller = full_tuning(toys.make_llava(), projector=False)
    assert trained(model) - trained(without) == {n for n in names if "multi_modal_projector" in n}
    assert smaller < share


def test_lora_is_in_the_language_model_only():
    model, share = lora(toys.make_llava(), rank=3)
    adapted = {name.split(".lora_")[0] for name in trained(model)}
    assert all("lora_" in name for name in trained(model))
    assert not any("vision" in name or "projector" in name for name in adapted)
    assert len(adapted) == 5 * 7
    d, f, q, kv = toys.WIDTH, 53, 28, 14
    per_layer = 3 * (2 * (d + q) + 2 * (d + kv) + 3 * (d + f))
    assert share == 5 * per_layer / sum(p.numel() for p in model.parameters())
    # The tower has layers of the same names, which a match by name would have taken.
    assert any(name.endswith("vision_tower.encoder.layers.0.self_attn.q_proj") for name, _ in model.named_modules())
    few, _ = lora(toys.make_llava(), linears=("q_proj", "v_proj"))
    assert len({name.split(".lora_")[0] for name in trained(few)}) == 10
    with pytest.raises(ConfigError, match=r"linears: wanted some of .*'down_proj'.*got \['qkv'\]"):
        language_linears(toys.make_llava(), ("qkv",))


def stirred(model, seed=3):
    """The same model with its trainable part away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def test_a_bottleneck_stands_behind_every_feed_forward():
    inputs = toys.make_prompts()
    before = toys.make_llava()(**inputs).logits
    model, share = bottlenecks(toys.make_llava(), rank=7)
    d = toys.WIDTH
    assert share == 5 * (2 * d * 7 + 7 + d) / sum(p.numel() for p in model.parameters())
    assert len(trained(model)) == 5 * 4
    assert all("language_model.layers" in name for name in trained(model))
    assert torch.equal(model(**inputs).logits, before)
    seen = []
    stack = stirred(model).model.language_model.layers
    stack[2].mlp[0].register_forward_hook(lambda module, args, output: seen.append(output))
    stack[2].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-2)
    plain, adapted = seen
    down, up = stack[2].mlp[1].down, stack[2].mlp[1].up
    hidden = plain @ down.weight.T + down.bias
    assert torch.allclose(adapted, plain + (hidden * torch.sigmoid(hidden)) @ up.weight.T + up.bias, atol=1e-5)


@torch.no_grad()
def test_skipped_layers_leave_a_shorter_model():
    inputs = toys.make_prompts(images=None)
    model, share = skip_layers(toys.make_llama(), [1, 4], rank=7)
    d = toys.WIDTH
    assert share == 2 * (2 * d * 7 + 7 + d) / sum(p.numel() for p in model.parameters())
    shorter = toys.make_llama(num_hidden_layers=3)
    kept = toys.make_llama()
    for new, old in enumerate((0, 2, 3)):
        shorter.model.layers[new].load_state_dict(kept.model.layers[old].state_dict())
    for part in ("embed_tokens", "norm"):
        getattr(shorter.model, part).load_state_dict(getattr(kept.model, part).state_dict())
    shorter.lm_head.load_state_dict(kept.lm_head.state_dict())
    assert torch.allclose(model(**inputs).logits, shorter(**inputs).logits, atol=1e-5)
    assert not torch.allclose(model(**inputs).logits, kept(**inputs).logits, atol=1e-2)
    # A layer that is gone keeps nothing in the cache, and the cache knows its length all the same.
    options = {"max_new_tokens": 7, "do_sample": False}
    expected = stirred(model).generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), expected)
    with pytest.raises(ConfigError, match=r"layer 0 must stay, as the KV cache takes its length from it"):
        skip_layers(toys.make_llama(), [0, 2])
    with pytest.raises(ConfigError, match=r"sites are numbered 0 to 4"):
        skip_layers(toys.make_llama(), [5])


def test_layers_that_return_tuples_are_refused():
    model = GPTJForCausalLM(GPTJConfig(vocab_size=17, n_embd=32, n_layer=3, n_head=2, rotary_dim=8))
    with pytest.raises(ConfigError, match=r"returns a tuple, .* take eas.attach\(model, eas.EASConfig\(kinds="):
        skip_layers(model, [2], rank=7)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_are_skipped_by_their_own_number():
    """In a hybrid they are not the numbers of the sites."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = ["full_attention", "conv", "full_attention", "conv", "conv"]
    model = Lfm2ForCausalLM(
        Lfm2Config(**sizes, vocab_size=17, num_hidden_layers=5, layer_types=kinds, pad_token_id=0, eos_token_id=None)
    )
    skip_layers(model, [4], rank=7)
    assert [type(layer).__name__ for layer in model.model.layers] == ["Lfm2DecoderLayer"] * 4 + ["LayerAdapter"]


@pytest.mark.parametrize("make", [bottlenecks, lambda model: skip_layers(model, [2])])
def test_adapters_of_a_half_precision_model_train_in_float32(make):
    model, _ = make(toys.make_llama().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(**toys.make_prompts(images=None)).logits.dtype == torch.bfloat16


# -- the cache -----------------------------------------------------------------------------------------------------


def test_a_result_is_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"value": (1, 2)}

    assert cached(tmp_path, "run", {"a": 1}, compute) == {"value": [1, 2]}
    assert cached(tmp_path, "run", {"a": 1}, compute) == {"value": [1, 2]}
    assert len(calls) == 1
    cached(tmp_path, "run", {"a": 2}, compute)
    assert len(calls) == 2
    assert len(list(tmp_path.iterdir())) == 2
    assert json.loads(next(tmp_path.iterdir()).read_text())["key"] in ({"a": 1}, {"a": 2})


def test_failures_leave_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path, "run", {}, lambda: {"value": 1 / 0})
    assert not list(tmp_path.iterdir())


def test_claims_of_living_processes_are_respected_and_of_dead_ones_taken_over(tmp_path, monkeypatch):
    cached(tmp_path, "run", {}, lambda: {"value": 1})
    path = next(tmp_path.glob("*.json"))
    claim = path.with_suffix(".claim")
    host = cache.socket.gethostname()
    path.unlink()
    claim.write_text(f"{host} {os.getppid()}")
    with pytest.raises(Busy, match=r"run-.*\.claim"):
        cached(tmp_path, "run", {}, lambda: {"value": 2})
    claim.write_text(f"elsewhere {os.getppid()}")
    with pytest.raises(Busy):
        cached(tmp_path, "run", {}, lambda: {"value": 2})
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    claim.write_text(f"{host} {dead.pid}")
    assert cached(tmp_path, "run", {}, lambda: {"value": 3}) == {"value": 3}
    assert not claim.exists()


def test_claims_left_by_a_process_of_the_same_number_or_by_none(tmp_path):
    def nested():  # a claim that this process does hold
        with pytest.raises(Busy):
            cached(tmp_path, "run", {}, lambda: {"value": 0})
        return {"value": 1}

    cached(tmp_path, "run", {}, nested)
    path = next(tmp_path.glob("*.json"))
    claim = path.with_suffix(".claim")
    path.unlink()
    claim.write_text(f"{cache.socket.gethostname()} {os.getpid()}")  # of a container before its restart
    assert cached(tmp_path, "run", {}, lambda: {"value": 2}) == {"value": 2}
    path.unlink()
    claim.touch()
    with pytest.raises(Busy):  # its maker may be about to write
        cached(tmp_path, "run", {}, lambda: {"value": 3})
    os.utime(claim, (0, 0))
    assert cached(tmp_path, "run", {}, lambda: {"value": 3}) == {"value": 3}


# -- the table -----------------------------------------------------------------------------------------------------


def test_every_method_that_trains_has_a_learning_rate_and_a_grid_around_it():
    assert set(LEARNING_RATES) == set(GRIDS) == set(METHODS) - {"zero_shot"}
    assert all(LEARNING_RATES[method] in grid and list(grid) == sorted(grid) for method, grid in GRIDS.items())


def small_plan(**changes):
    values = {
        "steps": 3,
        "train": eas.TrainConfig(batch_size=6, progress=False),
        "eas": eas.EASConfig(skip_rank=6, adapt_rank=4),
        "search": eas.SearchConfig(
            warmup_steps=1, updates=2, train_steps_per_update=1, batch_size=4, reward_batch_size=4, progress=False
        ),
        "lora": {"rank": 2},
    }
    return Plan(**values | changes)


def test_standard_arms():
    names = [arm.name for arm in standard_arms((2, 4), ("bandit", "random"))]
    head = ["zero_shot", "full", "lora", "pia"]
    assert names == [*head, "pia k=2 bandit", "pia k=2 random", "pia k=4 bandit", "pia k=4 random"]
    with pytest.raises(ConfigError, match=r"method: wanted one of .*'pia'.*got 'adapters'"):
        Arm("adapters")
    for wrong in (("lora", 2, "random"), ("pia", 2, None), ("pia", 0, "random"), ("pia", 2, "me"), ("das", 2)):
        with pytest.raises(ConfigError, match=r"only 'pia' and 'das' skip, and k above 0 goes with chosen_by"):
            Arm(*wrong)


def test_names_of_arms_tell_all_of_them_apart():
    ffn = Arm("pia", 2, "bandit", "ffn", {"skip_rank": 16, "parts": "base"})
    assert ffn.name == "pia k=2 bandit ffn parts=base skip_rank=16"
    assert ffn.file_name == "pia_k2_bandit_ffn_partsbase_skip_rank16"
    assert ffn == Arm("pia", 2, "bandit", "ffn", (("parts", "base"), ("skip_rank", 16)))
    assert Arm("lora", settings={"linears": ["q_proj", "v_proj"]}).name == "lora linears=q_proj+v_proj"
    assert Arm("das", 2, "random") == Arm("das", 2, "random", "layer")
    arms = [Arm(method) for method in METHODS]
    arms += [Arm("pia", 2, choice, wanted) for choice in ("bandit", "random") for wanted in CANDIDATES]
    arms += [Arm("das", 2, "bandit"), ffn, Arm("mam", settings={"rank": 8}), Arm("mam", settings={"rank": 16})]
    assert len({arm.name for arm in arms}) == len({arm.file_name for arm in arms}) == len(set(arms)) == len(arms)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"method": "pia", "candidates": "mlp"}, r"candidates: wanted one of .*'mha\+ffn'.*got 'mlp'"),
        ({"method": "lora", "candidates": "ffn"}, "'lora' skips nothing, so candidates='ffn' says nothing"),
        ({"method": "pia", "k": 2, "chosen_by": "scorer", "candidates": "mha+ffn"}, "scorers rank sites of one kind"),
        ({"method": "pia", "settings": {"ranks": 3}}, r"settings of 'pia': wanted some of .*'skip_rank'.*\['ranks'\]"),
        (
            {"method": "mam", "settings": {"model": 3}},
            r"settings of 'mam': wanted some of .*'tokens'\], got \['model'\]",
        ),
        ({"method": "zero_shot", "settings": {"rank": 3}}, r"wanted some of \[\], got \['rank'\]"),
        ({"method": "lora", "settings": {"linears": {"q"}}}, "wanted a dict of plain values"),
        ({"method": "lora", "settings": 3}, "wanted a dict of plain values"),
    ],
)
def test_arms_that_make_no_sense(wrong, says):
    with pytest.raises(ConfigError, match=says):
        Arm(**wrong)


def test_settings_are_tried_before_anything_runs(toy_task, tmp_path):
    made = []
    with pytest.raises(ConfigError, match=r"EASConfig.skip_rank: wanted .* divisible by groups=2, got 5"):
        run_arms(toy_task, lambda: made.append(1), [Arm("zero_shot"), Arm("pia", settings={"skip_rank": 5})])
    assert not made


def test_what_an_arm_is_kept_by():
    """The keys of files that were written before there were other methods than four: they must be found again."""
    plan = Plan(lora={"rank": 2})
    assert Arm("pia", 4, "bandit").key() == {"method": "pia", "k": 4, "chosen_by": "bandit"}
    found = plan.key(Arm("pia", 4, "bandit"))
    assert set(found) == {"steps", "train", "evaluate", "eas", "search", "tune_on"}
    assert set(found["eas"]) == {
        *("skip_rank", "adapt_rank", "groups", "scale", "temperature", "dropout", "kinds", "source"),
    }
    assert set(found["search"]) - set(found["train"]) == {
        *("num_skipped", "num_subnetworks", "warmup_steps", "updates", "train_steps_per_update", "preference_lr"),
        *("reward", "candidates", "reward_batch_size", "learning_rate", "seed"),
    }
    assert plan.key(Arm("lora"))["lora"] == {"rank": 2}
    assert set(plan.key(Arm("full"))) == {"steps", "train", "evaluate"}
    assert plan.key(Arm("zero_shot")) == {"zero_shot": {}}
    # what is new is in the key as soon as it is used
    assert plan.key(Arm("pia", settings={"parts": "base"}))["eas"]["parts"] == "base"
    assert plan.key(Arm("prefix")) == plan.key(Arm("full"))
    assert Plan(methods={"prefix": {"tokens": 3}}).key(Arm("prefix"))["settings"] == {"tokens": 3}
    assert plan.key(Arm("lora", settings={"rank": 3}))["lora"] == {"rank": 3}
    assert Plan(latency={"new_tokens": 2}).key(Arm("zero_shot"))["latency"] == {"new_tokens": 2}
    das = plan.key(Arm("das", 2, "bandit"))["eas"]
    assert (das["kinds"], das["adapter"]) == (("layer",), "bottleneck")


@pytest.mark.slow
def test_all_arms_run_once_and_resume_from_their_files(toy_task, tmp_path):
    made, said = [], []

    def make_model():
        made.append(1)
        return toys.make_llava()

    arms = standard_arms((2,))
    arguments = {"seeds": (0, 1), "out_dir": tmp_path, "plan": small_plan(), "log": said.append}
    frame = run_arms(toy_task, make_model, arms, **arguments)
    assert len(frame) == 14
    assert list(frame.columns) == list(compare.COLUMNS)
    assert frame["steps"].tolist() == [0, 3, 3, 3, 3, 3, 3] * 2
    by_arm = frame[frame["seed"] == 1].set_index("arm")
    assert by_arm.loc["zero_shot", "test_loss"] == toy_task.evaluate(toys.make_llava(), "test")["loss"]
    assert by_arm.loc["zero_shot", "trainable"] == 0
    assert by_arm.loc["pia", "mask"] == []
    for choice in CHOICES:
        assert len(by_arm.loc[f"pia k=2 {choice}", "mask"]) == 2
    assert by_arm.loc["pia k=2 scorer", "scorer"] in ("cosine_similarity", "block_influence", "single_ablation")
    assert by_arm.loc["pia k=2 bandit", "search_steps"] == 3
    assert by_arm.loc["full", "trainable_share"] > 0.5 > by_arm.loc["pia", "trainable_share"] > 0
    assert len({tuple(mask) for mask in frame[frame["arm"] == "pia k=2 scorer"]["mask"]}) == 1  # blind to the seed
    count = len(made)
    again = run_arms(toy_task, make_model, arms, **arguments)
    assert len(made) == count + 1  # everything came from the files; one model is made to tell its weights
    assert again.to_json() == frame.to_json()
    table = summary(frame)
    assert table["seeds"].tolist() == [2] * 7
    assert table["test_accuracy"][1] == pytest.approx(frame[frame["arm"] == "full"]["test_accuracy"].mean())
    # Another search setting concerns the bandit's arms alone.
    changed = small_plan(search=eas.SearchConfig(**arguments["plan"].search.to_dict() | {"updates": 1}))
    run_arms(toy_task, make_model, arms, **arguments | {"plan": changed})
    assert len(made) == count + 2 + 2 * 2  # two calls so far; per seed: one model to search with, one to tune


def test_runs_are_the_same_in_any_order_and_with_fresh_adapters(toy_task, tmp_path):
    arms = [Arm("pia", 2, "bandit"), Arm("pia", 2, "random")]
    quiet = {"plan": small_plan(), "log": lambda line: None}
    one = run_arms(toy_task, toys.make_llava, arms, out_dir=tmp_path / "a", **quiet)
    torch.manual_seed(5)
    other = run_arms(toy_task, toys.make_llava, arms[::-1], out_dir=tmp_path / "b", **quiet)
    columns = ["mask", "val_loss", "test_loss", "test_accuracy"]
    assert one[columns].to_json() == other[::-1].reset_index(drop=True)[columns].to_json()
    # The bandit hands over its mask and nothing else: tuning by hand with that mask gives the same model.
    torch.manual_seed(0)
    net = eas.attach(toys.make_llava(), quiet["plan"].eas)
    net.mask = one["mask"][0]
    config = eas.TrainConfig(max_steps=3, batch_size=6, learning_rate=1e-2, progress=False)
    eas.fit(net, toy_task, config)
    assert toy_task.evaluate(net, "test")["loss"] == one["test_loss"][0]
    on = run_arms(toy_task, toys.make_llava, arms[:1], out_dir=tmp_path, **quiet | {"plan": small_plan(tune_on=True)})
    assert on["mask"][0] == one["mask"][0]
    assert on["test_loss"][0] != one["test_loss"][0]


@pytest.mark.parametrize(("arm", "loop"), [(Arm("pia"), "fit"), (Arm("pia", 2, "bandit"), "search")])
def test_an_interrupted_run_is_no_result(toy_task, tmp_path, monkeypatch, arm, loop):
    real = getattr(compare, loop)

    def stopped(*given):
        found = real(*given)
        found.interrupted = True
        return found

    monkeypatch.setattr(compare, loop, stopped)
    quiet = {"plan": small_plan(), "log": lambda line: None, "out_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        run_arms(toy_task, toys.make_llava, [arm], **quiet)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert run_arms(toy_task, toys.make_llava, [arm], **quiet)["steps"][0] == 3


def test_other_weights_settings_and_devices_are_other_runs(toy_task, tmp_path):
    quiet = {"plan": small_plan(), "log": lambda line: None, "out_dir": tmp_path}

    def files(make=toys.make_llava, **more):
        run_arms(toy_task, make, [Arm("zero_shot")], **quiet | more)
        return len(list(tmp_path.iterdir()))

    def other_first_weight():
        model = toys.make_llava()
        next(model.parameters()).data[0] += 1
        return model

    assert (files(), files()) == (1, 1)
    assert files(other_first_weight) == 2
    assert files(made_with={"task": {"false_texts": 2}}) == files(made_with={"task": {"false_texts": 2}}) == 3
    timed = small_plan(latency={"new_tokens": 2, "repeats": 1})
    assert files(plan=timed) == 4
    assert [json.loads(file.read_text())["key"].get("device") for file in tmp_path.iterdir()].count("cpu") == 1


def test_the_costs_are_of_a_prompt_that_opens(toy_task, tmp_path, monkeypatch):
    real, quiet = toy_task.collate, {"plan": small_plan(), "log": lambda line: None}

    def collate(examples, answers=True):
        if not answers and len(examples) == 1 and examples[0] is toy_task.val[0]:
            raise NothingOpenedError("no picture")
        return real(examples, answers=answers)

    monkeypatch.setattr(toy_task, "collate", collate)
    frame = run_arms(toy_task, toys.make_llava, [Arm("zero_shot")], out_dir=tmp_path, **quiet)
    inputs = real([toy_task.val[1]], answers=False)
    assert frame["macs"][0] == eas.measure.flops(toys.make_llava(), inputs)["total"]


def test_learning_rate_is_chosen_on_val(toy_task, tmp_path):
    grid = {"full": (1e-6, 1e-2)}
    arguments = {"out_dir": tmp_path, "plan": small_plan(steps=60), "log": lambda line: None}
    frame = run_arms(toy_task, toys.make_llava, [Arm("full")], grid=grid, **arguments)
    runs = [json.loads(path.read_text())["result"] for path in tmp_path.glob("full*.json")]
    assert len(runs) == 2
    best = min(runs, key=lambda run: (-run["val_accuracy"], run["val_loss"]))
    assert frame["learning_rate"][0] == best["learning_rate"]
    assert frame["learning_rate"][0] == 1e-2
    with pytest.raises(ConfigError, match=r"learning_rates has no 'lora'; give one, or a grid"):
        run_arms(toy_task, toys.make_llava, [Arm("lora")], learning_rates={}, **arguments)


def test_every_method_and_kind_of_candidates_runs_and_says_what_it_costs(toy_task, tmp_path):
    arms = [Arm(method) for method in METHODS if method not in ("full", "lora", "das")]
    arms += [Arm("pia", 2, "random", wanted) for wanted in CANDIDATES]
    arms += [Arm("das", 2, "bandit"), Arm("pia", 2, "scorer", "ffn", {"adapt_rank": 0, "parts": "base"})]
    plan = small_plan(steps=1, latency={"new_tokens": 2, "repeats": 1}, methods={"prefix": {"tokens": 3}})
    quiet = {"plan": plan, "log": lambda line: None, "out_dir": tmp_path}
    frame = run_arms(toy_task, toys.make_llava, arms, **quiet).set_index("arm")
    assert frame.index.tolist() == [arm.name for arm in arms]
    batch = toy_task.collate(toy_task.val[:1], answers=False)
    dense = eas.measure.flops(toys.make_llava(), batch)["total"]
    assert frame.macs["zero_shot"] == frame.merged_macs["pia"] == dense
    assert frame.merged_macs["pia k=2 random"] < frame.macs["pia k=2 random"] < dense < frame.macs["adapter"]
    assert frame.macs["pia k=2 random layer"] < frame.macs["pia k=2 random"]
    attentions = [mask for mask in frame["mask"]["pia k=2 random mha+ffn"] if mask < toys.LAYERS]
    merged = ["pia", "pia k=2 random", *["pia k=2 random mha+ffn"] * (len(attentions) == 2)]
    for column in ("merged_macs", "merged_decode_seconds"):
        assert frame[frame[column].notna()].index.tolist() == merged
    assert len({frame.merged_macs[name] for name in merged[1:]}) == 1
    assert (frame[["prefill_seconds", "decode_seconds"]] > 0).all().all()
    assert frame.trainable["prefix"] == 3 * toys.LAYERS * 2 * 14
    d, r = toys.WIDTH, 6
    # rank 6 in place of a layer, rank 4 before the attentions of the others
    assert frame.trainable["das k=2 bandit"] == 2 * (2 * d * r + r + d) + 3 * (2 * d * 4 + 4 + d)
    assert all(site >= toys.LAYERS for site in frame["mask"]["pia k=2 random ffn"])
    assert all(site >= toys.LAYERS for site in frame["mask"]["pia k=2 scorer ffn adapt_rank=0 parts=base"])
    assert frame.settings["pia k=2 scorer ffn adapt_rank=0 parts=base"] == {"adapt_rank": 0, "parts": "base"}
    # a rate for DAS is chosen with random layers: with none skipped, and rank 0 at kept ones, nothing would train
    assert Arm("das", 2, "bandit").plain == Arm("das", 2, "random")
    grid = {"das": (1e-4, 1e-3)}
    found = run_arms(toy_task, toys.make_llava, [Arm("das", 2, "bandit")], grid=grid, **quiet)
    assert found.learning_rate[0] in grid["das"]
    assert len(list(tmp_path.glob("das_k2_random-*.json"))) == 2


def test_rows_of_other_processes_are_left_out_without_waiting(toy_task, tmp_path, monkeypatch):
    quiet = {"plan": small_plan(), "log": lambda line: None, "out_dir": tmp_path}
    run_arms(toy_task, toys.make_llava, [Arm("zero_shot"), Arm("pia")], **quiet)
    path = next(tmp_path.glob("pia-*.json"))
    content = path.read_text()
    path.unlink()
    path.with_suffix(".claim").write_text(f"{cache.socket.gethostname()} {os.getppid()}")
    frame = run_arms(toy_task, toys.make_llava, [Arm("zero_shot"), Arm("pia")], wait=False, **quiet)
    assert frame["arm"].tolist() == ["zero_shot"]
    # With waiting, the other process's result is taken over as soon as it is there.
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: path.write_text(content))
    frame = run_arms(toy_task, toys.make_llava, [Arm("zero_shot"), Arm("pia")], **quiet)
    assert frame["arm"].tolist() == ["zero_shot", "pia"]


# -- stability -----------------------------------------------------------------------------------------------------


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # ranks 0 1 2 3 and 1 0 3 2: sum of squared differences 4, rho = 1 - 6 * 4 / (4 * 15)
    assert rank_correlation(torch.tensor([1.0, 2.0, 3.0, 4.0]), [2, 1, 4, 3]) == pytest.approx(0.6)
    # ties share a rank: 0 1.5 1.5 3 against 0 1 2 3: 4.5 / sqrt(4.5 * 5)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert torch.tensor(rank_correlation([1, 1, 1], [1, 2, 3])).isnan()
    with pytest.raises(ConfigError, match=r"got 2 and 3 sites"):
        rank_correlation([1, 2], [1, 2, 3])


def test_overlap_and_agreement():
    assert overlap((1, 2, 5, 7), (0, 2, 5, 9)) == 0.5
    with pytest.raises(ConfigError, match=r"equal size, not empty"):
        overlap((1, 2), (1,))
    frame = agreement({"a": [0.0, 1, 2, 3, 4], "b": [1.0, 0, 4, 3, 2], "c": [4.0, 3, 2, 1, 0]}, k=2)
    assert frame[["one", "other"]].to_numpy().tolist() == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert frame["overlap"].tolist() == [1.0, 0.0, 0.0]
    assert frame["chance"].tolist() == [0.4] * 3
    assert frame["rank_correlation"][1] == pytest.approx(-1)


def test_masks_are_scored_and_the_nets_own_is_kept(toy_task):
    net = eas.attach(toys.make_llava(), eas.EASConfig(skip_rank=6, adapt_rank=4))
    toys.stir(net.adapters)
    net.mask = [4]
    frame = score_masks(net, toy_task, {"bandit": [0, 2], "random": (1, 3)})
    assert net.mask == (4,)
    assert frame["mask"].tolist() == [(0, 2), (1, 3)]
    net.mask = [1, 3]
    assert frame["loss"][1] == toy_task.score(net, "val")["loss"]
    assert frame["reward"][1] == pytest.approx(torch.exp(torch.tensor(-frame["loss"][1])).item(), rel=1e-5)


def test_results_of_another_template_are_not_reused(toy_task):
    from types import SimpleNamespace

    from eas_kit.compare import _digest

    example = SimpleNamespace(question="Which?", explanation="", answer="That")
    splits = {name: [example] for name in ("train", "search", "val", "test")}
    one = SimpleNamespace(template="A", parser="p", **splits)
    assert _digest(one) == _digest(SimpleNamespace(template="A", parser="p", **splits))
    assert _digest(one) != _digest(SimpleNamespace(template="B", parser="p", **splits))
    other = SimpleNamespace(question="Why?", explanation="", answer="That")
    assert _digest(one) != _digest(SimpleNamespace(template="A", parser="p", **(splits | {"test": [other]})))
    seeds = [
        SimpleNamespace(template="A", parser="p", about=lambda seed=seed: {"seed": seed}, **splits) for seed in (0, 1)
    ]
    assert _digest(seeds[0]) != _digest(seeds[1]) and _digest(seeds[0]) == _digest(seeds[0])
    named = SimpleNamespace(**vars(example) | {"id": "Airport/airport_2"})  # of one question, asked of all pictures
    assert _digest(one) != _digest(SimpleNamespace(template="A", parser="p", **(splits | {"val": [named]})))
