"""What `tiny-meter` is pretrained on: captions with digits masked and replaced, and the three tasks' first kinds.

The batch of a step depends on (seed, step) alone. Digit scans are those of role train.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eas_kit.tasks import board_texts as said
from eas_kit.tasks.digit_images import draw_board, draw_cells

MASKED, REPLACED = 0.4, 0.3  # of the digits of a caption
IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """Rows of every objective in one batch, so that the model is run once a step.

    `input_ids`, `attention_mask` (B, S), `pixel_values` (B, 3, H, W), `image_type` (B, 1); the rows of an objective
    are `parts[name]`, a slice, and what they are to say is `labels[name]`: at the digits of "words" the one that the
    board has there, whatever the caption says, at those of "present" whether the board has it, (b, S); of the others
    (b,). `order` (b, S): whether a digit of "words" that is not masked is less than the board's (0), the same (1) or
    more (2). "nlvr2" has 2 b rows: all first pictures, then all second ones.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    image_type: Tensor
    parts: dict[str, slice]
    labels: dict[str, Tensor]
    order: Tensor | None


def pixels(images: list) -> Tensor:
    """(B, 3, H, W) as the processor makes them of pictures that have the right size already."""
    grey = np.stack([np.asarray(image, dtype=np.float32) for image in images])  # (B, H, W, 3)
    return torch.from_numpy((grey / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()


def labelled_patches(step: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures with some cells empty, and what is in each cell: (B, 3, H, W), (B, cells), 10 for nothing."""
    rng = np.random.default_rng((seed, 1, step))
    images, labels = [], np.full((rows, said.CELLS), 10)
    for row in labels:
        filled = rng.random(said.CELLS) < 0.85
        row[filled] = rng.integers(10, size=int(filled.sum()))
        cells = {divmod(n, said.SHAPE[1]): int(row[n]) for n in range(said.CELLS) if filled[n]}
        images.append(draw_cells(cells, "train", rng))
    return pixels(images), torch.from_numpy(labels)


class Corpus:
    """Batches for a processor; `counts` says how many examples of each objective."""

    def __init__(self, processor, seed: int) -> None:
        self.tokenizer, self.seed = processor.tokenizer, seed
        self._first, self._last = self.tokenizer.convert_tokens_to_ids(["0", "9"])

    def batch(self, step: int, counts: dict[str, int]) -> Rows:
        rng = np.random.default_rng((self.seed, 0, step))
        texts: list[str] = []
        images: list = []
        types: list[int] = []
        parts: dict[str, slice] = {}
        labels: dict[str, Tensor] = {}
        for name, count in counts.items():
            if not count:
                continue
            start = len(texts)
            made = [getattr(self, f"_{name}")(rng) for _ in range(count)]
            for picture in range(len(made[0][1])):
                texts += [text for text, _, _ in made]
                images += [boards[picture] for _, boards, _ in made]
                types += [1 + picture] * count
            parts[name] = slice(start, len(texts))
            labels[name] = torch.tensor([label for *_, label in made])  # (b,), of digits (b, 4)
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids, order = encoded["input_ids"], None
        for name in parts.keys() & {"words", "present"}:
            labels[name] = self._at_digits(ids[parts[name]], labels[name])
        if "words" in parts:
            order = self._spoil(ids[parts["words"]], labels["words"], rng)
        drawn = pixels([draw_board(board, "train", rng) for board in images])
        return Rows(ids, encoded["attention_mask"], drawn, torch.tensor(types)[:, None], parts, labels, order)

    def placed_words(self, step: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Captions, and for each of their digits (some masked) where it stands and what it is, 10 for a masked one.

        ids, mask, places, digits: each (B, S).
        """
        rng = np.random.default_rng((self.seed, 2, step))
        texts = [said.caption("four", said.draw_digits(rng), rng) for _ in range(rows)]
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids = encoded["input_ids"]
        places = self._at_digits(ids, torch.tensor([said.places_in(text) for text in texts]))
        digits = (ids - self._first).masked_fill(places == IGNORED, IGNORED)
        masked = (places != IGNORED) & torch.from_numpy(rng.random(tuple(ids.shape)) < MASKED)
        ids[masked], digits[masked] = self._mask, 10
        return ids, encoded["attention_mask"], places, digits

    @property
    def _mask(self) -> int:
        return self.tokenizer.mask_token_id

    def _at_digits(self, ids: Tensor, values: Tensor) -> Tensor:
        """Labels (b, S) that have the values (b, n) at the n digits of each row of ids (b, S)."""
        digits = (ids >= self._first) & (ids <= self._last)
        return torch.full_like(ids, IGNORED).masked_scatter_(digits, values)

    def _spoil(self, ids: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
        """Masks some digits of ids (b, S), replaces some, in place; how those not masked compare with the board's."""
        chance, digits = torch.from_numpy(rng.random(tuple(ids.shape))), labels != IGNORED
        masked, other = digits & (chance < MASKED), digits & (chance > 1 - REPLACED)
        ids[masked] = self._mask
        ids[other] = self._first + (labels[other] + torch.from_numpy(rng.integers(1, 10, int(other.sum())))) % 10
        return (1 + torch.sign(ids - self._first - labels)).masked_fill(masked | ~digits, IGNORED)

    # each: (text, boards, label)
    def _words(self, rng: np.random.Generator) -> tuple[str, list, list[int]]:
        board = said.draw_digits(rng)
        text = said.caption("four", board, rng)
        return text, [board], [int(board.flat[place]) for place in said.places_in(text)]

    def _present(self, rng: np.random.Generator) -> tuple[str, list, list[int]]:
        """Four digits, and of each whether the board has it anywhere."""
        board = said.draw_digits(rng)
        digits = [said.digit_there_or_not(board, rng) for _ in range(4)]
        return " and ".join(map(str, digits)), [board], [int((board == digit).any()) for digit in digits]

    def _vqa(self, rng: np.random.Generator) -> tuple[str, list, int]:
        board = said.draw_digits(rng)
        text, answer, _ = said.question(_one(said.PRETRAINED["question"], rng), board, rng)
        return text, [board], said.ANSWERS.index(answer)

    def _nlvr2(self, rng: np.random.Generator) -> tuple[str, list, int]:
        sentence, wanted = said.sentence(_one(said.PRETRAINED["sentence"], rng), rng), bool(rng.random() < 0.5)
        return sentence.text, list(said.boards_for(sentence, wanted, rng)), int(wanted)

    def _retrieval(self, rng: np.random.Generator) -> tuple[str, list, int]:
        """A caption of the board, or (half of the time) of one that differs, in a few cells or in all."""
        board, wanted = said.draw_digits(rng), bool(rng.random() < 0.5)
        other = board if wanted else np.where(rng.random(said.SHAPE) < 0.5, said.draw_digits(rng), board)
        while True:
            text = said.caption(_one(said.PRETRAINED["caption"], rng), other, rng)
            if said.describes(text, board) == wanted:
                return text, [board], int(wanted)
            if not wanted:
                other = said.draw_digits(rng)


def _one(kinds: tuple[str, ...], rng: np.random.Generator) -> str:
    return kinds[int(rng.integers(len(kinds)))]
