"""A small folder of pictures with captions, in Karpathy's form."""

from __future__ import annotations

import json

from PIL import Image

TEST, VAL, TRAIN = range(7), range(7, 10), range(10, 40)
JSON = "dataset_flickr30k.json"


def records(test=TEST, val=VAL, train=TRAIN) -> list[dict]:
    """Seven test pictures with a caption each and the first with two, three for val and 30 for train with three."""
    found = []
    for i in (*train, *val, *test):
        split = "test" if i in test else "val" if i in val else "train"
        raw = [f"sentence {j} of {i}" + " again" * (i % 3) for j in range(3 if i > 6 else 2 if i == 0 else 1)]
        sentences = [{"raw": text, "tokens": text.split(), "imgid": i, "sentid": j} for j, text in enumerate(raw)]
        found.append({"filename": f"p{i}.jpg", "split": split, "imgid": i, "sentences": sentences})
    return found


def write(folder, images: list | None = None, place: str = "flickr30k-images"):
    """Picture i is red, of the strength i."""
    (folder / place).mkdir(parents=True)
    for i in {record["imgid"] for record in images or ()} | {*TEST, *VAL, *TRAIN}:
        Image.new("RGB", (5, 3), (i, 0, 0)).save(folder / place / f"p{i}.jpg", format="PNG")
    (folder / JSON).write_text(json.dumps({"dataset": "flickr30k", "images": records() if images is None else images}))
    return folder
