"""Tiny random models, batches and a toy task for the tests. Sizes are primes, or twice a prime, where they can be."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

VOCAB, IMAGE, PAD, BOS, EOS = 97, 96, 0, 1, 2
IMAGE_SIZE, PATCH = 9, 3
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2  # 9
LAYERS, WIDTH = 5, 38


def text_config(**changes) -> LlamaConfig:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 53,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 14,
        "max_position_embeddings": 211,
        "initializer_range": 0.2,  # large, so that every part of the random model matters
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    } | changes
    return LlamaConfig(**values)


def make_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return _finish(LlamaForCausalLM(text_config(**changes)), seed)


def make_llava(seed: int = 0, **changes) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=22,
        intermediate_size=29,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=22,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(**changes),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _finish(LlavaForConditionalGeneration(config), seed)


def _finish(model: nn.Module, seed: int) -> nn.Module:
    """Gains away from one, or a test could not see one that is forgotten; no early stop by a random end token."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.set_attn_implementation("eager")  # much the fastest at this size
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()


def image(seed: int) -> Tensor:
    """(3, H, W) random pixels."""
    return torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def make_batch(
    lengths: tuple[tuple[int, int], ...] = ((7, 3), (5, 2), (11, 5)),
    images: tuple[bool, ...] | None = (True, False, True),
    *,
    side: str = "right",
    seed: int = 0,
) -> dict[str, Tensor]:
    """One labelled row a (prompt, answer) pair of lengths; an image adds IMAGE_TOKENS prompt tokens to its row.

    `side` is the side of the padding. `images=None` makes a text-only batch without pixel_values.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, pixels = [], []
    for number, (prompt, answer) in enumerate(lengths):
        text = torch.randint(3, IMAGE, (prompt + answer,), generator=generator).tolist()
        has_image = images is not None and images[number]
        row = [text[0], *[IMAGE] * (IMAGE_TOKENS if has_image else 0), *text[1:]]
        if has_image:
            pixels.append(image(1000 * seed + number))
        rows.append((row, len(row) - answer))
    longest = max(len(row) for row, _ in rows)
    ids, mask, labels = [], [], []
    for row, prompt in rows:
        gap = longest - len(row)
        before, after = (gap, 0) if side == "left" else (0, gap)
        ids.append([PAD] * before + row + [PAD] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
        labels.append([-100] * (before + prompt) + row[prompt:] + [-100] * after)
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def make_prompts(
    lengths: tuple[int, ...] = (7, 5, 11), images: tuple[bool, ...] | None = (True, False, True), *, seed: int = 0
) -> dict[str, Tensor]:
    """Left-padded prompts without labels, as `generate` wants them."""
    batch = make_batch(tuple((length, 0) for length in lengths), images, side="left", seed=seed)
    del batch["labels"]
    return batch


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One example of a batch, without its padding."""
    keep = batch["attention_mask"][row].bool()
    out = {key: value[row : row + 1, keep] for key, value in batch.items() if key != "pixel_values"}
    with_image = (batch["input_ids"] == IMAGE).any(1)
    if with_image[row]:
        place = int(with_image[:row].sum())
        out["pixel_values"] = batch["pixel_values"][place : place + 1]
    return out


def stir(adapters: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Random adapters (new ones are the identity and would prove nothing); the router far from even."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters.named_parameters():
        step = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (10 * step if "router" in name else step).to(parameter.dtype)


# ------------------------------------------------------------------------------------------------- a toy task


@dataclass
class ToyExample:
    id: int
    images: list[Tensor]
    question: list[int]
    choices: list[str]
    answer: str
    explanation: list[int]
    categories: dict[str, str] = field(default_factory=dict)


class ToyTask:
    """Which of three classes is the first token of the question in? Some questions come with an image.

    The answer is one token (3, 4 or 5), then an explanation of two tokens that repeats it, then EOS.
    """

    name = "toy"
    processor = None

    def __init__(self, sizes: dict[str, int] | None = None, *, images: bool = True, seed: int = 0) -> None:
        sizes = sizes or {"train": 48, "search": 24, "val": 24, "test": 24}
        rng = random.Random(seed)
        number = 0
        for split, size in sizes.items():
            examples = []
            for _ in range(size):
                question = [rng.randrange(10, 90) for _ in range(rng.choice((3, 5, 7)))]
                label = question[0] % 3
                has_image = images and rng.random() < 0.5
                examples.append(
                    ToyExample(
                        id=number,
                        images=[image(number)] if has_image else [],
                        question=question,
                        choices=["3", "4", "5"],
                        answer=str(3 + label),
                        explanation=[6 + label, 6 + label],
                        categories={"context": "IMG" if has_image else "NO"},
                    )
                )
                number += 1
            setattr(self, split, examples)

    def collate(self, examples, answers: bool = True) -> dict[str, Tensor]:
        rows = []
        for example in examples:
            prompt = [BOS, *[IMAGE] * (IMAGE_TOKENS * len(example.images)), *example.question]
            rows.append((prompt, [int(example.answer), *example.explanation, EOS] if answers else []))
        longest = max(len(p) + len(a) for p, a in rows)
        ids, mask, labels = [], [], []
        for prompt, answer in rows:
            gap = [PAD] * (longest - len(prompt) - len(answer))
            row = prompt + answer
            ids.append(row + gap if answers else gap + row)
            mask.append([1] * len(row) + [0] * len(gap) if answers else [0] * len(gap) + [1] * len(row))
            labels.append([-100] * len(prompt) + answer + [-100] * len(gap))
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        pixels = [pixel for example in examples for pixel in example.images]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        if answers:
            batch["labels"] = torch.tensor(labels)
        return batch

    def _batches(self, split, limit, batch_size):
        examples = getattr(self, split)[:limit]
        for start in range(0, len(examples), batch_size):
            yield examples[start : start + batch_size]

    @torch.no_grad()
    def score(self, model, split="val", limit=None, batch_size=64) -> dict:
        """loss (mean over answer tokens), accuracy (first answer token), count; one forward a batch."""
        training = model.training
        model.eval()
        total, tokens, right, count = 0.0, 0, 0, 0
        for examples in self._batches(split, limit, batch_size):
            batch = self.collate(examples)
            logits = model(**batch).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            total += nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            tokens += int((labels != -100).sum())
            first = (labels != -100).int().argmax(1)
            rows = torch.arange(len(examples))
            right += int((logits[rows, first].argmax(-1) == labels[rows, first]).sum())
            count += len(examples)
        model.train(training)
        return {"loss": total / tokens, "accuracy": right / count, "count": count, "split": split}

    @torch.no_grad()
    def evaluate(self, model, split="val", limit=None, batch_size=64) -> dict:
        """As `score`, but accuracy comes from generated text; unparsed counts answers that are no choice."""
        result = self.score(model, split, limit, batch_size)
        right, unparsed = 0, 0
        for examples in self._batches(split, limit, batch_size):
            batch = self.collate(examples, answers=False)
            out = model.generate(**batch, max_new_tokens=1, do_sample=False)[:, batch["input_ids"].shape[1]]
            for example, token in zip(examples, out.tolist(), strict=True):
                right += str(token) == example.answer
                unparsed += str(token) not in example.choices
        return result | {"accuracy": right / result["count"], "unparsed": unparsed, "template": "toy", "parser": "toy"}


# -------------------------------------------------------------------------------------------- bit for bit


@dataclass(eq=False)
class Bits:
    """Tensors by name, equal if bitwise equal."""

    tensors: dict[str, Tensor]

    def __eq__(self, other: object) -> bool:
        pairs = zip(self.tensors.items(), other.tensors.items(), strict=True)
        return len(self.tensors) == len(other.tensors) and all(
            a == b and s.dtype == t.dtype and torch.equal(s, t) for (a, s), (b, t) in pairs
        )

    __hash__ = None


def snapshot(model: nn.Module) -> dict:
    """All that could be left changed: values, identities, order, modes, hooks, flags, attributes."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return {
        "values": Bits({name: value.detach().clone() for name, value in model.state_dict().items()}),
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()],
        "training": [module.training for module in model.modules()],
        "attributes": [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
        "hooks": [[list(getattr(module, kind)) for kind in hooks] for module in model.modules()],
    }


class Says(nn.Module):
    """Writes the same whatever it is asked."""

    def __init__(self, tokenizer, text):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, self.ids.expand(len(input_ids), -1)], 1)
