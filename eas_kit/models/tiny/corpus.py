"""What the bundled model reads: dictionary definitions, facts about elements, pictures of numbers and boards.

The batch of a step depends on (seed, step)
alone, so that a run that was cut off continues exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eas_kit.errors import TaskError
from eas_kit.tasks.digit_images import GRID, draw_board, draw_cells, draw_number
from eas_kit.tasks.periodic_table import elements
from eas_kit.tasks.statements import board_lines, board_statement, fact_line, number_lines

WORDNET = Path("/usr/share/wordnet")
HELD_OUT = 100  # every 100th definition is kept from training
# Share of each kind among the documents. First the model learns to see: pictures alone, one a row. Packed rows, where
# several pictures compete, come after; with those from the start it stayed at chance on boards.
SEEING = {"number": 0.30, "board": 0.70}
READING = {"definition": 0.38, "fact": 0.24, "number": 0.22, "board": 0.16}
RECALLING = {"definition": 0.34, "fact": 0.36, "number": 0.18, "board": 0.12}  # at the end: more facts
SEEING_ROWS = 32
SEEING_KINDS = ("all", "row", "cell")


def read_definitions(folder: Path = WORDNET) -> tuple[list[str], list[str]]:
    """WordNet's definitions as lines ``word, word: gloss.``: those to train on, those held out.

    Raises TaskError where the files of WordNet 3.0 are absent.
    """
    lines = []
    for part in ("noun", "verb", "adj", "adv"):
        path = folder / f"data.{part}"
        if not path.exists():
            raise TaskError(
                f"pretraining reads WordNet's {path.name}, which is not in {folder}: install Debian's package "
                "wordnet-base, or name the folder with --wordnet"
            )
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split(" ")
            words = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
            words = [re.sub(r"\((a|p|ip)\)$", "", w).replace("_", " ") for w in words]
            lines.append(f"{', '.join(words)}: {gloss.strip()}")
    return [t for i, t in enumerate(lines) if i % HELD_OUT], lines[::HELD_OUT]


def tokenizer_texts(definitions: list[str]) -> Iterator[str]:
    """Text to train the tokenizer on: a third of the dictionary, the statements, and the tasks' fixed words."""
    yield from definitions[::3]
    rng = np.random.default_rng(7)
    for _ in range(3):
        for element in elements():
            for _ in range(5):
                yield fact_line(element, rng)
                yield number_lines(element, rng)
    for _ in range(2000):
        yield board_lines(rng.integers(10, size=(3, 3)), rng)
    # words of the tasks' templates; the model never reads them in pretraining
    yield from ["USER: \nQuestion: \nContext: \nOptions: \nASSISTANT: The answer is . BECAUSE: "] * 2000


def labelled_patches(processor, step: int, boards: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures for the vision tower alone: pixel values (boards, 3, 24, 24) and the digit in each patch
    (boards, 9), 10 where the patch is empty."""
    rng = np.random.default_rng((seed, 1, step))
    places = [(row, column) for row in range(GRID) for column in range(GRID)]
    cells = [{place: int(rng.integers(10)) for place in places if rng.random() < 0.8} for _ in range(boards)]
    pictures = [draw_cells(filled, "train", rng) for filled in cells]
    labels = torch.tensor([[filled.get(place, 10) for place in places] for filled in cells])
    return processor.image_processor(pictures, return_tensors="pt")["pixel_values"], labels


class Corpus:
    """Batches of ``input_ids`` and ``labels`` (rows, length) and ``pixel_values`` (pictures, 3, 24, 24).

    Args:
        processor: turns pictures into pixel values and text into token ids.
        definitions: dictionary lines to train on.
        seed: of the data order.
    """

    def __init__(self, processor, definitions: list[str], seed: int = 0):
        self.processor, self.seed = processor, seed
        tokenizer = processor.tokenizer
        self.bos, self.eos, self.image = tokenizer.bos_token_id, tokenizer.eos_token_id, processor.image_token_id
        self.patches = GRID * GRID
        self.definitions = tokenizer(definitions, add_special_tokens=False)["input_ids"]

    def seeing_batch(self, step: int) -> dict[str, torch.Tensor]:
        """Pictures with statements that name what is in them, one document a row, right padded."""
        rng = np.random.default_rng((self.seed, step))
        rows, pictures = [], []
        for _ in range(SEEING_ROWS):
            if rng.random() < SEEING["number"]:
                element = elements()[int(rng.integers(118))]
                text = f"the number is {element.number}. it is {element.name}."
                pictures.append(draw_number(int(element.number), "train", rng))
            else:
                board = rng.integers(10, size=(3, 3))
                kinds = rng.choice(SEEING_KINDS, size=2)
                text = " ".join("".join(board_statement(board, str(kind), rng)) for kind in kinds)
                pictures.append(draw_board(board, "train", rng))
            rows.append(self._with_picture(text))
        length = max(map(len, rows))
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        return self._labelled(ids, pictures, pad)

    def _with_picture(self, text: str) -> list[int]:
        ids = self.processor.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        return [self.bos, *[self.image] * self.patches, *ids, self.eos]

    def _labelled(self, ids: torch.Tensor, pictures: list[Image.Image], pad: int) -> dict[str, torch.Tensor]:
        batch = {"input_ids": ids, "labels": ids.masked_fill((ids == self.image) | (ids == pad), -100)}
        if pictures:
            batch["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return batch

    def _document(
        self, rng: np.random.Generator, room: int, mixture: dict[str, float]
    ) -> tuple[list[int], Image.Image | None]:
        kind = str(rng.choice(list(mixture), p=list(mixture.values())))
        if kind in ("number", "board") and room < self.patches + 9:
            kind = "definition"  # a picture is never cut
        element = elements()[int(rng.integers(118))]
        if kind == "number":
            return self._with_picture(number_lines(element, rng)), draw_number(int(element.number), "train", rng)
        if kind == "board":
            board = rng.integers(10, size=(3, 3))
            return self._with_picture(board_lines(board, rng)), draw_board(board, "train", rng)
        if kind == "fact":
            ids = self.processor.tokenizer(fact_line(element, rng), add_special_tokens=False)["input_ids"]
        else:
            ids = self.definitions[int(rng.integers(len(self.definitions)))]
        return [self.bos, *ids, self.eos], None

    def reading_batch(
        self, step: int, rows: int, row_length: int, mixture: dict[str, float] = READING
    ) -> dict[str, torch.Tensor]:
        """Documents of all kinds packed into full rows (rows, row_length); pictures in the order of their places."""
        rng = np.random.default_rng((self.seed, step))
        ids = np.empty((rows, row_length), dtype=np.int64)
        pictures: list[Image.Image] = []
        for row in ids:
            tokens: list[int] = []
            while len(tokens) < row_length:
                document, picture = self._document(rng, row_length - len(tokens), mixture)
                tokens += document
                if picture is not None:
                    pictures.append(picture)
            row[:] = tokens[:row_length]
        return self._labelled(torch.from_numpy(ids), pictures, self.processor.tokenizer.pad_token_id)
