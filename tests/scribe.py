"""A model that writes what a test wants, and what else the tests of evaluations share."""

from __future__ import annotations

import json

import pytest
import torch

TEXTS = ["USER: \nQuestion: Context: Options: (A) ASSISTANT: The answer is A. BECAUSE: is"] * 50


class Scribe(torch.nn.Module):
    """Computes as the model, but writes what is given for the question that it reads; counts the calls."""

    def __init__(self, model, task, texts, fail_after=10**6):
        super().__init__()
        self.inner, self.task, self.texts, self.fail_after = model, task, texts, fail_after
        self.calls, self.prompts = 0, 0
        self.by_prompt = {task.question_text(e): texts[e.id] for e in task.test}

    def forward(self, **inputs):
        return self.inner(**inputs)

    def generate(self, input_ids, max_new_tokens, **_):
        if self.calls == self.fail_after:
            raise KeyboardInterrupt
        self.calls, self.prompts = self.calls + 1, self.prompts + len(input_ids)
        tokenizer, rows = self.task.tokenizer, []
        for prompt in tokenizer.batch_decode(input_ids):
            [text] = {text for question, text in self.by_prompt.items() if question in prompt}
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:max_new_tokens]
            rows.append(torch.tensor(ids + [tokenizer.pad_token_id] * (max_new_tokens - len(ids))))
        return torch.cat([input_ids, torch.stack(rows)], 1)


def seven_of_ten(task):
    """Texts for test: the right letter, but another one for the third, and no statement for the fifth and the last."""
    texts = {e.id: f"The answer is {e.answer}." for e in task.test}
    ids = list(texts)
    texts[ids[2]] = "The answer is " + {"A": "B", "B": "C", "C": "A", "D": "A"}[task.test[2].answer] + "."
    texts[ids[4]] = texts[ids[9]] = "hm"
    return texts


def agree(one, other, rel=1e-5):
    """Asserts that two results differ in their time alone, and in losses by rounding."""
    assert {**one, "seconds": 0, "loss": 0} == {**other, "seconds": 0, "loss": 0}
    assert one["loss"] == (None if other["loss"] is None else pytest.approx(other["loss"], rel=rel))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
