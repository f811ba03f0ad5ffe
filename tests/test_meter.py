"""METER: its forward and its skipped sites against plain float64 loops, its checkpoint, its counts, its refusals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import meter_reference as reference
import pytest
import torch
from meter_reference import ANSWERS, LAYERS, PAD, SIDE, VOCAB, Plain, checkpoint, config, plain_delta
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import eas_kit as eas
from eas_kit.errors import ConfigError, EASError, MergeError, UnsupportedModelError
from eas_kit.meta import meta_model
from eas_kit.models.meter import Meter, paper_size
from eas_kit.models.meter_checkpoint import fill, resize_positions
from eas_kit.post_norm import attended, post_norm_sites
from eas_kit.slots import skipping

RANK = 6
EAS = {"skip_rank": RANK, "adapt_rank": 0, "scale": 1.7, "temperature": 3.0}
LENGTHS = (7, 4, 9)
MASK = [1, 3, LAYERS, 2 * LAYERS + 2, 3 * LAYERS, 4 * LAYERS - 1]  # every lane


def make(task: str = "vqa", seed: int = 0) -> Meter:
    torch.manual_seed(seed)
    model = Meter._from_config(config(task), attn_implementation="sdpa").double()
    for name, parameter in model.head.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1.0) + (name == "1.weight")
    model.eval().report = fill(model, checkpoint(seed))
    return model


def inputs(task: str = "vqa", seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded texts of LENGTHS, pictures."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (3, max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    shape = (3, 2, 3, SIDE, SIDE) if task == "nlvr2" else (3, 3, SIDE, SIDE)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long(), "pixel_values": pixels}


def rows(batch: dict[str, torch.Tensor]):
    for ids, mask, pixels in zip(*batch.values(), strict=True):
        yield ids[mask.bool()].tolist(), pixels


def stirred(model: Meter) -> eas.EASModel:
    net = eas.attach(model, eas.EASConfig(**EAS)).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in net.adapters.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    return net.eval()


# ------------------------------------------------------------------------------------------------------- forward
@pytest.mark.parametrize("attention", ["eager", "sdpa", None])
def test_forward_of_a_checkpoint_is_the_plain_one(attention):
    model, batch = make(), inputs()
    if attention is None:  # as transformers chooses
        model = Meter(config()).double().eval()
        fill(model, checkpoint())
    else:
        model.set_attn_implementation(attention)
    with torch.no_grad():
        logits = model(**batch).logits
    plain, head = Plain(checkpoint()), model.head.state_dict()
    wanted = torch.stack([plain.head(head, plain.pooled(*row)) for row in rows(batch)])
    assert logits.shape == (3, ANSWERS)
    bound = 1e-5 if attention == "eager" else 1e-9  # CLIP's eager attention has its softmax in float32
    torch.testing.assert_close(logits, wanted, rtol=bound, atol=bound)
    assert (logits.std(0) > 1e-3).any()  # the examples differ


def test_nlvr2_is_two_passes_with_types_of_their_own():
    model, batch = make("nlvr2"), inputs("nlvr2")
    plain = Plain(checkpoint())
    with torch.no_grad():
        wanted = []
        for ids, pixels in rows(batch):
            both = torch.cat([plain.pooled(ids, pixels[which], 1 + which) for which in (0, 1)])
            wanted.append(plain.head(model.head.state_dict(), both))
        torch.testing.assert_close(model(**batch).logits, torch.stack(wanted), rtol=1e-9, atol=1e-9)
        assert torch.equal(model.token_type.weight[2], model.token_type.weight[1])
        model.token_type.weight[2] += 1  # from here on they differ, and the second picture alone sees it
        changed = model.features(*batch.values())
        assert not torch.allclose(
            changed[:, 2 * reference.WIDTH :], model.features(*batch.values())[:, : 2 * reference.WIDTH]
        )
        assert (model(**batch).logits - torch.stack(wanted)).abs().max() > 1e-3


def test_retrieval_scores_texts_of_one_picture():
    model, batch = make("retrieval"), inputs("retrieval")
    state = checkpoint()
    with torch.no_grad():
        single = model(**batch).logits
        plain = Plain(state)
        weight, bias = state["itm_score.fc.weight"][1], state["itm_score.fc.bias"][1]  # where the head starts from
        wanted = torch.stack([weight @ plain.pooled(*row) + bias for row in rows(batch)])
        torch.testing.assert_close(single[:, 0], wanted, rtol=1e-9, atol=1e-9)
        texts, masks = (batch[name][None].expand(2, -1, -1) for name in ("input_ids", "attention_mask"))
        pictures = batch["pixel_values"][:2]
        out = model(input_ids=texts, attention_mask=masks, pixel_values=pictures, labels=torch.tensor([0, 2]))
        assert out.logits.shape == (2, 3)
        for picture in range(2):
            for text in range(3):
                row = {
                    "input_ids": batch["input_ids"][text : text + 1],
                    "pixel_values": pictures[picture : picture + 1],
                }
                one = model(**row, attention_mask=batch["attention_mask"][text : text + 1]).logits
                torch.testing.assert_close(out.logits[picture, text], one[0, 0], rtol=1e-9, atol=1e-9)
        logged = torch.log_softmax(out.logits, -1)
        torch.testing.assert_close(out.loss, -(logged[0, 0] + logged[1, 2]) / 2)


def test_losses():
    model, batch = make(), inputs()
    logits = model(**batch).logits
    labels = torch.tensor([3, 0, 10])
    torch.testing.assert_close(
        model(**batch, labels=labels).loss, -torch.log_softmax(logits, -1)[range(3), labels].mean()
    )
    soft = torch.rand(3, ANSWERS, dtype=torch.float64)
    p = torch.sigmoid(logits)
    wanted = -(soft * p.log() + (1 - soft) * (1 - p).log()).sum(-1).mean()
    torch.testing.assert_close(model(**batch, labels=soft).loss, wanted)
    half = model.bfloat16()(**batch, labels=soft.float())
    assert half.logits.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(wanted.item(), rel=0.05)


# ------------------------------------------------------------------------------------------------- skipped sites
def test_skipped_sites_are_the_plain_formula():
    net, batch = stirred(make()), inputs()
    with torch.no_grad():
        dense = net(**batch).logits
        net.mask = MASK
        logits = net(**batch).logits
        skipped = {}
        for site in MASK:
            pia = net.adapters[str(site)]["skip"].state_dict()
            skipped[site] = plain_delta(pia, groups=2, scale=1.7, temperature=3.0)
        plain = Plain(checkpoint(), skipped)
        wanted = torch.stack([plain.head(net.base.head.state_dict(), plain.pooled(*row)) for row in rows(batch)])
        torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
        assert (logits - dense).abs().max() > 1e-2  # the control
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)
        batch["input_ids"][1, 4] = PAD
        padded = net(**batch).logits
    torch.testing.assert_close(padded, logits)  # what stands at padding enters no mean


def test_a_new_adapter_is_the_norm_alone_and_so_is_skipping():
    model, batch = make(), inputs()
    plain = Plain(checkpoint(), {site: lambda x, mean: torch.zeros_like(x) for site in MASK})
    before = dict(model.named_modules())
    with torch.no_grad():
        wanted = torch.stack([plain.head(model.head.state_dict(), plain.pooled(*row)) for row in rows(batch)])
        with skipping(model, mha=MASK):
            torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-9, atol=1e-9)
        assert dict(model.named_modules()) == before
        net = eas.attach(model, eas.EASConfig(**EAS)).double().eval()
        net.mask = MASK
        torch.testing.assert_close(net(**batch).logits, wanted, rtol=1e-9, atol=1e-9)
        with pytest.raises(ConfigError, match=r"text_layers.1.attention is skipped already; set net.mask = \(\)"):
            skipping(net, mha=[1]).__enter__()
        net.mask = ()
        with (
            skipping(net, mha=[1]),
            pytest.raises(ConfigError, match=r"skipping.*holds text_layers.1.attention \(text"),
        ):
            net.mask = [2]


def test_detach_and_saving(tmp_path):
    model, batch = make(), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = model(**batch).logits
    net = stirred(model)
    net.mask = MASK
    assert net.config.modules_to_save == ("head",)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"adapters", "base"}
    assert all(name.startswith("base.head.") for name in trained if name.startswith("base."))
    optimizer = torch.optim.SGD(net.trainable_parameters(active=True), lr=0.5)
    net.train()
    net(**batch, labels=torch.tensor([1, 2, 3])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.trainable_parameters(active=True))
    optimizer.step()
    net.eval()
    with torch.no_grad():
        tuned = net(**batch).logits
        net.save_pretrained(tmp_path / "tuned")
        assert json.loads((tmp_path / "tuned/mask.json").read_text())["num_sites"] == 4 * LAYERS
        card = (tmp_path / "tuned/README.md").read_text()
        assert "net(**inputs).logits" in card and "generate" not in card
        again = eas.load(tmp_path / "tuned", base=make())
        assert again.mask == tuple(MASK)
        assert torch.equal(again.eval()(**batch).logits, tuned)
        assert (tuned - dense).abs().max() > 1e-3
    base = eas.detach(net)
    assert base is model
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert torch.equal(base(**batch).logits, dense)


def test_a_recomputed_forward_gives_the_same_gradients():
    net, batch = stirred(make()), inputs()
    net.mask = MASK
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in (*net.base.text_layers, *net.base.image_layers):
        for attention in (layer.attention, layer.crossattention):
            attention.self.dropout.p = 0.0
    found = []
    for recompute in (False, True):
        if recompute:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        net.zero_grad()
        net(**batch, labels=torch.tensor([1, 2, 3])).loss.backward()
        found.append([p.grad.clone() for p in net.trainable_parameters(active=True)])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------------ the sites
def test_the_sites_of_the_published_model_are_named_in_the_paper_order():
    table = eas.describe("meter-vqa")
    lanes = [("text self", "text_layers", "attention"), ("text cross", "text_layers", "crossattention")]
    lanes += [("image self", "image_layers", "attention"), ("image cross", "image_layers", "crossattention")]
    assert table.site.tolist() == list(range(24))
    assert table.name.tolist() == [f"{name} {layer}" for name, _, _ in lanes for layer in range(6)]
    assert table.path.tolist() == [f"{layers}.{n}.{slot}" for _, layers, slot in lanes for n in range(6)]
    assert set(table.params) == {4 * (768 * 768 + 768) + 2 * 768}
    assert not table.mergeable.any() and table.reason.str.contains("LayerNorm comes after the sum").all()


def test_sites_of_something_else_are_refused():
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Module()
            self.layer.attention = torch.nn.Linear(3, 3)

    with pytest.raises(UnsupportedModelError, match="layer.attention: wanted a BERT attention .*got a Linear"):
        post_norm_sites(Other(), [("a", "layer", "attention")])


def test_positions_that_an_attention_may_read():
    context = torch.zeros(2, 3, 5)
    wanted = torch.tensor([[True, True, False], [True, False, False]])
    four = wanted[:, None, None].expand(2, 1, 4, 3)
    for mask in (wanted, wanted.long(), four, torch.where(four, 0.0, -1e30)):
        assert torch.equal(attended(context, mask), wanted)
    assert attended(context, None).all() and attended(context, None).shape == (2, 3)


# ------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapt_rank": 4}, r"adapt_rank: wanted 0, got 4: text_layers.0.attention is a post-norm attention"),
        ({"source": "ffn_norm"}, r"source: wanted 'attention_norm', got 'ffn_norm'"),
        ({"kinds": ("mha", "ffn")}, r"kinds: wanted \('mha',\) or \('layer',\), got \('mha', 'ffn'\): of Meter"),
    ],
)
def test_settings_that_post_norm_sites_do_not_have(settings, message):
    model = make()
    with pytest.raises(ConfigError, match=message):
        eas.attach(model, eas.EASConfig(**EAS | settings))
    assert eas.attach(model, eas.EASConfig(**EAS)).num_sites == 4 * LAYERS  # it is free still


def test_no_text_and_no_merge():
    net, batch = stirred(make()), inputs()
    net.mask = MASK
    with pytest.raises(EASError, match=r"net.generate: Meter writes no text.*net\(\*\*inputs\).logits.*post-norm"):
        net.generate(**batch)
    with pytest.raises(MergeError, match=r"generate\(merge=True\): the adapters of Meter cannot be folded.*post-norm"):
        net.generate(**batch, merge=True)
    with pytest.raises(EASError, match="net.prefill: Meter writes no text"):
        net.prefill(**batch)
    with pytest.raises(EASError, match="writes no text"):
        eas.check_merge(net, batch)
    with pytest.raises(
        MergeError, match=r"cannot merge: site 0 \(text_layers.0.attention\): its LayerNorm comes after"
    ):
        eas.static_merge(net, SimpleNamespace(train=[1], val=[1], collate=None, evaluate=None))
    with pytest.raises(ConfigError, match="skips all 20 attentions"):
        net.mask = range(4 * LAYERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, r"pixel_values: wanted \(3, 3, 15, 15\) for task 'vqa' at 15 pixels, got nothing"),
        ({"pixel_values": torch.zeros(3, 3, 12, 12)}, r"got \(3, 3, 12, 12\); take the processor"),
        ({"input_ids": torch.zeros(3, 2, 5, dtype=torch.long)}, r"input_ids: wanted \(B, S\) for task 'vqa'"),
        ({"labels": torch.zeros(3, 2, dtype=torch.long)}, r"labels: wanted classes \(3,\).*got \(3, 2\) torch.int64"),
        ({"labels": torch.zeros(3, 7)}, r"soft targets \(3, 11\) in float, got \(3, 7\) torch.float32"),
        ({"token_type_ids": torch.zeros(3, 9)}, r"there is no argument 'token_type_ids'; wanted input_ids"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    with pytest.raises(ConfigError, match=message):
        make()(**inputs() | change)


# ----------------------------------------------------------------------------------------------------- checkpoint
def test_what_becomes_of_every_name():
    for visual in ("vit_model.visual.", "vit_model."):
        state = checkpoint(visual=visual)
        extra = {"vit_model.token_embedding.weight": torch.zeros(2, 3)} if "visual" in visual else {}
        model = Meter._from_config(config())
        report = fill(model, state | extra)
        assert report.missing == report.misfits == report.unexpected == []
        assert report.new == [f"head.{name}" for name in model.head.state_dict()]
        last = [name for name in state if f"resblocks.{BLOCK_LEFT_OUT}." in name]
        heads = [name for name in state if name.startswith(("itm_score", "mlm_score", "text_transformer.pooler"))]
        assert len(last) == 12
        others = [f"{visual}proj", "text_transformer.embeddings.position_ids", *extra]
        assert sorted(report.unused) == sorted([*last, *heads, *others])
        assert report.loaded == len(model.state_dict()) - len(report.new)


BLOCK_LEFT_OUT = reference.BLOCKS


def test_a_checkpoint_tuned_on_brings_its_head():
    state = checkpoint()
    source = make()
    tuned = state | {f"vqa_classifier.{name}": value for name, value in source.head.state_dict().items()}
    model = Meter._from_config(config())
    assert fill(model, tuned).new == []
    assert torch.equal(model.head[3].weight.double(), source.head[3].weight.float().double())
    other = Meter._from_config(config(num_labels=7))
    report = fill(other, tuned)  # a head of another size is not his
    assert len(report.new) == 4 or "head.3.weight" in report.new


def test_missing_unexpected_and_misshapen_names_are_listed():
    state = checkpoint()
    del state["cross_modal_text_pooler.dense.bias"], state["vit_model.visual.ln_post.weight"]
    state["cross_modal_text_transform.weight"] = torch.zeros(3, 5)
    state["strange.weight"] = torch.zeros(2)
    model = Meter._from_config(config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(EASError) as found:
        fill(model, state)
    for part in (
        "2 missing (vision.post_layernorm.weight, text_pooler.bias)",
        "1 of another shape (text_transform.weight (3, 5), wanted (26, 14))",
        "1 unexpected (strange.weight)",
    ):
        assert part in str(found.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_resizing_positions():
    same = torch.randn(1 + 16, 5)
    assert resize_positions(same, 4) is same
    flat = torch.ones(1 + 9, 5) * torch.arange(5.0)
    assert torch.allclose(resize_positions(flat, 7)[1:], torch.arange(5.0).expand(49, 5), atol=1e-6)
    with pytest.raises(EASError, match="wanted position embeddings of a class token and a square of patches, got 12"):
        resize_positions(torch.zeros(12, 5), 3)


@pytest.fixture
def tokenizer_folder(tmp_path):
    words = {word: number for number, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", "what", "is", "it", "?"))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_load_model_from_a_lightning_file(tmp_path, tokenizer_folder):
    file = tmp_path / "meter.ckpt"
    lightning = {"epoch": 9, "global_step": 100, "state_dict": checkpoint() | {"strange.weight": torch.zeros(2)}}
    torch.save(lightning, file)
    names = ["yes", "no", "two"]
    settings = {"checkpoint": file, "tokenizer": tokenizer_folder, "config": config()}
    with pytest.warns(
        UserWarning, match="1 names of the checkpoint are unknown and left out, the first: strange.weight"
    ):
        model, processor = eas.load_model("meter", answers=names, dtype="float64", **settings)
    assert not model.training and model.dtype == torch.float64
    assert model.config.num_labels == 3 and list(model.config.id2label.values()) == names
    assert model.checkpoint_report.unexpected == ["strange.weight"]
    batch, plain = inputs(), Plain(checkpoint())
    with torch.no_grad():
        wanted = torch.stack([plain.pooled(*row) for row in rows(batch)])
        torch.testing.assert_close(model.features(*batch.values()), wanted, rtol=1e-9, atol=1e-9)
    made = processor(text=["what is it ?"], images=[torch.zeros(3, 40, 20, dtype=torch.uint8)], return_tensors="pt")
    assert made["pixel_values"].shape == (1, 3, SIDE, SIDE) and made["input_ids"].tolist() == [[4, 5, 6, 7]]


def test_a_tuned_meter_finds_its_checkpoint_and_its_task_again(tmp_path, tokenizer_folder, monkeypatch):
    file = tmp_path / "meter.ckpt"
    torch.save({"state_dict": checkpoint()}, file)
    sizes = lambda task, image_size=None: config(task)  # noqa: E731, the published ones are large
    monkeypatch.setattr("eas_kit.models.meter_loading.paper_size", sizes)
    model, _ = eas.load_model("meter", checkpoint=file, tokenizer=tokenizer_folder, task="nlvr2", dtype="float64")
    net, batch = stirred(model), inputs("nlvr2")
    net.mask = MASK
    net.save_pretrained(tmp_path / "tuned")
    about = json.loads((tmp_path / "tuned/adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == "meter" and about["base_model_options"]["task"] == "nlvr2"
    again = eas.load(tmp_path / "tuned").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, net(**batch).logits)
    file.rename(tmp_path / "moved.ckpt")
    with pytest.raises(EASError, match="there is no checkpoint .*meter.ckpt"):
        eas.load(tmp_path / "tuned")
    again = eas.load(tmp_path / "tuned", checkpoint=tmp_path / "moved.ckpt")
    assert again.mask == tuple(MASK)


def test_a_tuned_meter_of_other_sizes_is_found_again(tmp_path, tokenizer_folder):
    file = tmp_path / "meter.ckpt"
    torch.save({"state_dict": checkpoint()}, file)
    settings = {"checkpoint": file, "tokenizer": tokenizer_folder, "config": config("nlvr2"), "dtype": "float64"}
    model, _ = eas.load_model("meter", task="nlvr2", **settings)
    net, batch = stirred(model), inputs("nlvr2")
    net.mask = MASK
    net.save_pretrained(tmp_path / "tuned")
    for again in (eas.load(tmp_path / "tuned"), eas.load(tmp_path / "tuned", config=config("nlvr2"))):
        with torch.no_grad():
            assert torch.equal(again.eval()(**batch).logits, net(**batch).logits)


@pytest.mark.parametrize("labels", [2, 3, 3129])
def test_the_number_of_answers_is_kept(labels, tmp_path):
    config(num_labels=labels).save_pretrained(tmp_path)
    assert type(config()).from_pretrained(tmp_path).num_labels == labels
    assert [len(config(task).id2label) for task in ("nlvr2", "retrieval")] == [2, 1]
    assert type(config())().num_labels == 3129


def test_a_whole_meter_in_a_folder(tmp_path, tokenizer_folder):
    model = make()
    model.save_pretrained(tmp_path / "whole")
    file = tmp_path / "meter.ckpt"
    torch.save(checkpoint(), file)  # a plain state dict
    _, processor = eas.load_model("meter", checkpoint=file, tokenizer=tokenizer_folder, config=config())
    processor.save_pretrained(tmp_path / "whole")
    again, _ = eas.load_model(tmp_path / "whole")
    assert type(again) is Meter and again.config.num_labels == ANSWERS
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs()).logits, model(**inputs()).logits, rtol=1e-12, atol=1e-12)


class Harmful:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, EASError, "wanted checkpoint=, the path of meter_clip16_288_roberta_pretrain.ckpt"),
        ({"checkpoint": "none.ckpt"}, EASError, "there is no checkpoint none.ckpt"),
        ({"checkpoint": "harm.ckpt"}, EASError, r"cannot be read with weights_only=True .*save its tensors alone"),
        ({"checkpoint": "cut.ckpt"}, EASError, "cut.ckpt cannot be read with weights_only=True"),
        ({"checkpoint": "empty.ckpt"}, EASError, "holds no state_dict of tensors"),
        ({"checkpoint": "x", "task": "captions"}, ConfigError, "task: wanted one of .*'nlvr2'.*got 'captions'"),
        ({"checkpoint": "x", "image": 3}, ConfigError, "there is no setting 'image'; wanted some of task"),
        (
            {"checkpoint": "x", "image_size": 100},
            ConfigError,
            "image_size: wanted a multiple of the 16 pixels.*got 100",
        ),
        (
            {"checkpoint": "x", "task": "nlvr2", "answers": 3},
            ConfigError,
            "answers= is for task 'vqa', not for 'nlvr2'",
        ),
        ({"checkpoint": "x", "answers": ["a", "a"]}, ConfigError, "two or more, each once, got 2, of which 1 differ"),
        ({"checkpoint": "x", "answers": "yes"}, ConfigError, "answers: wanted a list of texts or a number, got 'yes'"),
        ({"checkpoint": "x", "answers": 1}, ConfigError, "answers: wanted two or more, got 1"),
        ({"checkpoint": "x", "config": {}}, ConfigError, "config: wanted a MeterConfig, got a dict"),
        ({"checkpoint": "good.ckpt", "tokenizer": "./nowhere"}, EASError, "no tokenizer './nowhere'"),
    ],
)
def test_load_model_says_what_is_wrong(settings, error, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": checkpoint()}, "good.ckpt")
    torch.save({"state_dict": {"a": Harmful()}}, "harm.ckpt")
    torch.save({"epoch": 3}, "empty.ckpt")
    whole = (tmp_path / "good.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(error, match=message):
        eas.load_model("meter", **settings)
    assert "run" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- counts
def whole(counted: dict[str, int]) -> float:
    return counted["total"] + counted["other"]


def test_multiply_accumulates_of_the_paper():
    """Table 4: 93.2 G for VQA at 384 pixels, 52.9 G for NLVR2 at 288, which is one of its two passes."""
    assert whole(eas.measure.flops("meter-vqa", tokens=40)) == pytest.approx(93.2e9, rel=0.005)
    one = eas.measure.flops(paper_size("vqa", 288), tokens=40)
    assert whole(one) == pytest.approx(52.9e9, rel=0.005)
    both = eas.measure.flops("meter-nlvr2", tokens=40)
    text = 12 * (4 * 40 * 768**2 + 2 * 40**2 * 768 + 8 * 40 * 768**2)  # RoBERTa runs once for both
    assert whole(both) == pytest.approx(2 * whole(one) - text, rel=1e-3)


def test_counts_by_hand():
    tokens, patches, d = 40, 577, 768
    counted = eas.measure.flops("meter-vqa", tokens=tokens)
    fusion = 4 * (tokens + patches) * d * d  # self
    fusion += 2 * (tokens + patches) * d * d * 2  # cross: queries and outputs, keys and values, of both streams
    projections = 6 * fusion + 12 * 4 * tokens * d * d + 11 * 4 * patches * d * d
    scores = (
        6 * 2 * d * (tokens**2 + patches**2 + 2 * tokens * patches) + 12 * 2 * tokens**2 * d + 11 * 2 * patches**2 * d
    )
    assert counted["attention_projections"] == projections
    assert counted["attention_scores"] == scores
    assert counted["ffn"] == 8 * d * d * (18 * tokens + 17 * patches)
    answers = 2 * d * 2 * d + 2 * d * 3129
    assert counted["other"] == 576 * 768 * d + (tokens + patches) * d * d + 2 * d * d + answers


def test_skipped_sites_are_counted_with_their_adapters():
    net = eas.attach(meta_model("meter-vqa"), eas.EASConfig(skip_rank=144, adapt_rank=0))
    dense = eas.measure.flops(net, tokens=40)
    assert dense == eas.measure.flops("meter-vqa", tokens=40)
    d, r, tokens, patches = 768, 144, 40, 577
    net.mask = [0, 6, 12, 18]
    counted = eas.measure.flops(net, tokens=40)
    queries = 2 * (tokens + patches)  # rows that the four adapters see, two a stream
    adapter = queries * (d * r + r * d // 2)  # down, and the grouped up (2 blocks)
    adapter += 4 * (d * r + 2 * d)  # pooled path and router
    mixing = 4 * 2 * d * (r // 2 + 1)  # w0 Bu + w1 Du and their biases
    assert counted["adapter"] == pytest.approx(adapter + mixing, rel=1e-3)
    gone = 4 * (tokens + patches) * d * d + 2 * (tokens**2 + patches**2) * d
    gone += 4 * (tokens + patches) * d * d + 2 * 2 * tokens * patches * d
    assert dense["total"] - (counted["total"] - counted["adapter"]) == gone
    shares = eas.measure.parameters(net)
    one = 2 * r * (d + 1) + 2 * (d * r // 2 + d) + 2 * (d + 1)
    assert shares["active"]["skip"] == 4 * one
    assert shares["active"]["modules_to_save"] == (2 * d) ** 2 + 3 * 2 * d + (2 * d + 1) * 3129
    with pytest.raises(ConfigError, match=r"flops: mask= counts attentions that are merged away.*Meter cannot"):
        eas.measure.flops("meter-vqa", mask=[1], tokens=40)


def test_the_net_counts_the_same_on_data_and_without():
    net, batch = stirred(make()), inputs()
    net.mask = MASK
    one = {name: value[:1] for name, value in batch.items()}
    one["input_ids"], one["attention_mask"] = one["input_ids"][:, :7], one["attention_mask"][:, :7]
    assert eas.measure.flops(net, one) == eas.measure.flops(net, tokens=7)


def test_paper_sizes_are_checked():
    with pytest.raises(ConfigError, match="METER: wanted a task of .*got 'ocr'"):
        paper_size("ocr")
    assert [paper_size(task).vision_config.image_size for task in ("vqa", "nlvr2", "retrieval")] == [384, 288, 384]
