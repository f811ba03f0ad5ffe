"""What the bundled model reads: dictionary definitions, facts about elements, pictures of numbers and boards.

Documents are drawn at random and packed into rows of a fixed length. The batch of a step depends on (seed, step)
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
from eas_kit.tasks.digit_images import draw_board, draw_number
from eas_kit.tasks.periodic_table import elements
from eas_kit.tasks.statements import board_lines, fact_line, number_lines

WORDNET = Path("/usr/share/wordnet")
HELD_OUT = 100  # every 100th definition is kept from training
# share of each kind among the documents of a row
MIXTURE = {"definition": 0.40, "fact": 0.22, "number": 0.20, "board": 0.18}


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


class Corpus:
    """Packed rows of token ids with their pictures.

    Args:
        processor: turns pictures into pixel values and text into token ids.
        definitions: dictionary lines to train on.
        row_length: tokens a row.
        seed: of the data order.
    """

    def __init__(self, processor, definitions: list[str], row_length: int = 96, seed: int = 0):
        self.processor, self.row_length, self.seed = processor, row_length, seed
        tokenizer = processor.tokenizer
        self.bos, self.eos, self.image = tokenizer.bos_token_id, tokenizer.eos_token_id, processor.image_token_id
        self.patches = 9
        self.definitions = tokenizer(definitions, add_special_tokens=False)["input_ids"]
        self.kinds = list(MIXTURE)
        self.shares = np.array(list(MIXTURE.values())) / sum(MIXTURE.values())

    def _document(self, kind: str, rng: np.random.Generator) -> tuple[list[int], Image.Image | None]:
        if kind == "definition":
            return self.definitions[int(rng.integers(len(self.definitions)))], None
        element = elements()[int(rng.integers(118))]
        if kind == "fact":
            text, picture = fact_line(element, rng), None
        elif kind == "number":
            text, picture = number_lines(element, rng), draw_number(int(element.number), "train", rng)
        else:
            board = rng.integers(10, size=(3, 3))
            text, picture = board_lines(board, rng), draw_board(board, "train", rng)
        ids = self.processor.tokenizer(" " + text if picture else text, add_special_tokens=False)["input_ids"]
        return ([self.image] * self.patches if picture else []) + ids, picture

    def batch(self, step: int, rows: int) -> dict[str, torch.Tensor]:
        """The batch of one step: ``input_ids`` and ``labels`` (rows, row_length), ``pixel_values`` (images, 3, 24, 24).

        A picture is never cut; near a row's end only text documents are drawn.
        """
        rng = np.random.default_rng((self.seed, step))
        ids = np.empty((rows, self.row_length), dtype=np.int64)
        pictures: list[Image.Image] = []
        for row in ids:
            tokens: list[int] = []
            while len(tokens) < self.row_length:
                kind = str(rng.choice(self.kinds, p=self.shares))
                if kind in ("number", "board") and len(tokens) + 1 + self.patches + 8 > self.row_length:
                    kind = "definition"
                document, picture = self._document(kind, rng)
                tokens += [self.bos, *document, self.eos]
                if picture is not None:
                    pictures.append(picture)
            row[:] = tokens[: self.row_length]
        input_ids = torch.from_numpy(ids)
        batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids == self.image, -100)}
        if pictures:
            batch["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return batch
