"""METER with whole layers skipped (DAS), fully tuned, with LoRA and adapters, and the rows of the paper's Table 4."""

from __future__ import annotations

import math

import pytest
import torch
from meter_reference import (
    FF,
    LAYERS,
    TEXT,
    TEXT_FF,
    TEXT_LAYERS,
    WIDTH,
    Plain,
    checkpoint,
    plain_bottleneck,
    plain_delta,
)
from test_meter import inputs, make, rows
from test_meter_tasks import Votes
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertAttention

import eas_kit as eas
from eas_kit.arm_runs import expand, run_arm
from eas_kit.arms import Arm
from eas_kit.baselines import bottlenecks, full_tuning, language_linears, lora
from eas_kit.compare import run_arms
from eas_kit.errors import ConfigError, EASError, MergeError, TaskError, UnsupportedModelError
from eas_kit.meta import meta_model
from eas_kit.paper import read_tables
from eas_kit.post_norm import post_norm_layers
from eas_kit.slots import skipping
from eas_kit.tables import beside
from eas_kit.tasks.base import ROLES
from eas_kit.tasks.closed import ClosedTask
from eas_kit.tasks.heads import for_a_head
from eas_kit.tasks.matching import MatchingTask

RANK = 6
MASK = [0, 3, LAYERS, 2 * LAYERS - 2]  # of both streams; layer 0 of both at once
EAS = {"kinds": ("layer",), "skip_rank": RANK, "adapt_rank": 0, "scale": 1.7, "temperature": 3.0}
LABELS = torch.tensor([1, 2, 3])
PLAIN = {
    "pia": lambda state: plain_delta(state, groups=2, scale=1.7, temperature=3.0),
    "bottleneck": lambda state: lambda x, mean: plain_bottleneck(state, 1.7)(x),
}


def stir(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4


def attached(adapter: str, stirred: bool = True) -> eas.EASModel:
    net = eas.attach(make(), eas.EASConfig(**EAS, adapter=adapter)).double()
    if stirred:
        stir(net.adapters)
    return net.eval()


def plain(model, batch, **settings) -> torch.Tensor:
    reference = Plain(checkpoint(), **settings)
    return torch.stack([reference.head(model.head.state_dict(), reference.pooled(*row)) for row in rows(batch)])


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def after_a_step(model: torch.nn.Module, batch: dict) -> set[str]:
    """Names of the parameters that one step has moved; what does not move is the same bit for bit."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch, labels=LABELS).loss.backward()
    optimizer.step()
    model.eval()
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


# -- whole layers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("adapter", PLAIN)
@torch.no_grad()
def test_skipped_layers_are_the_plain_formula(adapter):
    net, batch = attached(adapter), inputs()
    dense = net(**batch).logits
    torch.testing.assert_close(dense, plain(net.base, batch), rtol=1e-9, atol=1e-9)
    net.mask = MASK
    logits = net(**batch).logits
    layers = {site: PLAIN[adapter](net.adapters[str(site)]["skip"].state_dict()) for site in MASK}
    torch.testing.assert_close(logits, plain(net.base, batch, layers=layers), rtol=1e-9, atol=1e-9)
    assert (logits - dense).abs().max() > 1e-2  # the control
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)
    torch.testing.assert_close(net(**batch).logits, logits)  # what stands at padding enters no mean


@pytest.mark.parametrize("adapter", PLAIN)
@torch.no_grad()
def test_new_adapters_are_layers_that_pass_their_input_on(adapter):
    net, batch = attached(adapter, stirred=False), inputs()
    net.mask = MASK
    wanted = plain(net.base, batch, layers={site: lambda x, mean: torch.zeros_like(x) for site in MASK})
    torch.testing.assert_close(net(**batch).logits, wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_router_that_reads_each_token_stands_at_attentions_and_layers():
    for kinds in (("mha",), ("layer",)):
        net = eas.attach(make(), eas.EASConfig(**EAS | {"kinds": kinds}, parts="base")).double().eval()
        stir(net.adapters)
        net.mask, batch = [1], inputs()
        pia = net.adapters["1"]["skip"]
        key = "skipped" if kinds == ("mha",) else "layers"
        each = {1: lambda x, mean, pia=pia: torch.stack([pia(one[None, None])[0, 0] - one for one in x])}
        torch.testing.assert_close(net(**batch).logits, plain(net.base, batch, **{key: each}), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adapter", PLAIN)
def test_train_save_load_detach(adapter, tmp_path):
    model, batch = make(), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules, dense = dict(model.named_modules()), model(**batch).logits
    net = eas.attach(model, eas.EASConfig(**EAS, adapter=adapter)).double()
    stir(net.adapters)
    net.mask = MASK
    moved = after_a_step(net, batch)
    assert moved == {name for name in trained(net) if name.startswith("base.head.") or int(name.split(".")[1]) in MASK}
    with torch.no_grad():
        tuned = net(**batch).logits
        assert (tuned - dense).abs().max() > 1e-3
        net.save_pretrained(tmp_path / "tuned")
        again = eas.load(tmp_path / "tuned", base=make())
        assert again.mask == tuple(MASK) and again.config.kinds == ("layer",)
        assert torch.equal(again.eval()(**batch).logits, tuned)
        net.mask = ()
        assert not torch.equal(net(**batch).logits, tuned)
    net.mask = MASK
    assert eas.detach(net) is model and dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**batch).logits, dense)


def test_recomputed_layers_give_the_same_gradients():
    net, batch = attached("pia"), inputs()
    net.mask = MASK
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, BertAttention):
            module.self.dropout.p = 0.0
    found = []
    for recompute in (False, True):
        if recompute:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        net.zero_grad()
        net(**batch, labels=LABELS).loss.backward()
        found.append([p.grad.clone() for p in net.trainable_parameters(active=True)])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


def test_the_layers_of_the_published_model():
    model = meta_model("meter-vqa")
    table = eas.describe(model, ("layer",))
    assert table.site.tolist() == list(range(12)) and set(table.kind) == {"layer"}
    assert table.name.tolist() == [f"{stream} layer {n}" for stream in ("text", "image") for n in range(6)]
    assert table.path.tolist() == [f"{stream}_layers.{n}" for stream in ("text", "image") for n in range(6)]
    d = 768
    assert set(table.params) == {2 * (4 * (d * d + d) + 2 * d) + 2 * 4 * d * d + 4 * d + d + 2 * d}
    assert not table.mergeable.any() and table.reason.str.contains("a skipped layer leaves no linear").all()
    net = eas.attach(model, eas.EASConfig(skip_rank=144, adapt_rank=0, kinds="layer", adapter="bottleneck"))
    net.mask = [2, 7]
    assert eas.describe(net, ("layer",)).equals(table)


def test_skipped_layers_are_counted_with_their_adapters():
    settings = {"skip_rank": 144, "adapt_rank": 0, "kinds": "layer", "adapter": "bottleneck"}
    net = eas.attach(meta_model("meter-vqa"), eas.EASConfig(**settings))
    dense, d, r, tokens, patches = eas.measure.flops(net, tokens=40), 768, 144, 40, 577
    net.mask = [2, 9]  # one of either stream
    counted = eas.measure.flops(net, tokens=40)
    both = tokens + patches
    gone = 4 * both * d * d + 2 * (tokens**2 + patches**2) * d  # self
    gone += 4 * both * d * d + 2 * 2 * tokens * patches * d  # cross
    gone += 8 * both * d * d
    assert counted["adapter"] == both * 2 * d * r
    assert dense["total"] - (counted["total"] - counted["adapter"]) == gone
    assert eas.measure.parameters(net)["active"]["skip"] == 2 * (2 * d * r + r + d)


def test_what_whole_layers_refuse():
    for change, message in (
        ({"adapt_rank": 4}, r"adapt_rank: wanted 0, got 4: text_layers.0 is a post-norm layer, and these have"),
        ({"source": "ffn_norm"}, r"'ffn_norm': before the post-norm layer text_layers.0 there is no second norm"),
        (
            {"kinds": ("ffn",)},
            r"wanted \('mha',\) or \('layer',\), got \('ffn',\): of Meter .*feed-forwards alone cannot",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            eas.attach(make(), eas.EASConfig(**EAS | change))
    net, batch = attached("pia"), inputs()
    with pytest.raises(ConfigError, match="skips all 10 layers"):
        net.mask = range(2 * LAYERS)
    with skipping(net, mha=[LAYERS]), pytest.raises(ConfigError, match=r"holds text_layers.0 \(text layer 0\); leave"):
        net.mask = [0]
    net.mask = [0]
    with pytest.raises(ConfigError, match="text_layers.0.crossattention is skipped already"):
        skipping(net, mha=[LAYERS]).__enter__()
    with pytest.raises(MergeError, match="cannot be folded into weights: a skipped layer leaves no linear"):
        net.generate(**batch, merge=True)
    with pytest.raises(EASError, match="Meter writes no text"):
        net.prefill(**batch)
    other = torch.nn.Module()
    other.layer = torch.nn.Module()
    other.layer.attention = BertAttention(BertConfig(hidden_size=WIDTH, num_attention_heads=2))
    with pytest.raises(UnsupportedModelError, match=r"layer: wanted a BERT layer with its feed-forward .*got a Module"):
        post_norm_layers(other, [("a", "layer")], ("attention",))


# -- baselines -----------------------------------------------------------------------------------------------------
def test_full_tuning_is_of_the_whole_model():
    model, share = full_tuning(make().requires_grad_(False))
    assert trained(model) == {name for name, _ in model.named_parameters()} and share == 1.0
    assert any(name.startswith("vision.") for name in trained(model))
    assert after_a_step(model, inputs()) >= {"vision.embeddings.class_embedding", "head.0.weight", "token_type.weight"}


def test_lora_is_in_the_text_encoder_and_the_fusion_and_the_head_trains_along():
    base, batch = make(), inputs()
    dense, total = base(**batch).logits, sum(p.numel() for p in base.parameters())
    tuned, share = lora(base, rank=3)
    tuned.eval()
    assert torch.equal(tuned(**batch).logits, dense)
    matrices = {name for name in trained(tuned) if "lora_" in name}
    fusion = 8 * 2 * WIDTH + 2 * (WIDTH + FF)
    text = 4 * 2 * TEXT + 2 * (TEXT + TEXT_FF)
    size = 3 * (2 * LAYERS * fusion + TEXT_LAYERS * text)
    assert sum(tuned.get_parameter(name).numel() for name in matrices) == size
    head = sum(p.numel() for p in tuned.get_base_model().head.original_module.parameters())
    assert share == (size + head) / sum(p.numel() for p in tuned.parameters())
    assert sum(p.numel() for p in tuned.parameters()) == total + size + head  # peft keeps the old head too
    assert not any("vision" in name for name in matrices)
    heads = trained(tuned) - matrices
    assert {name.split(".head.")[1] for name in heads} == {
        f"modules_to_save.default.{name}" for name, _ in make().head.named_parameters()
    }
    # the second matrix starts at zero, so that the first has no gradient yet
    assert after_a_step(tuned, batch) == {name for name in trained(tuned) if "lora_A" not in name}
    assert (tuned(**batch).logits - dense).abs().max() > 1e-3
    assert len(language_linears(make(), ("query", "value"))) == 2 * (2 * 2 * LAYERS + TEXT_LAYERS)
    with pytest.raises(ConfigError, match=r"linears: wanted some of \['dense', 'key', 'query', 'value'\], got"):
        lora(make(), linears=("q_proj",))


def test_lora_is_saved_with_the_head(tmp_path):
    from peft import PeftModel

    tuned, batch = lora(make(), rank=3)[0], inputs()
    after_a_step(tuned, batch)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, tuned(**batch).logits)


def test_adapters_stand_behind_the_feed_forwards_of_the_fusion():
    base, batch = make(), inputs()
    dense, total = base(**batch).logits, sum(p.numel() for p in base.parameters())
    model, share = bottlenecks(base, rank=5)
    model.double().eval()
    assert model is base and torch.equal(model(**batch).logits, dense)
    heads = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    size = 2 * LAYERS * (2 * 5 * WIDTH + 5 + WIDTH)
    assert share == (size + sum(p.numel() for p in model.head.parameters())) / (total + size)
    adapters = trained(model) - heads
    assert heads < trained(model) and len(adapters) == 2 * LAYERS * 4
    assert all(name.split(".")[0].endswith("_layers") and ".output.dense.1." in name for name in adapters)
    moved = after_a_step(model, batch)
    assert moved == heads | {name for name in adapters if ".up." in name}  # down has no gradient while up is zero
    behind = {}
    for number in range(2 * LAYERS):
        adapter = (model.text_layers if number < LAYERS else model.image_layers)[number % LAYERS].output.dense[1]
        stir(adapter)
        delta = plain_bottleneck(adapter.state_dict())
        behind[number] = lambda out, delta=delta: out + delta(out)
    with torch.no_grad():
        logits = model(**batch).logits
        torch.testing.assert_close(logits, plain(model, batch, behind=behind), rtol=1e-9, atol=1e-9)
        assert (logits - dense).abs().max() > 1e-2


def test_shares_of_the_published_model():
    """docs/fidelity.md, in parameters without the head."""
    d, head = 768, 1536 * 1536 + 1536 + 2 * 1536 + 1536 * 3129 + 3129
    adapter = 2 * d * 144 + 144 + d
    wanted = {
        lora: 8 * (12 * (4 * 2 * d + 2 * 5 * d) + 12 * (8 * 2 * d + 2 * 5 * d)),
        bottlenecks: 12 * adapter,
    }
    for method, size in wanted.items():
        settings = {"rank": 144} if method is bottlenecks else {}
        model = method(meta_model("meter-vqa"), **settings)[0]
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size + head
    assert sum(p.numel() for p in meta_model("meter-vqa").head.parameters()) == head


# -- the paper's table ---------------------------------------------------------------------------------------------
def settings_of(task: str) -> dict:
    return {
        "model": "tiny-meter",
        "model_settings": {"task": task},
        "task": f"boards-{task}",
        "task_settings": {"sizes": {"train": 6, "search": 4}} | ({"false_texts": 2} if task == "retrieval" else {}),
        "val_limit": 4,
        "test_limit": 5,
        "steps": 1,
        "batch_size": 3,
        "skip_rank": 6,
        "adapt_rank": 0,
        "plan": {"methods": {"adapter": {"rank": 5}}, "lora": {"rank": 3}},
        "search": {"warmup_steps": 1, "updates": 1, "train_steps_per_update": 1, "reward_batch_size": 4},
    }


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "retrieval"])
def test_every_row_of_table_4_runs(task, tmp_path):
    import pandas

    table = read_tables()["4"]
    jobs = expand({"table": 4, **settings_of(task)})
    assert [job["row"] for job in jobs] == [row["row"] for row in table["rows"]]
    frame = pandas.DataFrame([run_arm(job, tmp_path, log=lambda _: None) for job in jobs])
    assert frame["steps"].eq(1).all() and frame["k"].tolist() == [0, 0, 0, 4, 8]
    assert [len(mask) for mask in frame["mask"]] == frame["k"].tolist()
    for split in ("val", "test"):
        assert frame[f"{split}_accuracy"].between(0, 1).all() and frame[f"{split}_loss"].map(math.isfinite).all()
    shares = dict(zip(frame["row"], frame["trainable_share"], strict=True))
    assert shares.pop("full tuning") == 1.0 and all(0 < share < 0.2 for share in shares.values())
    macs = dict(zip(frame["row"], frame["macs"], strict=True))
    assert macs["DAS"] < macs["full tuning"] < macs["Adapter"] and macs["EAS"] < macs["full tuning"]
    found = beside(table, frame).set_index(["row", "column"])["measured"]
    columns = {
        "vqa": ["VQAv2", "trained, VQAv2", "MACs, VQAv2"],
        "nlvr2": ["NLVR2", "MACs, NLVR2"],
        "retrieval": ["Flickr30K IR R@1", "Flickr30K TR R@1"],
    }
    for column in columns[task]:
        assert found[:, column].notna().all(), column
    others = [column for name, some in columns.items() if name != task for column in some]
    assert found.unstack()[others].isna().all(axis=None)


def test_an_untuned_meter_is_asked_in_the_one_way_there_is(tmp_path):
    row = run_arm({"arm": {"method": "zero_shot"}, **settings_of("vqa")}, tmp_path, log=lambda _: None)
    assert row["trainable"] == 0 and math.isfinite(row["test_loss"])


def test_times_of_answers_are_refused_before_anything_is_tuned(tmp_path):
    settings = settings_of("vqa") | {"arm": {"method": "full"}, "plan": {"latency": {"new_tokens": 2}}}
    with pytest.raises(ConfigError, match=r"Plan.latency: times are of written answers, and Meter writes none"):
        run_arm(settings, tmp_path)
    assert not list(tmp_path.iterdir())


class Asked(Votes):
    """Questions to be answered in words."""

    def __init__(self, processor):
        super().__init__(processor, choices=("yes", "2"))


def test_a_task_that_asks_for_texts_is_put_to_a_head(tmp_path):
    _, processor = eas.load_model("tiny-meter", task="vqa")
    task = Asked(processor)
    assert for_a_head(task, 2).answers == ("2", "yes") and not isinstance(task, ClosedTask)
    settings = {"task": "test_meter_layers:Asked", "task_settings": {"closed": True}}
    settings |= {"val_limit": None, "test_limit": None, "arm": {"method": "zero_shot"}}
    with pytest.raises(TaskError, match=r"closed: votes has 2 answers, and the model's head 14; .*answers: 2 among"):
        run_arm(settings_of("vqa") | settings, tmp_path)
    captioned = eas.load_task("boards-retrieval", processor, sizes=dict.fromkeys(ROLES, 20))
    captioned.on_error = "raise"
    assert for_a_head(captioned, 1).answers == ("match",) and isinstance(for_a_head(captioned, 1), MatchingTask)


def test_a_column_reads_the_runs_of_the_stand_in_and_of_the_real_task():
    import pandas

    table, runs = read_tables()["4"], [{"row": "EAS", "task": "vqav2", "test_accuracy": 0.75, "trainable_share": 0.01}]
    found = beside(table, pandas.DataFrame(runs)).set_index(["row", "column"])["measured"]
    assert found["EAS", "VQAv2"] == 75 and found["EAS", "trained, VQAv2"] == 1
    assert found.notna().sum() == 2


def test_the_loss_of_a_task_that_ranks_is_that_of_its_batches(tmp_path):
    base, processor = eas.load_model("tiny-meter", task="retrieval")
    task = eas.load_task(
        "boards-retrieval", processor, false_texts=2, sizes={"train": 4, "search": 4, "val": 4, "test": 4}
    )
    frame = run_arms(task, lambda: base, [Arm("zero_shot")], out_dir=tmp_path, log=lambda _: None)
    assert frame["test_loss"][0] == task.score(base, "test")["loss"] > 0
    assert frame["test_accuracy"][0] == task.evaluate(base, "test")["accuracy"]
    assert set(frame["test_columns"][0]) == {f"{way}@{k}" for way in ("TR", "IR") for k in (1, 5, 10)}
