"""What families of models call the parts of a decoder layer, and which linears read those parts' inputs.

A family is a row of a table: names, nothing else. A layer fits a row if it has all parts of the row and no other part
with weights; a part nobody named may read or change the residual stream, so a layer that has one is refused.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class Names:
    """What one family calls the parts of its decoder layer."""

    norm_in: str = "input_layernorm"
    attention: str = "self_attn"
    norm_ffn: str | None = "post_attention_layernorm"
    """None in a parallel layer, x + Attention(n) + FFN(n) with n = norm_in(x)."""
    ffn: str = "mlp"
    tail: tuple[str, ...] = ()
    """Norms behind the attention or the feed-forward. They keep working: the layer's own code calls them."""

    @property
    def parts(self) -> tuple[str, ...]:
        named = (self.norm_in, self.attention, self.norm_ffn, self.ffn, *self.tail)
        return tuple(name for name in named if name is not None)


FAMILIES: tuple[Names, ...] = (
    Names(),  # Llama, Mistral, Qwen, Phi-3, Gemma 1, Granite, StableLM, Starcoder2, ..., Llava's and SmolVLM's
    Names(
        norm_ffn="pre_feedforward_layernorm", tail=("post_attention_layernorm", "post_feedforward_layernorm")
    ),  # Gemma 2, 3
    Names(tail=("post_self_attn_layernorm", "post_mlp_layernorm")),  # GLM-4
    Names(ffn="feed_forward"),  # Llama 4
    Names(norm_in="attention_layernorm", norm_ffn="feedforward_layernorm"),  # Apertus
    Names(ffn="feed_forward", norm_ffn="pre_ff_layernorm"),  # the attention layers of Jamba and Bamba
    Names(norm_in="operator_norm", norm_ffn="ffn_norm", ffn="feed_forward"),  # the attention layers of LFM2
    Names(norm_in="ln_1", attention="attn", norm_ffn="ln_2"),  # GPT-2
    Names(attention="attention"),  # GPT-NeoX, one after the other or parallel: its feed-forward has a norm either way
    Names(norm_ffn=None),  # Phi, Cohere, parallel StableLM
    Names(attention="self_attention", norm_ffn=None),  # Falcon
    Names(norm_in="ln_1", attention="attn", norm_ffn=None),  # GPT-J, CodeGen
)

# What a decoder calls its list of layers.
LAYER_LISTS = ("layers", "h")


@dataclass(frozen=True)
class Readers:
    """Linears of a feed-forward or an attention: those that read its input, which a merge rewrites, and the others."""

    sets: tuple[tuple[str, ...], ...]
    """One set a family; the first that a module has all of is taken."""
    others: tuple[str, ...]
    """Parts with weights that read something else. A part that is in neither list may read the input too."""


FFN_READERS = Readers(
    sets=(
        ("gate_proj", "up_proj"),
        ("gate_up_proj",),  # Phi-3, GLM
        ("up_proj",),  # Apertus, Nemotron
        ("w1", "w3"),  # LFM2
        ("c_fc",),  # GPT-2, Starcoder2
        ("fc1",),  # Phi
        ("fc_in",),  # GPT-J
        ("dense_h_to_4h",),  # GPT-NeoX
    ),
    others=("down_proj", "w2", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "act_fn"),
)
ATTENTION_READERS = Readers(
    sets=(
        ("q_proj", "k_proj", "v_proj"),
        ("qkv_proj",),  # Phi-3, CodeGen
        ("c_attn",),  # GPT-2
        ("query_key_value",),  # GPT-NeoX
        ("q_proj", "kv_a_proj_with_mqa"),  # DeepSeek's latent attention
        ("q_a_proj", "kv_a_proj_with_mqa"),  # the same with low-rank queries
    ),
    others=(
        *("o_proj", "out_proj", "c_proj", "dense", "q_b_proj", "kv_b_proj", "sinks"),
        *("q_norm", "k_norm", "qk_norm", "q_layernorm", "k_layernorm", "q_a_layernorm", "kv_a_layernorm"),
    ),
)


def _weighty(module: nn.Module) -> list[str]:
    """Names of the children and of the module's own parameters that hold weights."""
    children = [name for name, child in module.named_children() if next(child.parameters(), None) is not None]
    return children + [name for name, parameter in module._parameters.items() if parameter is not None]


def layer_names(layer: nn.Module) -> Names:
    """The row of FAMILIES that fits the layer; UnsupportedModelError saying why none does."""
    kind = type(layer).__name__
    close = None
    for names in FAMILIES:
        if not all(isinstance(getattr(layer, part, None), nn.Module) for part in names.parts):
            continue
        extra = [name for name in _weighty(layer) if name not in names.parts]
        if not extra:
            return names
        if close is None or len(extra) < len(close):
            close = extra
    if close:
        raise UnsupportedModelError(
            f"{kind} has {', '.join(close)} beside a norm, an attention and a feed-forward: eas_kit does not know that"
            " x + FFN(norm(x)) is what remains of the layer without its attention. If it is, add a row to"
            " eas_kit.families.FAMILIES"
        )
    parts = ", ".join(name for name, _ in layer.named_children()) or "no parts"
    raise UnsupportedModelError(
        f"{kind}: wanted norm - attention - norm - feed-forward, or norm - attention beside feed-forward, with names"
        f" eas_kit knows; it has {parts}. Layers with norms only after their parts, or that mix positions by something"
        " else than softmax attention over the text, cannot be skipped this way; for new names add a row to"
        " eas_kit.families.FAMILIES"
    )


def takes_keywords(layer: nn.Module) -> bool:
    """True if the layer's forward accepts keywords it does not know."""
    parameters = inspect.signature(type(layer).forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def gain_offset(norm: nn.Module, width: int) -> float | None:
    """0.0 if norm(x) = weight * normalise(x) + bias, 1.0 if (1 + weight) * normalise(x) + bias, None if anything else.

    `normalise` divides by the root mean square, with the mean taken away before or not. A missing weight counts as 0
    (gain 1), a missing bias as 0. Read off by running a small copy of the norm on made-up weights, so no family needs
    a name here, and the weights need not be in memory.
    """
    own = {name: parameter for name, parameter in norm._parameters.items() if parameter is not None}
    if not set(own) <= {"weight", "bias"} or next(norm.children(), None) is not None:
        return None
    made_up = {"weight": 0.25, "bias": 0.5}
    probe = copy.copy(norm)
    probe._parameters = {
        name: nn.Parameter(torch.full((width,), made_up[name]), requires_grad=False) if name in own else None
        for name in norm._parameters
    }
    # a ramp with mean 0, so that it is normalised alike with and without the mean taken away
    x = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
    normalised = x / x.square().mean().sqrt()
    try:
        # the class's forward: accelerate puts another one on the instance, bound to the real weights
        seen = type(norm).forward(probe, x[None])[0]
    except Exception:
        return None
    for offset in (0.0, 1.0):
        gain = made_up["weight"] + offset if "weight" in own else 1.0
        expected = gain * normalised + (made_up["bias"] if "bias" in own else 0.0)
        if seen.shape == expected.shape and torch.allclose(seen, expected, rtol=1e-2, atol=1e-2):
            return offset
    return None


def readers(module: nn.Module, table: Readers, *, data: bool = True) -> tuple[str, ...]:
    """Names of the linears of `module` that read its input; UnsupportedModelError saying why one cannot be changed.

    `data=False`: for a model that was built without weights, whose linears are plain but hold nothing yet.
    """
    kind = type(getattr(module, "original", module)).__name__
    names = next((row for row in table.sets if all(getattr(module, name, None) is not None for name in row)), ())
    unknown = [name for name in _weighty(module) if name not in names and name not in table.others]
    if not names or unknown:
        raise UnsupportedModelError(
            f"{kind} has {', '.join(unknown) or 'no linears'}, of which eas_kit does not know that a merge reaches all"
            " that reads its input (in a mixture of experts the router and every expert do); run unmerged, or with"
            ' merge="low_rank", which leaves the linears alone'
        )
    for name in names:
        problem = _linear_problem(getattr(module, name), data)
        if problem:
            raise UnsupportedModelError(f'{kind}.{name}{problem}, or run unmerged or with merge="low_rank"')
    return names


def _linear_problem(linear: nn.Module, data: bool) -> str:
    """Why the weight of this linear cannot be rewritten, and what to do about it; "" if it can."""
    if type(linear) not in (nn.Linear, Conv1D):
        found = f"{type(linear).__module__}.{type(linear).__name__}"
        way_out = "load the model unquantised"
        if found.startswith("peft."):
            way_out = "fold the other adapter in first (attach to what peft_model.merge_and_unload() returns)"
        return f" is a {found}, not a plain nn.Linear; merge needs plain weights: {way_out}"
    weight, kind = linear.weight, type(linear.weight.data).__name__
    if data and weight.is_meta and hasattr(linear, "_hf_hook"):
        where, way_out = "offloaded to CPU or disk", "load the model without offloading"
    elif data and weight.is_meta:
        where, way_out = "on the meta device", "load the model's weights first"
    elif kind == "DTensor":
        where, way_out = "sharded (a DTensor)", "load the model whole, without FSDP or tensor parallelism"
    elif kind != "Tensor" or not weight.is_floating_point():  # torchao keeps nn.Linear and puts a class of its own in
        where, way_out = f"a {kind}", "load the model unquantised"
    elif "forward" in vars(linear) and not hasattr(linear, "_hf_hook"):  # accelerate's only moves what goes in and out
        return " has a forward of its own, put on the instance, which a merge would pass by: del it first"
    elif linear._forward_hooks or linear._forward_pre_hooks:
        return " has forward hooks, which a merge would pass by: remove them first (handle.remove())"
    else:
        return ""
    return f".weight ({weight.dtype}) is {where}; merge needs a whole floating-point weight in memory: {way_out}"


def matrix(linear: nn.Module) -> torch.Tensor:
    """The weight (d_out, d_in) of a linear; GPT-2's Conv1D keeps it the other way round."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight
