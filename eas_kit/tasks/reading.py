"""Task ``reading``: what the bundled model was pretrained to state, asked on held-out digit scans.

A test of the untuned model: it reads numbers and boards, knows facts, and finds the element behind a handwritten
number (two hops). No question words; the prompt is the beginning of a statement, the target its end.
"""

from __future__ import annotations

import numpy as np

from eas_kit.errors import TaskError
from eas_kit.tasks.base import ROLES, Example, Task
from eas_kit.tasks.digit_images import draw_board, draw_number
from eas_kit.tasks.periodic_table import elements
from eas_kit.tasks.statements import board_statement, fact, known

SIZES = {"train": 20_000, "search": 500, "val": 500, "test": 1_000}
KINDS = ("number", "board-cell", "board-row", "fact", "fact-by-number", "picture-to-fact")


class Reading(Task):
    """See the module; columns are the kinds."""

    name = "reading"
    pictures = True
    template = "[picture] beginning of a statement -> its end"
    lead = " "  # the prompt is no chat
    parser = "the text before the full stop"
    ends = False  # in pretraining more statements may follow

    def __init__(self, processor, sizes: dict[str, int] | None = None, seed: int = 0, kinds: tuple[str, ...] = KINDS):
        super().__init__(processor)
        self._picture = self._picture_text()
        self.seed, self.kinds = seed, tuple(kinds)
        self.set_splits(self._make, SIZES, sizes)

    def _make(self, role: str, i: int) -> Example:
        rng = np.random.default_rng((self.seed, 2, ROLES.index(role), i))
        kind = self.kinds[i % len(self.kinds)]
        element = elements()[int(rng.integers(len(elements())))]
        images: tuple = ()
        if kind.startswith("board"):
            board = rng.integers(10, size=(3, 3))
            before, after = board_statement(board, kind.removeprefix("board-"), rng)
            images = (draw_board(board, role, rng),)
        elif kind == "number":
            before, after = "the number is", f" {element.number}."
            images = (draw_number(int(element.number), role, rng),)
        else:
            attributes = [a for a in known(element) if a not in ("number", "name")]
            attribute = str(rng.choice(attributes))
            subject = {"fact": "name", "fact-by-number": "number", "picture-to-fact": "it"}[kind]
            before, after = fact(element, attribute, subject, 2 if subject == "it" else int(rng.integers(2)))
            if subject == "it":
                images = (draw_number(int(element.number), role, rng),)
        return Example(
            id=f"{role}-{i}",
            question=before,
            answer=after.strip().rstrip("."),
            images=images,
            categories=(kind,),
        )

    def _picture_text(self) -> str:
        """What stands for a picture in a prompt: the processor's image token and what its template puts around it."""
        token = getattr(self.processor, "image_token", None)
        if not token:
            raise TaskError(
                f"{self.name}: {type(self.processor).__name__} names no image_token, so a prompt that is no chat cannot"
                " hold its pictures; take elements or digits, which use the chat template"
            )
        if getattr(self.processor, "chat_template", None):
            words = {"type": "text", "text": "?!?"}  # marks where the question starts, after the picture
            before = [
                self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
                for content in ([words], [{"type": "image"}, words])
            ]
            without, found = (text.partition(words["text"])[0] for text in before)
            # Qwen-VL finds pictures by the token before them; LLaVA's line break is of no account
            while not found.startswith(without):  # SmolVLM's has a blank that goes where a picture comes
                without = without[:-1]
            around = found.removeprefix(without).strip()
            return around if token in around else token
        return token

    def prompt_text(self, example: Example) -> str:
        return f"{self._picture} {example.question}" if example.images else example.question

    def question_text(self, example: Example) -> str:
        return example.question

    def target_text(self, example: Example) -> tuple[str, str]:
        return f" {example.answer}.", ""

    def parse(self, text: str, example: Example) -> str | None:
        said = text.split(".")[0].strip().lower()
        return said or None
