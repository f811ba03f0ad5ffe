"""fit and search: what is trained, determinism, resuming bit for bit, interrupts, NaN, callbacks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import toys

import eas_kit as eas
from eas_kit import bandit, checkpoint, config
from eas_kit.errors import ConfigError, NothingOpenedError, TrainingError
from eas_kit.loop import Loop, answer_tokens
from eas_kit.masks import read_mask
from eas_kit.processes import Order
from eas_kit.training import SearchResult


def make_net(seed=0, **changes):
    base = toys.make_llava(seed)
    torch.manual_seed(seed)
    return eas.attach(base, eas.EASConfig(**{"skip_rank": 6, "adapt_rank": 4, "dropout": 0.2} | changes))


def train_config(**changes):
    return eas.TrainConfig(**{"max_steps": 6, "batch_size": 8, "progress": False, "seed": 3} | changes)


def search_config(**changes):
    values = {
        "num_skipped": 2,
        "warmup_steps": 3,
        "updates": 4,
        "train_steps_per_update": 2,
        "batch_size": 5,
        "reward_batch_size": 7,
        "preference_lr": 20.0,
        "progress": False,
        "seed": 1,
    }
    return eas.SearchConfig(**values | changes)


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupt_after(step):
    def callback(event):
        if event.step == step:
            raise KeyboardInterrupt

    return callback


# -- fit -----------------------------------------------------------------------------------------------------------


def test_fit_trains_the_adapters_in_use_and_nothing_else(toy_task):
    net = make_net()
    net.mask = [1, 3]
    before = state(net)
    score = toy_task.score(net, "train")
    history = eas.fit(net, toy_task, train_config(max_steps=30, learning_rate=2e-2))
    after = state(net)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    used = {f"adapters.{name}." for name in net.active_adapters()}
    assert moved
    assert all(any(name.startswith(prefix) for prefix in used) for name in moved)
    assert {name.split(".")[1] for name in moved} == {"0", "1", "2", "3", "4"}
    assert toy_task.score(net, "train")["loss"] < score["loss"] - 0.5
    assert not net.base.training  # the mode it was in
    assert len(history) == 30
    assert [r["step"] for r in history] == list(range(1, 31))
    assert history[0]["mask"] == [1, 3]
    assert history.frame["loss"].iloc[-1] == history.losses[-1]


def test_a_batch_of_which_nothing_opens_gets_a_stand_in(toy_task, monkeypatch):
    """Tasks loaded with on_error="skip" leave examples out; a batch of nothing but those is no reason to stop."""
    order = Order(len(toy_task.train), seed=5)
    broken = [toy_task.train[i] for i in order.take(2, 3)]  # steps 3, 4 and 5 of batches of one
    collate, seen = toy_task.collate, []

    def picky(examples, answers=True):
        if all(e in broken for e in examples):
            raise NothingOpenedError("none of them")
        seen.append(examples)
        return collate(examples, answers=answers)

    monkeypatch.setattr(toy_task, "collate", picky)
    history = eas.fit(make_net(), toy_task, train_config(max_steps=6, batch_size=1, seed=5))
    assert len(history) == 6
    assert [toy_task.train.index(e) for [e] in seen] == [order.take(i, 1)[0] for i in (0, 1, 5, 5, 5, 5)]
    broken[:] = toy_task.train
    with pytest.raises(NothingOpenedError, match="none of them"):
        eas.fit(make_net(), toy_task, train_config(max_steps=1, batch_size=1))


def test_fit_takes_a_plain_model_and_a_peft_model(toy_task):
    from peft import LoraConfig, get_peft_model

    plain = toys.make_llama()
    task = toys.ToyTask(images=False)
    before = state(plain)
    eas.fit(plain, task, train_config(max_steps=2))
    assert all(not torch.equal(before[name], value) for name, value in plain.state_dict().items())
    lora = get_peft_model(toys.make_llava(), LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|up_proj)"))
    before = state(lora)
    eas.fit(lora, toy_task, train_config(max_steps=3))
    moved = {name for name, value in lora.state_dict().items() if not torch.equal(before[name], value)}
    assert moved
    assert all("lora_" in name for name in moved)


def test_same_seed_same_weights_bit_for_bit(toy_task):
    nets = [make_net(), make_net(), make_net()]
    histories = [eas.fit(net, toy_task, train_config(seed=seed)) for net, seed in zip(nets, (3, 3, 4), strict=True)]
    assert histories[0].records == histories[1].records
    assert same(state(nets[0]), state(nets[1]))
    assert histories[0].losses != histories[2].losses


def test_the_callers_random_state_is_left_alone(toy_task):
    net = make_net()
    torch.manual_seed(17)
    expected = torch.rand(3)
    torch.manual_seed(17)
    eas.fit(net, toy_task, train_config(max_steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_accumulation_is_one_large_batch(toy_task):
    whole, parts, control = (make_net(dropout=0.0) for _ in range(3))
    large = eas.fit(whole, toy_task, train_config(batch_size=12))
    small = eas.fit(parts, toy_task, train_config(batch_size=4, gradient_accumulation_steps=3))
    other = eas.fit(control, toy_task, train_config(batch_size=4))
    assert small.losses == pytest.approx(large.losses, rel=1e-5)
    assert other.losses != pytest.approx(large.losses, rel=1e-2)
    for one, two in zip(whole.adapters.parameters(), parts.adapters.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(toy_task):
    nets = [make_net(), make_net()]
    plain = eas.fit(nets[0], toy_task, train_config())
    recomputed = eas.fit(nets[1], toy_task, train_config(gradient_checkpointing=True))
    assert recomputed.losses == pytest.approx(plain.losses, rel=1e-6)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in nets[1].modules())


def test_mixed_precision(toy_task):
    nets = [make_net(dropout=0.0), make_net(dropout=0.0)]
    full = eas.fit(nets[0], toy_task, train_config())
    half = eas.fit(nets[1], toy_task, train_config(mixed_precision="bf16"))
    assert half.losses == pytest.approx(full.losses, rel=0.05)
    assert half.losses != full.losses
    assert all(p.dtype == torch.float32 for p in nets[1].adapters.parameters())
    with pytest.raises(TrainingError, match=r"needs trainable weights in float32"):
        eas.fit(toys.make_llama().half(), toy_task, train_config(mixed_precision="fp16"))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_schedules_with_warmup(toy_task, schedule, expected):
    history = eas.fit(make_net(), toy_task, train_config(schedule=schedule, lr_warmup_steps=2, learning_rate=1.0))
    assert [r["learning_rate"] for r in history] == pytest.approx(expected, abs=1e-4)


def test_gradients_are_clipped(toy_task):
    net = make_net()
    history = eas.fit(net, toy_task, train_config(max_steps=1, max_grad_norm=1e-9, learning_rate=1.0))
    assert history[0]["grad_norm"] > 1e-3  # as it was before the clipping
    loose = make_net()
    eas.fit(loose, toy_task, train_config(max_steps=1, max_grad_norm=0.0, learning_rate=1.0))
    # Adam undoes a scale, except where it meets its own epsilon (1e-8): so a norm of 1e-9 makes a small step.
    size = [max(float(p.detach().abs().max()) for p in n.adapters["0"]["keep"].up_0.parameters()) for n in (net, loose)]
    assert size[0] < 0.1
    assert size[1] > 0.9


def test_epochs_count_examples(toy_task):
    assert len(eas.fit(make_net(), toy_task, eas.TrainConfig(epochs=1, batch_size=10, progress=False))) == 5  # of 48
    assert len(eas.fit(make_net(), toy_task, eas.TrainConfig(epochs=0.5, batch_size=10, progress=False))) == 3


def test_interrupted_fit_resumes_bit_for_bit(toy_task, tmp_path):
    whole = make_net()
    expected = eas.fit(whole, toy_task, train_config())
    net = make_net()
    halted = eas.fit(net, toy_task, train_config(output_dir=tmp_path), callbacks=[interrupt_after(4)])
    assert halted.interrupted
    assert len(halted) == 4
    fresh = make_net()
    torch.manual_seed(99)  # what the process did in between must not matter
    resumed = eas.fit(fresh, toy_task, train_config(output_dir=tmp_path, resume=True))
    assert resumed.records == expected.records
    assert not resumed.interrupted
    assert same(state(fresh), state(whole))
    again = eas.fit(make_net(), toy_task, train_config(output_dir=tmp_path, resume=True))  # nothing left to do
    assert again.records == expected.records


def test_a_killed_run_resumes_from_its_last_checkpoint(toy_task, tmp_path):
    whole = make_net()
    eas.fit(whole, toy_task, train_config())

    class Killed(BaseException):
        pass

    def die(event):
        if event.step == 5:
            raise Killed

    with pytest.raises(Killed):
        eas.fit(make_net(), toy_task, train_config(output_dir=tmp_path, checkpoint_every=2), callbacks=[die])
    assert checkpoint.latest(tmp_path).name == "checkpoint-00000004"
    net = make_net()
    eas.fit(net, toy_task, train_config(output_dir=tmp_path, resume=True))
    assert same(state(net), state(whole))


def test_checkpoints_hold_only_what_is_trained_and_old_ones_go(toy_task, tmp_path):
    from safetensors.torch import load_file

    net = make_net()
    eas.fit(net, toy_task, train_config(output_dir=tmp_path, checkpoint_every=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000005", "checkpoint-00000006"]
    weights = load_file(tmp_path / "checkpoint-00000006" / "trainable.safetensors")
    assert set(weights) == {f"adapters.{name}" for name, _ in net.adapters.named_parameters()}


def test_resuming_another_run_is_refused(toy_task, tmp_path):
    eas.fit(make_net(), toy_task, train_config(output_dir=tmp_path))
    with pytest.raises(TrainingError, match=r"another run: learning_rate \(saved 0.01, now 0.5\)"):
        eas.fit(make_net(), toy_task, train_config(output_dir=tmp_path, resume=True, learning_rate=0.5))
    with pytest.raises(TrainingError, match=r"another run: adapters.skip_rank \(saved 6, now 8\)"):
        eas.fit(make_net(skip_rank=8), toy_task, train_config(output_dir=tmp_path, resume=True))
    other = make_net()
    other.mask = [3]
    with pytest.raises(TrainingError, match=r"another run: mask \(saved \[\], now \[3\]\)"):
        eas.fit(other, toy_task, train_config(output_dir=tmp_path, resume=True))
    eas.fit(toys.make_llava(), toy_task, train_config(output_dir=tmp_path / "plain"))
    frozen = toys.make_llava()
    frozen.get_input_embeddings().requires_grad_(False)
    with pytest.raises(TrainingError, match=r"other trainable weights than this model: .*embed_tokens"):
        eas.fit(frozen, toy_task, train_config(output_dir=tmp_path / "plain", resume=True))


def test_a_new_run_does_not_mix_its_checkpoints_with_an_older_ones(toy_task, tmp_path):
    eas.fit(make_net(), toy_task, train_config(output_dir=tmp_path))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(TrainingError, match=r"holds the checkpoints of a run that got to checkpoint-00000006.*resume"):
        eas.fit(make_net(), toy_task, train_config(output_dir=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_pruning_takes_only_its_own_folders(toy_task, tmp_path):
    for name in ("checkpoint-best", "partial-00000003"):  # the user's own; what a killed run left
        (tmp_path / name).mkdir(parents=True)
    config = train_config(output_dir=tmp_path, checkpoint_every=2, keep_checkpoints=1)
    eas.fit(make_net(), toy_task, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000006", "checkpoint-best"]


def test_a_failing_callback_leaves_a_checkpoint(toy_task, tmp_path):
    def fail(event):
        if event.step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        eas.fit(make_net(), toy_task, train_config(output_dir=tmp_path), callbacks=[fail])
    assert checkpoint.latest(tmp_path).name == "checkpoint-00000003"


def test_modes_come_back_module_by_module(toy_task):
    net = make_net()
    net.train()
    net.base.model.vision_tower.eval()
    modes = {name: module.training for name, module in net.named_modules()}
    assert set(modes.values()) == {True, False}
    eas.fit(net, toy_task, train_config(max_steps=1))
    assert {name: module.training for name, module in net.named_modules()} == modes


def test_nan_stops_before_the_step_and_keeps_the_checkpoint(toy_task, tmp_path):
    net = make_net()
    good = {}

    def poison(event):
        if event.step == 4:
            good.update(state(net.adapters))
            net.base.get_output_embeddings().weight.data[0, 0] = float("nan")

    with pytest.raises(TrainingError, match=r"Step 5: the loss is nan.*after step 4.*checkpoint-00000004.*resume=True"):
        eas.fit(net, toy_task, train_config(output_dir=tmp_path, checkpoint_every=2), callbacks=[poison])
    assert same(state(net.adapters), good)
    assert checkpoint.latest(tmp_path).name == "checkpoint-00000004"


def test_control_c_lets_the_step_end(toy_task):
    def press(event):
        if event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    history = eas.fit(make_net(), toy_task, train_config(), callbacks=[press])
    assert history.interrupted
    assert len(history) in (3, 4)


def test_an_interrupt_within_a_step_saves_nothing_half_done(toy_task, tmp_path, monkeypatch):
    calls = []

    def step(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    original = Loop.train_step
    monkeypatch.setattr(Loop, "train_step", step)
    history = eas.fit(make_net(), toy_task, train_config(output_dir=tmp_path, checkpoint_every=1))
    assert history.interrupted
    assert checkpoint.latest(tmp_path).name == "checkpoint-00000002"


def test_what_cannot_be_trained_is_refused(toy_task):
    frozen = toys.make_llama().requires_grad_(False)
    with pytest.raises(TrainingError, match=r"no parameter of the model requires a gradient.*attach"):
        eas.fit(frozen, toy_task, train_config())
    empty = toys.ToyTask()
    empty.train = []
    with pytest.raises(TrainingError, match=r"no examples to train on"):
        eas.fit(make_net(), empty, train_config())
    with pytest.raises(TrainingError, match=r"no answer token"):
        answer_tokens({"labels": torch.full((2, 5), -100)})
    with pytest.raises(TrainingError, match=r"with mask \[\] and adapt_rank 0 no adapter is at work. Set net.mask"):
        eas.fit(make_net(adapt_rank=0), toy_task, train_config())


# -- search --------------------------------------------------------------------------------------------------------


def test_search_is_deterministic_and_sets_the_mask(toy_task):
    nets = [make_net(), make_net()]
    results = [eas.search(net, toy_task, search_config()) for net in nets]
    assert results[0].history == results[1].history
    assert results[0].steps == results[1].steps
    assert same(state(nets[0]), state(nets[1]))
    result = results[0]
    assert result.preferences.shape == (5,)
    assert result.skipped == bandit.lowest(result.preferences, 2) == nets[0].mask
    assert [record["step"] for record in result.history] == [5, 7, 9, 11]
    assert len(result.steps) == 11
    assert [step["phase"] for step in result.steps] == ["warmup"] * 3 + ["search"] * 8
    assert all(len(step["mask"]) == 2 for step in result.steps)
    assert eas.search(make_net(), toy_task, search_config(seed=2)).history != result.history


def test_search_follows_the_bandit_rule(toy_task):
    net = make_net()
    result = eas.search(net, toy_task, search_config())
    s = torch.zeros(5, dtype=torch.float64)
    for record in result.history:
        assert len({tuple(mask) for mask in record["masks"]}) == 3
        s = eas.update_preferences(s, record["masks"], record["losses"], 20.0)
        assert s.tolist() == record["preferences"]
    assert torch.equal(s, result.preferences)


def test_rewards_are_losses_on_one_held_out_batch(toy_task):
    """At the last update nothing is trained any more, so its losses can be computed again."""
    net, batches = make_net(), []
    original = toy_task.collate

    def collate(examples, answers=True):
        batches.append([example.id for example in examples])
        return original(examples, answers)

    toy_task.collate = collate
    result = eas.search(net, toy_task, search_config())
    train = {example.id for example in toy_task.train}
    held_out = {example.id for example in toy_task.search}
    rewarded = [batch for batch in batches if len(batch) == 7]
    assert all(set(batch) <= held_out for batch in rewarded)
    assert all(set(batch) <= train for batch in batches if len(batch) == 5)
    assert len(rewarded) == 4 * 3
    assert rewarded[-1] == rewarded[-2] == rewarded[-3] != rewarded[-4]
    by_id = {example.id: example for example in toy_task.search}
    batch = original([by_id[number] for number in rewarded[-1]])
    net.eval()
    for mask, loss in zip(result.history[-1]["masks"], result.history[-1]["losses"], strict=True):
        net.mask = mask
        assert net(**batch).loss.item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("step", [2, 5, 8])  # in the warm-up, right after an update, between two
def test_interrupted_search_resumes_bit_for_bit(toy_task, tmp_path, step):
    whole = make_net()
    expected = eas.search(whole, toy_task, search_config())
    net = make_net()
    halted = eas.search(net, toy_task, search_config(output_dir=tmp_path), callbacks=[interrupt_after(step)])
    assert halted.interrupted
    assert len(halted.steps) == step
    assert halted.history == expected.history[: len(halted.history)]
    assert net.mask == halted.skipped
    fresh = make_net()
    resumed = eas.search(fresh, toy_task, search_config(output_dir=tmp_path, resume=True))
    assert resumed.history == expected.history
    assert resumed.steps == expected.steps
    assert resumed.skipped == expected.skipped
    assert not resumed.interrupted
    assert same(state(fresh), state(whole))


def test_callbacks_see_steps_and_updates(toy_task):
    events = []
    net = make_net()
    result = eas.search(net, toy_task, search_config(), callbacks=[events.append])
    assert [e.step for e in events if e.kind == "step"] == list(range(1, 12))
    updates = [e for e in events if e.kind == "update"]
    assert [e.preferences for e in updates] == [record["preferences"] for record in result.history]
    assert [e.counts for e in updates] == [record["counts"] for record in result.history]
    assert [e.update for e in updates] == [1, 2, 3, 4]
    assert events[0].phase == "warmup"
    assert events[-1].phase == "search"
    assert events[0].net is net
    assert events[0].total_steps == 11
    assert events[0].mask == tuple(result.steps[0]["mask"])


def test_a_harmful_site_is_kept_and_the_control_learns_nothing(toy_task, monkeypatch):
    def planted(self, examples):
        return 0.2 + 1.5 * (2 in self.net.mask)

    monkeypatch.setattr(Loop, "loss", planted)
    settings = {"updates": 25, "train_steps_per_update": 1, "warmup_steps": 0, "preference_lr": 5.0}
    result = eas.search(make_net(), toy_task, search_config(**settings))
    assert result.preferences.argmax() == 2
    assert 2 not in result.skipped
    monkeypatch.setattr(Loop, "loss", lambda self, examples: 0.7)
    control = eas.search(make_net(), toy_task, search_config(**settings))
    assert torch.equal(control.preferences, torch.zeros(5, dtype=torch.float64))


def test_candidates(toy_task):
    net = make_net(kinds=("mha", "ffn"))
    result = eas.search(net, toy_task, search_config(candidates="ffn"))
    assert set(result.skipped) <= set(range(5, 10))
    assert torch.equal(result.preferences[:5], torch.zeros(5, dtype=torch.float64))
    assert result.kinds == ("mha", "ffn")
    both = eas.search(make_net(kinds=("mha", "ffn")), toy_task, search_config(num_skipped=4))
    assert {site for record in both.history for mask in record["masks"] for site in mask} > {4, 5}
    some = eas.search(make_net(), toy_task, search_config(candidates=[4, 1, 2]))
    assert set(some.skipped) <= {1, 2, 4}
    with pytest.raises(ConfigError, match=r"candidates='ffn', but the model's sites are \['mha'\]"):
        eas.search(make_net(), toy_task, search_config(candidates="ffn"))


def test_search_refuses_what_it_cannot_search(toy_task):
    with pytest.raises(TrainingError, match=r"adapters at its sites, got LlavaForConditionalGeneration; call attach"):
        eas.search(toys.make_llava(), toy_task, search_config())
    with pytest.raises(ConfigError, match=r"num_skipped must be between 1 and 4"):
        eas.search(make_net(), toy_task, search_config(num_skipped=5))
    empty = toys.ToyTask()
    empty.search = []
    with pytest.raises(TrainingError, match=r"task.search has no examples"):
        eas.search(make_net(), empty, search_config())


def test_a_search_that_compared_nothing_chooses_nothing(toy_task):
    net = make_net()
    net.mask = [4]
    result = eas.search(net, toy_task, search_config(), callbacks=[interrupt_after(2)])
    assert result.interrupted and result.history == [] and result.skipped == ()
    assert net.mask == (4,)


def test_one_attention_always_stays(toy_task):
    net = make_net(kinds=("mha", "ffn"))
    with pytest.raises(ConfigError, match="num_skipped=5 could skip all 5 attentions, and one has to stay"):
        eas.search(net, toy_task, search_config(num_skipped=5))
    result = eas.search(net, toy_task, search_config(num_skipped=5, candidates=(0, 1, 2, 3, 5, 6, 7, 8, 9)))
    assert len(result.skipped) == 5


def test_the_saved_mask_knows_the_search(toy_task, tmp_path):
    net = make_net()
    eas.search(net, toy_task, search_config(seed=2))
    net.save_pretrained(tmp_path / "searched")
    assert {"made_by": "search", "seed": 2}.items() <= read_mask(tmp_path / "searched" / "mask.json").items()
    assert eas.load(tmp_path / "searched", base=toys.make_llava()).mask_origin == {"made_by": "search", "seed": 2}
    net.mask = net.mask  # the same mask is the search's still
    assert net.mask_origin["made_by"] == "search"
    net.mask = [0]
    net.save_pretrained(tmp_path / "mine")
    assert {"made_by": "user", "seed": None}.items() <= read_mask(tmp_path / "mine" / "mask.json").items()


def test_result_is_saved_as_json(toy_task, tmp_path):
    result = eas.search(make_net(), toy_task, search_config())
    result.save(tmp_path / "search.json")
    loaded = SearchResult.load(tmp_path / "search.json")
    assert torch.equal(loaded.preferences, result.preferences)
    assert loaded.skipped == result.skipped
    assert loaded.history == result.history
    assert json.loads(Path(tmp_path / "search.json").read_text())["format"] == 1
    result.save_mask(tmp_path / "mask.json", model="toy")
    mask = read_mask(tmp_path / "mask.json")
    assert mask["skipped"] == list(result.skipped)
    assert (mask["made_by"], mask["seed"], mask["num_sites"], mask["kind"]) == ("search", 1, 5, "mha")
    with pytest.raises(ConfigError, match=r"is not a search result: it has no 'preferences'"):
        SearchResult.load(tmp_path / "mask.json")


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "value", "wanted"),
    [
        (eas.TrainConfig, "batch_size", 0, "a whole number from 1 up"),
        (eas.TrainConfig, "learning_rate", float("nan"), "a number from 0 up"),
        (eas.TrainConfig, "schedule", "step", "one of"),
        (eas.TrainConfig, "mixed_precision", "fp8", "one of"),
        (eas.TrainConfig, "betas", (0.9, 1.0), "two numbers"),
        (eas.TrainConfig, "epochs", 0, "above 0"),
        (eas.TrainConfig, "max_steps", 0, "from 1 up, or None"),
        (eas.SearchConfig, "num_skipped", 0, "from 1 up"),
        (eas.SearchConfig, "num_subnetworks", 1, "from 2 up"),
        (eas.SearchConfig, "reward", "log", "one of"),
        (eas.SearchConfig, "candidates", "both", "a list of sites"),
        (eas.SearchConfig, "preference_lr", 0.0, "above 0"),
        (eas.SearchConfig, "warmup_steps", -1, "from 0 up"),
    ],
)
def test_settings_are_checked_when_made(make, name, value, wanted):
    with pytest.raises(ConfigError, match=rf"{make.__name__}.{name}: wanted .*{wanted}"):
        make(**{name: value})


def test_settings_are_saved_as_json(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint_every and resume need output_dir"):
        eas.TrainConfig(resume=True)
    made = search_config(candidates=[3, 1], output_dir=tmp_path)
    made.save(tmp_path / "search.json")
    assert eas.SearchConfig.load(tmp_path / "search.json") == made
    assert made.candidates == (1, 3)
    assert made.total_steps == 11
    assert config.REWARDS == bandit.REWARDS
    assert (eas.SearchConfig().preference_lr, eas.SearchConfig(reward="standardized").preference_lr) == (5.0, 1.0)
