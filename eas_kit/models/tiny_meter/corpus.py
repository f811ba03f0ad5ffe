"""What `tiny-meter` is pretrained on: captions with digits masked or replaced, and the three tasks' first kinds.

The batch of a step depends on (seed, step) alone. Digit scans are those of role train.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eas_kit.tasks import board_texts as said
from eas_kit.tasks.digit_images import draw_board, draw_cells

MASKED = 0.5  # of the digits of a caption
IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """Rows of every objective in one batch, so that the model is run once a step.

    `input_ids`, `attention_mask` (B, S), `pixel_values` (B, 3, H, W), `image_type` (B, 1); the rows of an objective
    are `parts[name]`, a slice, and what they are to say is `labels[name]`: of the words ("mlm" which digit was masked,
    "replaced" whether a digit is that of the board) (b, S), of the others (b,). Those of
    "nlvr2" are 2 b rows: all first pictures, then all second ones.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    image_type: Tensor
    parts: dict[str, slice]
    labels: dict[str, Tensor]


def pixels(images: list) -> Tensor:
    """(B, 3, H, W) as the processor makes them of pictures that have the right size already."""
    grey = np.stack([np.asarray(image, dtype=np.float32) for image in images])  # (B, H, W, 3)
    return torch.from_numpy((grey / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()


def labelled_patches(step: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures with some cells empty, and what is in each of the nine: (B, 3, H, W), (B, 9), 10 for nothing."""
    rng = np.random.default_rng((seed, 1, step))
    images, labels = [], np.full((rows, 9), 10)
    for row in labels:
        filled = rng.random(9) < 0.85
        row[filled] = rng.integers(10, size=int(filled.sum()))
        images.append(draw_cells({divmod(n, 3): int(row[n]) for n in range(9) if filled[n]}, "train", rng))
    return pixels(images), torch.from_numpy(labels)


class Corpus:
    """Batches for a processor; `counts` says how many examples of each objective."""

    def __init__(self, processor, seed: int) -> None:
        self.tokenizer, self.seed = processor.tokenizer, seed

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
            labels[name] = torch.tensor([label for *_, label in made])  # (b,), of "replaced" (b, 4)
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids, drawn = encoded["input_ids"], [draw_board(board, "train", rng) for board in images]
        if "replaced" in parts:
            labels["replaced"] = self._at_digits(ids[parts["replaced"]], labels["replaced"])
        if "mlm" in parts:
            labels["mlm"] = self._hide(ids, parts["mlm"], rng)
        return Rows(ids, encoded["attention_mask"], pixels(drawn), torch.tensor(types)[:, None], parts, labels)

    def placed_words(self, step: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Captions, and for each of their digits (half of them masked) where it stands: ids, mask, labels (B, S)."""
        rng = np.random.default_rng((self.seed, 2, step))
        texts = [said.caption("four", rng.integers(10, size=(3, 3)), rng) for _ in range(rows)]
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids = encoded["input_ids"]
        labels = self._at_digits(ids, torch.tensor([said.places_in(text) for text in texts]))
        self._hide(ids, slice(0, rows), rng)
        return ids, encoded["attention_mask"], labels

    def _digits(self, ids: Tensor) -> Tensor:
        first, last = self.tokenizer.convert_tokens_to_ids(["0", "9"])
        return (ids >= first) & (ids <= last)

    def _at_digits(self, ids: Tensor, values: Tensor) -> Tensor:
        """Labels (b, S) that have the values (b, n) at the n digits of each row of ids (b, S)."""
        return torch.full_like(ids, IGNORED).masked_scatter_(self._digits(ids), values)

    def _hide(self, ids: Tensor, rows: slice, rng: np.random.Generator) -> Tensor:
        """Masks some of the digits in these rows of ids (B, S), in place; returns what they were, (b, S)."""
        own = ids[rows]
        hidden = self._digits(own) & torch.from_numpy(rng.random(tuple(own.shape)) < MASKED)
        labels = own.masked_fill(~hidden, IGNORED)
        own[hidden] = self.tokenizer.mask_token_id
        return labels

    # each: (text, boards, label)
    def _mlm(self, rng: np.random.Generator) -> tuple[str, list, int]:
        board = rng.integers(10, size=(3, 3))
        return said.caption("four", board, rng), [board], 0

    def _replaced(self, rng: np.random.Generator) -> tuple[str, list, list[int]]:
        """A caption of a board that had other digits in some cells, and which of its digits are still right."""
        board = rng.integers(10, size=(3, 3))
        text = said.caption("four", np.where(rng.random((3, 3)) < 0.5, rng.integers(10, size=(3, 3)), board), rng)
        return text, [board], [int(right) for right in said.right_parts(text, board)]

    def _vqa(self, rng: np.random.Generator) -> tuple[str, list, int]:
        board = rng.integers(10, size=(3, 3))
        text, answer, _ = said.question(_one(said.PRETRAINED["question"], rng), board, rng)
        return text, [board], said.ANSWERS.index(answer)

    def _nlvr2(self, rng: np.random.Generator) -> tuple[str, list, int]:
        sentence, wanted = said.sentence(_one(said.PRETRAINED["sentence"], rng), rng), bool(rng.random() < 0.5)
        return sentence.text, list(said.boards_for(sentence, wanted, rng)), int(wanted)

    def _retrieval(self, rng: np.random.Generator) -> tuple[str, list, int]:
        """A caption of the board, or (half of the time) of one that differs, in a few cells or in all."""
        board, wanted = rng.integers(10, size=(3, 3)), bool(rng.random() < 0.5)
        other = board if wanted else np.where(rng.random((3, 3)) < 0.5, rng.integers(10, size=(3, 3)), board)
        while True:
            text = said.caption(_one(said.PRETRAINED["caption"], rng), other, rng)
            if said.describes(text, board) == wanted:
                return text, [board], int(wanted)
            if not wanted:
                other = rng.integers(10, size=(3, 3))


def _one(kinds: tuple[str, ...], rng: np.random.Generator) -> str:
    return kinds[int(rng.integers(len(kinds)))]
