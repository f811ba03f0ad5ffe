"""Tasks: disjoint splits, templates, labels, parsing, and scores against brute force."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import toys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import eas_kit as eas
from eas_kit.errors import TaskError
from eas_kit.models.tiny.architecture import make_model, make_processor
from eas_kit.tasks import load_task
from eas_kit.tasks.base import ROLES, Example, Task
from eas_kit.tasks.digit_images import draw_board, draw_number, scan_indices
from eas_kit.tasks.periodic_table import elements, values


@pytest.fixture(scope="module")
def processor():
    texts = ["USER: \nQuestion: Context: Options: ASSISTANT: The answer is gold. BECAUSE: the number is 79."] * 50
    return make_processor(texts)


@pytest.fixture(scope="module")
def model(processor):
    return make_model(processor, seed=3).eval()


def test_table_of_elements():
    table = elements()
    assert [int(e.number) for e in table] == list(range(1, 119))
    gold = table[78]
    assert (gold.name, gold.symbol, gold.period, gold.group, gold.block) == ("gold", "Au", "6", "11", "d")
    assert {e.name for e in table if e.state == "liquid"} == {"bromine", "mercury"}
    assert values("period") == tuple("1234567")
    assert len({e.symbol for e in table}) == 118


def test_digit_scans_are_disjoint_and_complete():
    sets = {role: {int(i) for per in scan_indices(role) for i in per} for role in ROLES}
    assert sum(map(len, sets.values())) == len(set().union(*sets.values())) == 1797
    assert all(len(per) >= 15 for role in ROLES for per in scan_indices(role))


def test_pictures_hold_the_scans():
    board = np.arange(9).reshape(3, 3)
    picture = np.asarray(draw_board(board, "val", np.random.default_rng(0)))
    assert picture.shape == (24, 24, 3) and (picture[..., 0] == picture[..., 2]).all()
    from sklearn.datasets import load_digits

    data = load_digits()
    scans = (data.images * (255 / 16)).round().astype(np.uint8)
    for cell in range(9):
        r, c = divmod(cell, 3)
        patch = picture[8 * r : 8 * r + 8, 8 * c : 8 * c + 8, 0]
        assert any((scans[i] == patch).all() for i in scan_indices("val")[cell])
    number = np.asarray(draw_number(42, "test", np.random.default_rng(1)))[..., 0]
    filled = [number[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].any() for r in range(3) for c in range(3)]
    assert sum(filled) == 2
    with pytest.raises(TaskError, match="0 to 999, not 1000"):
        draw_number(1000, "test", np.random.default_rng(1))
    with pytest.raises(TaskError, match="there is no 'dev'"):
        scan_indices("dev")


@pytest.mark.parametrize("name", ["elements", "digits", "reading", "definitions"])
def test_examples_are_reproducible_and_consistent(name, processor):
    one, two = load_task(name, processor), load_task(name, processor)
    for role in ROLES:
        split = getattr(one, role)
        assert len(split) >= 100
        for i in (0, 1, 2, 57):
            a, b = split[i], getattr(two, role)[i]
            assert (a.question, a.choices, a.answer, a.explanation) == (b.question, b.choices, b.answer, b.explanation)
            assert [np.asarray(x).tolist() for x in a.images] == [np.asarray(x).tolist() for x in b.images]
            if a.choices:
                assert a.choices.count(a.answer) == 1 and len(set(a.choices)) == len(a.choices)
    with pytest.raises(IndexError):
        one.val[len(one.val)]


@pytest.mark.parametrize("disjoint", [True, False])
def test_elements_answers_are_true(processor, disjoint):
    task = load_task("elements", processor, disjoint_facts=disjoint)
    by_name, by_number = {e.name: e for e in elements()}, {e.number: e for e in elements()}
    pairs = {}
    for role in ROLES:
        pairs[role] = set()
        for example in task.split(role, 400):
            attribute = next(a for a in QUESTIONS if example.question.startswith(QUESTIONS[a]))
            if "NO" in example.categories:
                element = next(by_name[word] for word in example.question.rstrip("?").split() if word in by_name)
                assert example.context == "N/A" and attribute != "name"
            else:
                element = by_number[example.explanation.split()[3].rstrip(".")]
                assert element.name in example.explanation
            assert getattr(element, attribute) == example.answer
            assert example.answer in example.explanation
            pairs[role].add((element.number, attribute))
            assert ("IMG" in example.categories) == bool(example.images)
            if "TXT" in example.categories:
                assert f"number is {element.number}." in example.context
    shared = [pairs[a] & pairs[b] for a in ROLES for b in ROLES if a != b]
    assert any(shared) != disjoint


QUESTIONS = {
    "name": "Which element",
    "symbol": "Which symbol",
    "state": "What state",
    "category": "What kind",
    "period": "Which period",
    "group": "Which group",
    "block": "Which block",
    "discovered": "When was",
}


def test_elements_orders(processor):
    first, last = (load_task("elements", processor, order=order) for order in ("QCM-ALE", "QCM-LEA"))
    example = first.val[0]
    answer = f" The answer is {example.answer}."
    assert first.target_text(example) == (answer, f" BECAUSE: {example.explanation}")
    assert last.target_text(example) == (f" {example.explanation}{answer}", "")
    assert first.template != last.template
    with pytest.raises(TaskError, match="one of QCM-LEA, QCM-ALE, not 'QCM'"):
        load_task("elements", processor, order="QCM")


def test_digits_answers_are_true(processor):
    task = load_task("digits", processor)
    for example in task.split("val", 50):
        kind = example.categories[0]
        if kind == "count":
            board = [int(d) for d in example.explanation if d.isdigit()]
            asked = int(next(d for d in example.question if d.isdigit()))
            assert example.answer == str(board.count(asked))
        else:
            row = [int(d) for d in example.explanation if d.isdigit()]
            if kind == "maximum":
                assert example.answer == str(max(row))
            elif kind == "sum":
                assert example.answer == str(sum(row))
            else:
                column = next(i for i, w in enumerate(("left", "centre", "right")) if w in example.question)
                expected = str(row[column]) if kind == "cell" else ("even", "odd")[row[column] % 2]
                assert example.answer == expected


def test_collate_labels_only_the_target(processor):
    task = load_task("elements", processor)
    examples = [task.train[i] for i in range(5)]  # pictures and none in one batch
    batch = task.collate(examples)
    prompts = task.collate(examples, answers=False)
    assert batch["pixel_values"].shape == (sum(len(e.images) for e in examples), 3, 24, 24)
    for i, example in enumerate(examples):
        target, scored = task.target_ids(example)
        ids, labels = batch["input_ids"][i], batch["labels"][i]
        assert labels[labels != -100].tolist() == target
        start = int((labels != -100).nonzero()[0])
        prompt = prompts["input_ids"][i][prompts["attention_mask"][i].bool()]
        assert ids[:start].tolist() == prompt.tolist()  # the very prompt that generate gets
        assert int(batch["attention_mask"][i].sum()) == start + len(target)
        assert task.tokenizer.decode(target[:scored]) == task.target_text(example)[0]
    text_only = task.collate([e for e in examples if not e.images])
    assert "pixel_values" not in text_only
    with pytest.raises(TaskError, match="at least one example"):
        task.collate([])


@pytest.mark.parametrize(
    "text,expected",
    [
        (" The answer is Au. BECAUSE: it is.", "Au"),
        ("The answer is au.", "Au"),
        ("The answer is Ag", None),  # not an option
        (" Au.", None),
        ("", None),
        ("I think. The answer is Fe. The answer is Au.", "Fe"),
    ],
)
def test_elements_parser(processor, text, expected):
    example = Example(id="x", question="", answer="Au", choices=("Fe", "Au", "K"))
    assert load_task("elements", processor).parse(text, example) == expected


@pytest.mark.parametrize(
    "text,choices,expected",
    [
        (" The answer is 12. BECAUSE: row", (), "12"),
        (" The answer is 12.", ("1", "2"), None),
        (" The answer is even.", ("even", "odd"), "even"),
        ("12", (), None),
    ],
)
def test_digits_parser(processor, text, choices, expected):
    example = Example(id="x", question="", answer="12", choices=choices)
    assert load_task("digits", processor).parse(text, example) == expected


@torch.no_grad()
def test_score_equals_brute_force_and_generation(processor, model):
    task = load_task("elements", processor)
    got = task.score(model, "val", limit=7, batch_size=3)
    total, count = 0.0, 0
    for example in task.split("val", 7):
        batch = task.collate([example])
        log = model(**batch).logits[0, :-1].double().log_softmax(-1)
        labels = batch["labels"][0, 1:]
        for position in (labels != -100).nonzero().flatten().tolist():
            total -= log[position, labels[position]].item()
            count += 1
    assert got["loss"] == pytest.approx(total / count, rel=1e-5)
    assert got["count"] == 7
    training = model.training
    report = task.evaluate(model, "val", limit=7, batch_size=3)
    assert report["accuracy"] == 0 and report["unparsed"] == 7  # random weights
    assert report["loss"] == pytest.approx(got["loss"]) and model.training == training
    assert sum(report["column_counts"][c] for c in ("IMG", "TXT", "NO")) == 7


def test_accuracy_counts_what_is_written(processor, model):
    """A model that is pushed to write the target is right by both measures; pushed elsewhere it is wrong."""
    task = load_task("reading", processor)
    example = task.val[0]
    target, scored = task.target_ids(example)

    class Writer(torch.nn.Module):
        """Says the target, whatever it reads."""

        def __init__(self, ids):
            super().__init__()
            self.ids, self.nothing = ids, torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, labels=None, **_):
            logits = torch.zeros(*input_ids.shape, 2048)
            start = int((labels[0] != -100).nonzero()[0])
            for i, token in enumerate(self.ids):
                logits[0, start - 1 + i, token] = 9.0
            return type("Output", (), {"logits": logits})()

        def generate(self, input_ids, max_new_tokens, **_):
            return torch.cat([input_ids, torch.tensor([self.ids[:max_new_tokens]])], 1)

    right = task.evaluate(Writer(target), "val", limit=1)
    assert right["accuracy"] == 1 and task.score(Writer(target), "val", limit=1)["accuracy"] == 1
    wrong = [*target[: scored - 2], (target[scored - 2] + 1) % 2048, *target[scored - 1 :]]
    assert task.score(Writer(wrong), "val", limit=1)["accuracy"] == 0


QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
SMOL = (  # the blank after the colon goes where a picture follows
    "{% for m in messages %}User{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template,token,picture",
    [
        ("its own", "<image>", "<image>"),
        (QWEN, "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"),
        (SMOL, "<image>", "<image>"),
        (None, "<start_of_image>", "<start_of_image>"),
        (QWEN.replace("image_pad", "other"), "<|image_pad|>", "<|image_pad|>"),
    ],
    ids=["bundled", "qwen", "smol", "no template", "another token"],
)
def test_reading_writes_pictures_as_the_processor_wants_them(processor, monkeypatch, template, token, picture):
    if template != "its own":
        monkeypatch.setattr(processor, "chat_template", template)
        monkeypatch.setattr(processor, "image_token", token)
    task = load_task("reading", processor)
    seen = next(e for e in task.val if e.images)
    assert task.prompt_text(seen) == f"{picture} {seen.question}"
    plain = next(e for e in task.val if not e.images)
    assert task.prompt_text(plain) == plain.question
    monkeypatch.setattr(processor, "image_token", None)
    with pytest.raises(TaskError, match="reading: LlavaProcessor names no image_token.*take elements or digits"):
        load_task("reading", processor)


def test_options_pick_the_likeliest(processor, model):
    task = load_task("elements", processor)
    report = task.evaluate(model, "val", limit=6, method="options")
    assert report["unparsed"] == 0 and report["method"] == "options"
    with pytest.raises(TaskError, match="has no options"):
        load_task("reading", processor).evaluate(model, "val", limit=2, method="options")
    with pytest.raises(TaskError, match="'generate' or 'options'"):
        task.evaluate(model, "val", limit=2, method="guess")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(TaskError, match="elements: the model's loss of '.+' as answer to .+ is NaN; in half precision"):
        task.evaluate(broken, "val", limit=2, method="options")


def test_errors_name_what_exists(processor):
    with pytest.raises(TaskError, match="choose one of aid, .*conv.*, vqav2, or give your own as 'module:Class'"):
        load_task("chess", processor)
    with pytest.raises(TaskError, match=r"^load_task\(name, processor\): wanted the name of a task first, got a Llava"):
        load_task(processor, "digits")
    with pytest.raises(TaskError, match="there is no 'dev'"):
        load_task("digits", processor).split("dev")
    with pytest.raises(TaskError, match="digits: limit is a number of examples from 1 up, or None for all; not 0"):
        load_task("digits", processor).split("val", 0)
    for name in ("definitions", "digits", "elements", "reading"):
        with pytest.raises(TaskError, match=f"{name}: sizes are by split, train, search, val, test; there is no tset"):
            load_task(name, processor, sizes={"tset": 3})
        with pytest.raises(TaskError, match=f"{name}: the size of val is a whole number from 1 up, not 0"):
            load_task(name, processor, sizes={"val": 0})
        assert len(load_task(name, processor, sizes={"val": 7}).val) == 7
    with pytest.raises(TaskError, match="ask for no more in test"):
        load_task("definitions", processor, sizes={"test": 301})


class TestTextModels:
    """A model of text alone comes with a tokenizer and no processor."""

    TEMPLATE = "{% for m in messages %}<s>USER: {{ m['content'] + '' }}{% endfor %} ASSISTANT:"  # fails on parts

    @staticmethod
    def tokenizer(**settings):
        """Bytes: every text has tokens, and they decode to that text."""
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
        inner = Tokenizer(models.BPE(vocabulary, merges=[]))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | settings
        return PreTrainedTokenizerFast(tokenizer_object=inner, **ends)

    @staticmethod
    def model():
        return toys.make_llama(vocab_size=263, max_position_embeddings=499)

    @pytest.mark.parametrize("template", [None, TEMPLATE])
    def test_definitions_are_tuned_and_scored(self, template):
        task = load_task("definitions", self.tokenizer(chat_template=template))
        examples = task.train[:3]
        batch = task.collate(examples)
        for row, example in enumerate(examples):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            kept = ids[batch["attention_mask"][row].bool()]
            assert task.tokenizer.decode(kept) == f"{example.question} {example.answer}</s>"
            assert task.tokenizer.decode(labels[labels != -100]) == f" {example.answer}</s>"
        net = eas.attach(self.model(), eas.EASConfig(skip_rank=6, adapt_rank=4))
        net.mask = [1]
        before = task.score(net, limit=5, batch_size=3)
        eas.fit(net, task, eas.TrainConfig(max_steps=1, batch_size=3, progress=False))
        after = task.evaluate(net, limit=5, batch_size=3)
        assert after["loss"] != before["loss"] and after["count"] == 5

    def test_chat_template_of_text_alone(self):
        class Echo(Task):
            name = "echo"

            def question_text(self, example):
                return example.question

            def target_text(self, example):
                return f" {example.answer}.", ""

            def parse(self, text, example):
                return text

        example = Example(id="0", question="which metal?", answer="gold")
        task = Echo(self.tokenizer(chat_template=self.TEMPLATE))
        prompt = task.collate([example], answers=False)["input_ids"][0]
        assert task.tokenizer.decode(prompt) == "<s>USER: which metal? ASSISTANT:"
        assert len(task.answers(self.model(), [example, example])) == 2
        with pytest.raises(TaskError, match="echo: this .* has no chat template.*set its chat_template"):
            Echo(self.tokenizer()).collate([example])
        picture = Example(
            id="1", question="which?", answer="gold", images=(draw_number(7, "val", np.random.default_rng(0)),)
        )
        with pytest.raises(TaskError, match="echo: examples with pictures need a processor that reads them"):
            task.collate([picture])

    @pytest.mark.parametrize("name", ["elements", "digits", "reading"])
    def test_pictures_need_a_model_that_reads_them(self, name):
        with pytest.raises(TaskError, match=f"{name}: .*needs a model that reads pictures.*take definitions"):
            load_task(name, self.tokenizer())

    def test_what_is_no_processor(self, model, processor):
        for wrong, kind in (((model, processor), "tuple"), (model, "Llava"), ("tiny", "str")):
            with pytest.raises(TaskError, match=f"wanted a processor or tokenizer, got a {kind}.*pass the second"):
                load_task("definitions", wrong)
        with pytest.raises(TaskError, match="no token to pad a batch with.*tokenizer.pad_token ="):
            load_task("definitions", self.tokenizer(pad_token=None))
