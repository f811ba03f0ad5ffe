"""Tasks with a closed list of answers: boards, METER's three; scores, metrics, search and tuning on a small METER."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import eas_kit as eas
from eas_kit import scorers
from eas_kit.errors import ConfigError, DataError, TaskError, UnsupportedModelError
from eas_kit.models.tiny_meter.architecture import make_model, make_processor
from eas_kit.tasks import board_texts as said
from eas_kit.tasks.base import ROLES, Example, Task
from eas_kit.tasks.closed import closed
from eas_kit.tasks.digit_images import scan_indices
from eas_kit.tasks.matching import matching
from eas_kit.tasks.metrics import vqa_accuracy

NAMES = {"vqa": "boards-vqa", "nlvr2": "boards-nlvr2", "retrieval": "boards-retrieval"}
SMALL = {"train": 64, "search": 24, "val": 40, "test": 20}
EAS = eas.EASConfig(skip_rank=4, adapt_rank=0)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def load(head: str, processor, **settings):
    return eas.load_task(NAMES[head], processor, sizes=SMALL, **settings)


class Oracle(nn.Module):
    """Answers as it is told, in the manner of METER. `say(input_ids row, pixels row)`: scores (labels,)."""

    def __init__(self, say) -> None:
        super().__init__()
        self.say, self.one = say, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask, pixel_values, labels=None):
        if input_ids.dim() == 3:
            logits = torch.stack(
                [torch.cat([self.say(t, p) for t in texts]) for texts, p in zip(input_ids, pixel_values, strict=True)]
            )
        else:
            logits = torch.stack([self.say(*row) for row in zip(input_ids, pixel_values, strict=True)])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


# ----------------------------------------------------------------------------------------------------------- texts
def answer_to(text: str, kind: str, board: list[list[int]]) -> str:
    """Read off the words of a question."""
    words = text.removesuffix(" ?").split()
    cells = {f"{r} {c}": board[i][j] for i, r in enumerate(said.ROWS) for j, c in enumerate(said.COLUMNS)}
    at = [cells[" ".join(words[i + 1 : i + 3])] for i, word in enumerate(words) if word == "at"]
    digits = [int(word) for word in words if word.isdigit()]
    if kind == "exists":
        return "yes" if any(digits[0] in row for row in board) else "no"
    if kind in ("check", "both"):
        assert len(digits) == len(at) == {"check": 1, "both": 2}[kind]
        return "yes" if at == digits else "no"
    if kind == "larger":
        return "yes" if at[0] > at[1] else "no"
    return {"cell": str(at[0]), "parity": "odd" if at[0] % 2 else "even"}[kind]


def test_questions_are_true_by_plain_loops():
    rng = np.random.default_rng(0)
    for number in range(300):
        kind, board = said.QUESTIONS[number % 6], rng.integers(10, size=(3, 3))
        text, answer, pool = said.question(kind, board, rng)
        assert answer in pool and set(pool) <= set(said.ANSWERS)
        assert answer == answer_to(text, kind, board.tolist()), text
    with pytest.raises(ValueError, match="kind: wanted one of .*got 'colour'"):
        said.question("colour", board, rng)


def truth_of(text: str, kind: str, left: list[list[int]], right: list[list[int]]) -> bool:
    """Read off the words of a sentence."""
    words = text.split()
    row, column = words[words.index("at") + 1 : words.index("at") + 3]
    a, b = (board[said.ROWS.index(row)][said.COLUMNS.index(column)] for board in (left, right))
    digit = next((int(word) for word in words if word.isdigit()), None)
    there = (a == digit) + (b == digit)
    if kind == "same":
        return a == b
    if kind in ("first", "second"):
        return {"first": a, "second": b}[kind] == digit
    return there == {"no": 0, "one": 1, "each": 2}[kind]


def test_sentences_are_true_of_the_boards_they_are_drawn_for():
    rng = np.random.default_rng(1)
    for number in range(300):
        kind, wanted = said.SENTENCES[number % 6], number // 6 % 2 == 0
        sentence = said.sentence(kind, rng)
        left, right = said.boards_for(sentence, wanted, rng)
        assert truth_of(sentence.text, kind, left.tolist(), right.tolist()) == wanted, sentence.text
        assert min(left.min(), right.min()) >= 0 and max(left.max(), right.max()) <= 9


def test_captions_describe_their_board():
    rng = np.random.default_rng(2)
    for number in range(60):
        board = rng.integers(10, size=(3, 3))
        text = said.caption(said.CAPTIONS[number % 4], board, rng)
        assert said.describes(text, board) and len(said.places_in(text)) == 1 + number % 4
        place = said.places_in(text)[0]
        board[divmod(place, 3)] = (board[divmod(place, 3)] + 1) % 10
        assert not said.describes(text, board)


def test_every_word_is_known(processor):
    unknown = processor.tokenizer.unk_token_id
    for head in NAMES:
        task = load(head, processor)
        texts = [e.question or e.references[1] for e in task.train]
        assert unknown not in {i for row in processor.tokenizer(texts)["input_ids"] for i in row}


# ----------------------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("head", NAMES)
def test_splits_share_no_scan_and_are_the_same_every_time(head, processor):
    task, again, other = load(head, processor), load(head, processor), load(head, processor, seed=1)
    assert {role: len(getattr(task, role)) for role in ROLES} == SMALL
    for digit in range(10):
        pools = [set(scan_indices(role)[digit].tolist()) for role in ROLES]
        assert sum(map(len, pools)) == len(set.union(*pools))
    for role in ROLES:
        one, two, three = (getattr(t, role)[3] for t in (task, again, other))
        assert one.id == two.id and one.question == two.question and one.references == two.references
        assert np.array_equal(np.asarray(one.images[0]), np.asarray(two.images[0]))
        assert not np.array_equal(np.asarray(one.images[0]), np.asarray(three.images[0]))
    if head != "retrieval":
        kinds = {e.categories for e in task.train}
        assert {known for _, known in kinds} == {"known", "new"}


def test_each_sentence_is_true_of_one_pair_of_two(processor):
    task = load("nlvr2", processor)
    for first, second in zip(task.val[::2], task.val[1::2], strict=True):
        assert first.question == second.question and first.group == second.group
        assert {first.answer, second.answer} == {"true", "false"}


def test_batches(processor):
    task = load("vqa", processor)
    batch = task.collate(task.train[:5])
    assert batch["pixel_values"].shape == (5, 3, 24, 24)
    assert batch["labels"].tolist() == [said.ANSWERS.index(e.answer) for e in task.train[:5]]
    spelt = processor.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert spelt == task.train[0].question
    picture = np.asarray(task.train[1].images[0], dtype=np.float32).transpose(2, 0, 1) / 255
    assert np.allclose(batch["pixel_values"][1], picture * 2 - 1, atol=1e-6)
    assert "labels" not in task.collate(task.train[:5], answers=False)
    pairs = load("nlvr2", processor)
    batch = pairs.collate(pairs.train[:3])
    assert batch["pixel_values"].shape == (3, 2, 3, 24, 24)
    right = np.asarray(pairs.train[2].images[1], dtype=np.float32).transpose(2, 0, 1) / 255
    assert np.allclose(batch["pixel_values"][2, 1], right * 2 - 1, atol=1e-6)


def test_a_board_meets_its_own_caption_and_false_ones(processor):
    task = load("retrieval", processor, false_texts=7)
    batch = task.collate(task.train[:4])
    assert batch["input_ids"].shape[:2] == batch["attention_mask"].shape[:2] == (4, 8)
    assert batch["labels"].tolist() == [0] * 4
    assert torch.equal(batch["input_ids"], task.collate(task.train[:4])["input_ids"])
    for row in range(4):
        board, own = task._made("train", row)
        texts = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"][row]]
        assert texts[0] in own
        assert [said.describes(text, board) for text in texts] == [True] + [False] * 7


# ---------------------------------------------------------------------------------------------------------- scores
def _exact(task, split: str, processor):
    """A model that knows the split's answers by question and picture."""
    known = {}
    for example in getattr(task, split):
        batch = task.collate([example])
        ids = tuple(int(i) for i in batch["input_ids"][0] if i != processor.tokenizer.pad_token_id)
        known[ids, batch["pixel_values"][0].double().sum().item()] = int(batch["labels"])

    def say(ids, pixels):
        key = tuple(int(i) for i in ids if i != processor.tokenizer.pad_token_id)
        return torch.eye(len(task.answers))[known[key, pixels.double().sum().item()]] * 9

    return Oracle(say)


@pytest.mark.parametrize("head", ["vqa", "nlvr2"])
def test_a_perfect_and_a_constant_answerer(head, processor, tmp_path):
    task = load(head, processor)
    file = tmp_path / "answers.jsonl"
    result = task.evaluate(_exact(task, "val", processor), "val", batch_size=7, predictions=file)
    assert result["accuracy"] == 1.0 and result["count"] == 40 and set(result["columns"].values()) == {1.0}
    labels = len(task.answers)
    assert result["loss"] == pytest.approx(math.log(1 + (labels - 1) * math.exp(-9)), rel=1e-3)
    assert task.score_predictions(file, "val")["accuracy"] == 1.0
    answer = Counter(e.answer for e in task.val).most_common(1)[0][0]
    number = task.answers.index(answer)
    constant = task.evaluate(Oracle(lambda ids, pixels: torch.eye(labels)[number]), "val")
    assert constant["accuracy"] == sum(e.answer == answer for e in task.val) / 40
    kinds = {e.categories[0] for e in task.val}
    best = [Counter(e.answer for e in task.val if e.categories[0] == kind).most_common(1)[0][1] for kind in kinds]
    assert result["chance"] == constant["chance"] == sum(best) / 40
    if head == "nlvr2":
        assert result["consistency"] == 1.0 and constant["consistency"] == 0.0
        assert constant["accuracy"] == constant["chance"] == 0.5
    with pytest.raises(DataError, match="was made with other settings"):
        task.evaluate(Oracle(lambda ids, pixels: torch.zeros(labels)), "test", predictions=file)


def test_perfect_and_blind_retrieval(processor, tmp_path):
    task = load("retrieval", processor)
    boards = {}
    for number, example in enumerate(task.test):
        pixels = task.collate([example], answers=False)["pixel_values"][0]
        boards[pixels.double().sum().item()] = task._made("test", number)[0]

    def say(ids, pixels):
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        board = boards[pixels.double().sum().item()]
        return torch.tensor([float(len(said.places_in(text)) if said.describes(text, board) else -1)])

    result = task.evaluate(Oracle(say), "test", limit=12, predictions=tmp_path / "scores.jsonl")
    assert result["count"] == 12 * 24 and result["accuracy"] > 0.97  # a caption may be true of two boards
    assert set(result["columns"]) == {f"{way}@{k}" for way in ("TR", "IR") for k in (1, 5, 10)}
    blind = task.evaluate(Oracle(lambda ids, pixels: torch.zeros(1)), "test", limit=12)
    assert blind["text_retrieval"][1] == blind["image_retrieval"][1] == 0.0
    assert blind["chance"]["image_retrieval"][1] == pytest.approx(1 / 12)
    assert task.score(Oracle(say), "test", batch_size=6)["accuracy"] == 1.0
    zero = task.score(Oracle(lambda ids, pixels: torch.zeros(1)), "test")
    assert zero["accuracy"] == 0.0 and zero["loss"] == pytest.approx(math.log(16), rel=1e-5) and zero["count"] == 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t, m: t.evaluate(m, "val", method="generate"),
            "no setting 'method' where answers come out of a closed",
        ),
        (lambda t, m: t.evaluate(m, "dev"), "has the splits train, search, val, test; there is no 'dev'"),
        (lambda t, m: t.collate([]), "a batch needs at least one example, got none"),
        (lambda t, m: t.target(Example("x", "?", "blue")), "answer of example x is 'blue', which is not one of the 14"),
        (lambda t, m: t.evaluate(m, "val"), r"wanted logits \(40, 14\), one for each of the answers, got \(40, 3\)"),
        (lambda t, m: t.evaluate(m.nan(), "val"), "the model's logits are NaN"),
        (
            lambda t, m: t.collate([t.train[0], Example("two", "?", "1", images=(Image.new("RGB", (24, 24)),) * 2)]),
            r"wanted one picture an example, or two in all of them, got \[1, 2\] in one batch",
        ),
    ],
)
def test_what_closed_tasks_refuse(call, message, processor):
    class Wrong(Oracle):
        def nan(self):
            return Oracle(lambda ids, pixels: torch.full((14,), torch.nan))

    class NoLoss(Wrong):
        def forward(self, **batch):
            batch.pop("labels", None)
            return super().forward(**batch)

    model = NoLoss(lambda ids, pixels: torch.zeros(3))
    with pytest.raises(TaskError, match=message):
        call(load("vqa", processor), model)


def test_what_board_retrieval_refuses(processor):
    with pytest.raises(TaskError, match="false_texts is a whole number from 1 up, not 0"):
        load("retrieval", processor, false_texts=0)
    with pytest.raises(TaskError, match="false_texts=20 wants more pictures than that in every role; test has 20"):
        load("retrieval", processor, false_texts=20)
    with pytest.raises(TaskError, match="no setting 'workers' in retrieval"):
        load("retrieval", processor).evaluate(None, "test", workers=2)
    words = processor.tokenizer
    with pytest.raises(TaskError, match="needs a model that reads pictures"):
        load("vqa", words)


# --------------------------------------------------------------------------------- any task, with a closed list
@dataclass
class Votes(Task):
    """Questions that several people answered."""

    name = "votes"
    pictures = True

    def __init__(self, processor, choices=()):
        super().__init__(processor)
        votes = (("2",) * 4 + ("3",) * 2 + ("many",) * 4, ("yes",) * 9 + ("no",))
        picture = (Image.new("RGB", (24, 24)),)
        for role in ROLES:
            made = []
            for number in range(12):
                answers = votes[number % 2]
                text = f"which digit is {number % 10} ?"
                made.append(Example(f"{role}-{number}", text, answers[0], choices, images=picture, references=answers))
            setattr(self, role, made)

    def question_text(self, example):
        return example.question

    def target_text(self, example):
        return example.answer, ""

    def grade(self, answer, example):
        return vqa_accuracy(answer, example.references)

    def summarise(self, grades, examples):
        return {"graded": len(grades)}


def test_any_task_can_be_asked_with_a_closed_list(processor):
    task = closed(Votes(processor), at_least=5)
    assert task.answers == ("2", "yes")  # six examples of train have either
    task = closed(Votes(processor), ["yes", "2", "3", "no"])
    labels = task.collate(task.train[:2])["labels"]
    # two, nine, one of ten people: 0.6, 1, 0.3; four: 1; what is not in the list is left out
    assert torch.allclose(labels, torch.tensor([[0, 1.0, 0.6, 0], [1.0, 0, 0, 0.3]]))
    model = make_model("vqa")
    model.head[3], model.config.num_labels = nn.Linear(128, 4), 4
    with torch.no_grad():
        model.head[3].weight.zero_()
        model.head[3].bias.copy_(torch.tensor([0, 0, 1.0, 0]))
    result = task.evaluate(model.eval(), "val", batch_size=5)
    assert result["accuracy"] == pytest.approx(0.3) and result["graded"] == 12  # "3" is 0.6 right, half of the time
    assert result["task"] == "votes" and result["answers"] == 4
    p = torch.sigmoid(torch.tensor([0, 0, 1.0, 0], dtype=torch.float64))
    each = [-(t * p.log() + (1 - t) * (1 - p).log()).sum() for t in labels.double()]
    assert result["loss"] == pytest.approx(float(sum(each) / 2), rel=1e-5)
    with pytest.raises(TaskError, match=r"votes: wanted a list of two answers or more, each once, got 0"):
        closed(Votes(processor), at_least=99)
    assert closed(Votes(processor, choices=("True", "False"))).answers == ("False", "True")


class Captioned(Task):
    """Pictures with captions, some of which two of them share."""

    name, pictures, seed = "captioned", True, 5

    def __init__(self, processor):
        super().__init__(processor)
        for role in ROLES:
            setattr(self, role, [1] * 9)

    def captioned(self, role):
        picture = (Image.new("RGB", (24, 24)),)
        words = [(f"a board with {n}", f"a {n % 3} at top left") for n in range(9)]
        return [Example(f"{role} {n}", "", "", images=picture, references=words[n]) for n in range(9)]


def test_captioned_pictures_of_any_task_are_matched(processor):
    task = matching(Captioned(processor), false_texts=4)
    for example in task.train:
        own, *others = task.texts(example)
        assert own in example.references and len(others) == 4
        assert not set(others) & set(example.references)
    assert task.texts(task.train[3]) == matching(Captioned(processor), false_texts=4).texts(task.train[3])
    assert task.collate(task.val[:2])["input_ids"].shape[:2] == (2, 5)
    few = matching(Captioned(processor), false_texts=4, sizes={"val": 6, "test": 99})
    assert [len(getattr(few, role)) for role in ROLES] == [9, 9, 6, 9]
    assert {e.id for e in few.val} < {e.id for e in task.val}
    with pytest.raises(TaskError, match="false_texts=15 wants more pictures than that in every role; train has 9"):
        matching(Captioned(processor))
    with pytest.raises(
        TaskError, match=r"wanted a task of captioned pictures, as flickr30k; this Votes has no captioned"
    ):
        matching(Votes(processor))


# ------------------------------------------------------------------------------------------------ the whole pipeline
@pytest.mark.parametrize("head", NAMES)
def test_search_and_tuning_run_end_to_end(head, processor, tmp_path):
    task, model = load(head, processor), make_model(head).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net = eas.attach(model, EAS)
    quick = {"batch_size": 4, "learning_rate": 1e-2, "progress": False, "seed": 0}
    config = eas.SearchConfig(
        num_skipped=8, warmup_steps=1, updates=2, train_steps_per_update=1, reward_batch_size=6, **quick
    )
    result = eas.search(net, task, config)
    assert len(result.skipped) == 8 and result.preferences.shape == (24,) and net.mask == result.skipped
    assert result.preferences.abs().max() > 0
    history = eas.fit(net, task, eas.TrainConfig(max_steps=3, **quick))
    assert all(math.isfinite(loss) for loss in history.losses)
    changed = [name for name, value in net.base.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and all(name.startswith("head.") for name in changed)
    score = task.score(net.eval(), "val", limit=8)
    net.save_pretrained(tmp_path)
    again = eas.load(tmp_path, base=make_model(head))
    assert task.score(again.eval(), "val", limit=8) == score
    eas.detach(net)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_skipped_trains_the_head_alone(processor):
    task, net = load("vqa", processor), eas.attach(make_model("vqa"), EAS)
    eas.fit(net, task, eas.TrainConfig(max_steps=1, batch_size=4, progress=False))
    bare = eas.attach(make_model("vqa"), eas.EASConfig(skip_rank=4, adapt_rank=0, modules_to_save=()))
    with pytest.raises(eas.EASError, match=r"Nothing to train: with mask \[\] and adapt_rank 0 no adapter is at work"):
        eas.fit(bare, task, eas.TrainConfig(max_steps=1, batch_size=4, progress=False))


def test_training_free_scores(processor):
    task, model = load("vqa", processor), make_model("vqa").eval()
    lost = scorers.single_ablation(model, task, limit=6)
    assert lost.shape == (24,) and lost.unique().numel() > 1
    with pytest.raises(
        UnsupportedModelError, match=r"text_layers.0.attention \(text self 0\) is a post-norm attention"
    ):
        scorers.cosine_similarity(model, task, limit=6)


def test_redundancy_probe(processor):
    task, model = load("vqa", processor), make_model("vqa").eval()
    report = eas.probe_redundancy(model, task, kinds="mha", num_skipped=(2, 12), trials=2, progress=False, limit=12)
    assert len(report.frame) == 4 and report.metadata["num_sites"] == 24
    assert (report.frame.loss - report.dense["loss"]).abs().min() > 0
    with pytest.raises(ConfigError, match=r"kinds: wanted \('mha',\) or \('layer',\), got \('ffn',\): of Meter"):
        eas.probe_redundancy(model, task, kinds=("mha", "ffn"), num_skipped=1, trials=1, progress=False, limit=12)
