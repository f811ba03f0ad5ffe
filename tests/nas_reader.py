"""An independent reader of nemotron-nas checkpoints, from the published layout alone: plain torch, no transformers.

Per block: attention (unless no_op) with input_layernorm, q, k, v, o and rotary positions; feed-forward with
post_attention_layernorm, gate, up, down. Sizes of blocks from `block_configs`, as engines read them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F


class NasModel:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        assert self.config["architectures"] == ["DeciLMForCausalLM"]
        assert len(self.config["block_configs"]) == self.config["num_hidden_layers"]
        self.tensors = {}
        for file in folder.glob("*.safetensors"):
            self.tensors |= load_file(file)
        self.read: set[str] = set()

    def get(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def linear(self, x: Tensor, name: str, bias: bool) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias") if bias else None)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.get(f"{name}.weight")
        )

    def rotate(self, x: Tensor) -> Tensor:  # (S, heads, size)
        half = x.shape[-1] // 2
        frequencies = self.config["rope_theta"] ** (-torch.arange(half) / half)
        angles = torch.arange(len(x))[:, None, None] * frequencies
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    def attention(self, n: Tensor, name: str, block: dict) -> Tensor:
        bias, heads, size = self.config["attention_bias"], self.config["num_attention_heads"], self.config["head_dim"]
        kv_heads = heads // block["n_heads_in_group"]
        q = self.rotate(self.linear(n, f"{name}.q_proj", bias).view(-1, heads, size))
        k = self.rotate(self.linear(n, f"{name}.k_proj", bias).view(-1, kv_heads, size))
        v = self.linear(n, f"{name}.v_proj", bias).view(-1, kv_heads, size)
        out = torch.zeros_like(q)
        for head in range(heads):
            scores = q[:, head] @ k[:, head // block["n_heads_in_group"]].T / size**0.5
            future = torch.ones_like(scores).triu(1).bool()
            out[:, head] = scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, head // block["n_heads_in_group"]]
        return self.linear(out.flatten(1), f"{name}.o_proj", bias)

    def feed_forward(self, n: Tensor, name: str, block: dict) -> Tensor:
        if "ffn_mult" in block:
            size = int(2 * block["ffn_mult"] * self.config["hidden_size"] / 3)
            size += -size % 256
        else:
            size = block["intermediate_size"]
        assert len(self.get(f"{name}.gate_proj.weight")) == size
        bias = self.config["mlp_bias"]
        gate = F.silu(self.linear(n, f"{name}.gate_proj", bias))
        return self.linear(gate * self.linear(n, f"{name}.up_proj", bias), f"{name}.down_proj", bias)

    def logits(self, tokens: Tensor) -> Tensor:
        """(S, vocabulary) from (S,)."""
        assert self.config["hidden_act"] == "silu"
        x = self.get("model.embed_tokens.weight")[tokens]
        for number, block in enumerate(self.config["block_configs"]):
            name = f"model.layers.{number}"
            if not block["attention"]["no_op"]:
                x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", block["attention"])
            x = x + self.feed_forward(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp", block["ffn"])
        head = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        return self.norm(x, "model.norm") @ self.get(head).T
