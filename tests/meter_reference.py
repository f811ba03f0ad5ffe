"""METER in plain float64 loops over a checkpoint's own names, and a small checkpoint in the published layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import BertConfig, CLIPVisionConfig, RobertaConfig

from eas_kit.models.meter import MeterConfig

VOCAB, ANSWERS, PAD = 31, 11, 1
TEXT, IMAGE, WIDTH = 14, 22, 26  # 2 heads of 7, 11 and 13
TEXT_FF, IMAGE_FF, FF = 23, 29, 37
TEXT_LAYERS, BLOCKS, LAYERS = 3, 2, 5  # CLIP has one block more in the file
PATCH, SIDE, OLD_GRID = 3, 15, 4  # 5 x 5 patches here, 4 x 4 in the file
QUERIES = 2


def config(task: str = "vqa", **changes) -> MeterConfig:
    sizes = {"num_labels": ANSWERS} if task == "vqa" else {}
    return MeterConfig(
        task=task,
        text_config=RobertaConfig(
            vocab_size=VOCAB,
            hidden_size=TEXT,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=QUERIES,
            intermediate_size=TEXT_FF,
            max_position_embeddings=19,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=IMAGE,
            num_hidden_layers=BLOCKS,
            num_attention_heads=QUERIES,
            intermediate_size=IMAGE_FF,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        cross_modal_config=BertConfig(
            hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=QUERIES, intermediate_size=FF
        ),
        **sizes | changes,
    )


def checkpoint(seed: int = 0, visual: str = "vit_model.visual.") -> dict[str, Tensor]:
    """A state_dict of the published file's layout, random, with its heads of pretraining and all twelve (here three)
    blocks of CLIP."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    def linear(name: str, inputs: int, outputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width)
        state[f"{name}.weight"] += 1
        add(f"{name}.bias", width)

    def bert(name: str, width: int, ff: int, *attentions: str) -> None:
        for attention in attentions:
            for part in ("query", "key", "value"):
                linear(f"{name}.{attention}.self.{part}", width, width)
            linear(f"{name}.{attention}.output.dense", width, width)
            norm(f"{name}.{attention}.output.LayerNorm", width)
        linear(f"{name}.intermediate.dense", width, ff)
        linear(f"{name}.output.dense", ff, width)
        norm(f"{name}.output.LayerNorm", width)

    add(f"{visual}class_embedding", IMAGE)
    add(f"{visual}positional_embedding", OLD_GRID**2 + 1, IMAGE)
    add(f"{visual}proj", IMAGE, 7)
    add(f"{visual}conv1.weight", IMAGE, 3, PATCH, PATCH)
    norm(f"{visual}ln_pre", IMAGE)
    norm(f"{visual}ln_post", IMAGE)
    for block in range(BLOCKS + 1):
        name = f"{visual}transformer.resblocks.{block}"
        add(f"{name}.attn.in_proj_weight", 3 * IMAGE, IMAGE)
        add(f"{name}.attn.in_proj_bias", 3 * IMAGE)
        linear(f"{name}.attn.out_proj", IMAGE, IMAGE)
        linear(f"{name}.mlp.c_fc", IMAGE, IMAGE_FF)
        linear(f"{name}.mlp.c_proj", IMAGE_FF, IMAGE)
        norm(f"{name}.ln_1", IMAGE)
        norm(f"{name}.ln_2", IMAGE)
    text = "text_transformer.embeddings"
    state[f"{text}.position_ids"] = torch.arange(19)[None]
    add(f"{text}.word_embeddings.weight", VOCAB, TEXT)
    add(f"{text}.position_embeddings.weight", 19, TEXT)
    add(f"{text}.token_type_embeddings.weight", 1, TEXT)
    norm(f"{text}.LayerNorm", TEXT)
    for layer in range(TEXT_LAYERS):
        bert(f"text_transformer.encoder.layer.{layer}", TEXT, TEXT_FF, "attention")
    linear("text_transformer.pooler.dense", TEXT, TEXT)
    linear("cross_modal_text_transform", TEXT, WIDTH)
    linear("cross_modal_image_transform", IMAGE, WIDTH)
    add("token_type_embeddings.weight", 2, WIDTH)
    for stream in ("image", "text"):
        for layer in range(LAYERS):
            bert(f"cross_modal_{stream}_layers.{layer}", WIDTH, FF, "attention", "crossattention")
        linear(f"cross_modal_{stream}_pooler.dense", WIDTH, WIDTH)
    linear("itm_score.fc", 2 * WIDTH, 2)
    linear("mlm_score.transform.dense", WIDTH, WIDTH)
    norm("mlm_score.transform.LayerNorm", WIDTH)
    add("mlm_score.decoder.weight", VOCAB, WIDTH)
    add("mlm_score.bias", VOCAB)
    return state


# ------------------------------------------------------------------------------------------------ the plain forward
class Plain:
    """`state`: a checkpoint. `skipped`: site -> function (x, mean of what it would read) -> delta; sites as eas_kit
    numbers them. `layers`: the same for whole layers, text's first. `behind`: layer -> function of what its
    feed-forward returns, before the sum. Every row by itself, without padding."""

    def __init__(
        self,
        state: dict[str, Tensor],
        skipped: dict | None = None,
        visual: str = "vit_model.visual.",
        layers: dict | None = None,
        behind: dict | None = None,
    ):
        self.state = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
        self.skipped, self.visual, self.layers, self.behind = skipped or {}, visual, layers or {}, behind or {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = []
        for q_head, k_head, v_head in zip(*(t.chunk(QUERIES, -1) for t in (q, k, v)), strict=True):
            scores = q_head @ k_head.T / math.sqrt(q_head.shape[-1])
            heads.append(torch.softmax(scores, -1) @ v_head)
        return torch.cat(heads, -1)

    def bert_attention(self, name: str, x: Tensor, context: Tensor, eps: float, site: int | None = None) -> Tensor:
        if site in self.skipped:
            return self.norm(f"{name}.output.LayerNorm", x + self.skipped[site](x, context.mean(0)), eps)
        q = self.linear(f"{name}.self.query", x)
        k, v = (self.linear(f"{name}.self.{part}", context) for part in ("key", "value"))
        out = self.linear(f"{name}.output.dense", self.attend(q, k, v))
        return self.norm(f"{name}.output.LayerNorm", out + x, eps)

    def bert_ffn(self, name: str, x: Tensor, eps: float, layer: int | None = None) -> Tensor:
        inner = self.linear(f"{name}.intermediate.dense", x)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        out = self.linear(f"{name}.output.dense", inner)
        if layer in self.behind:
            out = self.behind[layer](out)
        return self.norm(f"{name}.output.LayerNorm", out + x, eps)

    def text(self, ids: list[int]) -> Tensor:
        name, n = "text_transformer.embeddings", len(ids)
        x = self.state[f"{name}.word_embeddings.weight"][ids]
        x = x + self.state[f"{name}.position_embeddings.weight"][PAD + 1 : PAD + 1 + n]
        x = self.norm(f"{name}.LayerNorm", x + self.state[f"{name}.token_type_embeddings.weight"][0], 1e-5)
        for layer in range(TEXT_LAYERS):
            name = f"text_transformer.encoder.layer.{layer}"
            x = self.bert_attention(f"{name}.attention", x, x, 1e-5)
            x = self.bert_ffn(name, x, 1e-5)
        return self.linear("cross_modal_text_transform", x)

    def positions(self) -> Tensor:
        """Bicubic, coefficient -0.75, edges repeated, pixel centres aligned: what torch and METER's authors use."""
        old = self.state[f"{self.visual}positional_embedding"]
        grid, side = old[1:].view(OLD_GRID, OLD_GRID, -1), SIDE // PATCH

        def weight(t: float, a: float = -0.75) -> float:
            t = abs(t)
            if t <= 1:
                return (a + 2) * t**3 - (a + 3) * t**2 + 1
            return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

        rows = [old[0]]
        for i in range(side):
            for j in range(side):
                y, x = ((n + 0.5) * OLD_GRID / side - 0.5 for n in (i, j))
                total = torch.zeros(IMAGE, dtype=torch.float64)
                for u in range(math.floor(y) - 1, math.floor(y) + 3):
                    for v in range(math.floor(x) - 1, math.floor(x) + 3):
                        at = grid[min(max(u, 0), OLD_GRID - 1), min(max(v, 0), OLD_GRID - 1)]
                        total += weight(y - u) * weight(x - v) * at
                rows.append(total)
        return torch.stack(rows)

    def image(self, pixels: Tensor) -> Tensor:
        v, kernel = self.visual, self.state[f"{self.visual}conv1.weight"]
        patches = [
            (kernel * pixels[:, i : i + PATCH, j : j + PATCH]).sum((1, 2, 3))
            for i in range(0, SIDE, PATCH)
            for j in range(0, SIDE, PATCH)
        ]
        x = torch.stack([self.state[f"{v}class_embedding"], *patches]) + self.positions()
        x = self.norm(f"{v}ln_pre", x, 1e-5)
        for block in range(BLOCKS):
            name = f"{v}transformer.resblocks.{block}"
            n = self.norm(f"{name}.ln_1", x, 1e-5)
            joint = n @ self.state[f"{name}.attn.in_proj_weight"].T + self.state[f"{name}.attn.in_proj_bias"]
            x = x + self.linear(f"{name}.attn.out_proj", self.attend(*joint.chunk(3, -1)))
            inner = self.linear(f"{name}.mlp.c_fc", self.norm(f"{name}.ln_2", x, 1e-5))
            x = x + self.linear(f"{name}.mlp.c_proj", inner * torch.sigmoid(1.702 * inner))
        return self.linear("cross_modal_image_transform", self.norm(f"{v}ln_post", x, 1e-5))

    def pooled(self, ids: list[int], pixels: Tensor, image_type: int = 1) -> Tensor:
        types = self.state["token_type_embeddings.weight"]
        text = self.text(ids) + types[0]
        image = self.image(pixels.double()) + types[min(image_type, 1)]  # NLVR2's third type starts as the second
        for layer in range(LAYERS):
            new = []
            for lane, (stream, x, other) in enumerate((("text", text, image), ("image", image, text))):
                name = f"cross_modal_{stream}_layers.{layer}"
                first, number = 2 * LAYERS * lane + layer, LAYERS * lane + layer
                if number in self.layers:
                    new.append(x + self.layers[number](x, x.mean(0)))
                    continue
                x = self.bert_attention(f"{name}.attention", x, x, 1e-12, first)
                x = self.bert_attention(f"{name}.crossattention", x, other, 1e-12, first + LAYERS)
                new.append(self.bert_ffn(name, x, 1e-12, number))
            text, image = new
        ends = [("text", text), ("image", image)]
        return torch.cat([torch.tanh(self.linear(f"cross_modal_{s}_pooler.dense", x[0])) for s, x in ends])

    def head(self, head: dict[str, Tensor], features: Tensor) -> Tensor:
        """A head of two layers, from the state dict of ours."""
        x = features @ head["0.weight"].T + head["0.bias"]
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * head["1.weight"] + head["1.bias"]
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x @ head["3.weight"].T + head["3.bias"]


def plain_delta(pia: dict[str, Tensor], groups: int, scale: float, temperature: float):
    """The adapter's y - n for one example, from its state dict (eq. 4-6)."""

    def grouped(name: str, z: Tensor) -> Tensor:
        weight, out = pia[f"{name}.weight"], []
        rows, size = len(weight) // groups, len(z) // groups
        for row in range(len(weight)):
            block = row // rows
            out.append((weight[row] * z[block * size : (block + 1) * size]).sum())
        return torch.stack(out) + pia[f"{name}.bias"]

    def delta(x: Tensor, mean: Tensor) -> Tensor:
        pooled = pia["down_pooled.weight"] @ mean + pia["down_pooled.bias"]
        w = torch.softmax((pia["router.weight"] @ mean + pia["router.bias"]) / temperature, 0)
        rows = []
        for one in x:
            z = 0.5 * (pia["down_token.weight"] @ one + pia["down_token.bias"] + pooled)
            rows.append(scale * (w[0] * grouped("up_0", z) + w[1] * grouped("up_1", z)))
        return torch.stack(rows)

    return delta


def plain_bottleneck(adapter: dict[str, Tensor], scale: float = 1.0):
    """What a bottleneck adds to each of the rows x, from its state dict."""

    def delta(x: Tensor) -> Tensor:
        inner = x @ adapter["down.weight"].T + adapter["down.bias"]
        return scale * ((inner * torch.sigmoid(inner)) @ adapter["up.weight"].T + adapter["up.bias"])

    return delta
