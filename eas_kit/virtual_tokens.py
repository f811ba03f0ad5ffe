"""Baselines with virtual tokens before the prompt: prompt tuning, prefix tuning, and MAM, on any of our decoders.

peft holds what is learned, its settings and its files. Where the tokens go is decided here: in front of what the
language model reads, once the pictures are in their places. A hook on the decoder puts them there (prompt tuning) or
their keys and values into the KV cache (prefix tuning), lets the mask and the positions of everything else begin behind
them, and takes them out of what the decoder returns. So labels, pictures, padding on either side, `generate` and all
that the model around does stay as they are, and a row reads the same, be it padded or not. For unpadded text the
result is that of peft's own PeftModelForCausalLM.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from .baselines import share_trained
from .bottleneck import Bottleneck, Parallel, like
from .errors import ConfigError
from .modes import eval_mode
from .prompt import find_cache, name_cache
from .sites import decoder_layers, find_sites


def prompt_tuning(model: nn.Module, tokens: int = 20) -> tuple[nn.Module, float]:
    """Prompt tuning (Lester et al., 2021): `tokens` learned embeddings in front of the text, all else frozen.

    They start as embeddings of random tokens of the vocabulary. Returns a PeftModel and the trainable share of its
    parameters. Raises ConfigError for a decoder that has other layers than attentions, which read padding; in use, for
    static caches, which lack the room, and for rows padded on the left where attention sees no further than a window
    that is shorter than they are.
    """
    from peft import PeftModel, PromptTuningConfig

    _check_tokens("prompt_tuning", tokens)
    path, layers = decoder_layers(model)
    if len(find_sites(model)) != len(layers):
        raise ConfigError(
            f"prompt_tuning: {type(model.get_submodule(path.rpartition('.')[0])).__name__} has layers that are no"
            " attentions: where a row is padded they would read the padding between virtual tokens and text; take lora"
            " or adapter"
        )
    config = model.config.get_text_config(decoder=True)
    settings = PromptTuningConfig(
        num_virtual_tokens=tokens,
        prompt_tuning_init="SAMPLE_VOCAB",
        token_dim=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_transformer_submodules=1,
    )
    tuned = PeftModel(model, settings)
    Placement(tuned, tokens, deep=False)
    return tuned, share_trained(tuned)


def prefix_tuning(model: nn.Module, tokens: int = 20, projection: int | None = None) -> tuple[nn.Module, float]:
    """Prefix tuning (Li and Liang, 2021): keys and values of `tokens` learned positions in every layer.

    They start as those of random tokens of the vocabulary, as the model itself reads them. projection: they are made
    by an MLP of that width instead, which starts at random. Returns a PeftModel and the trainable share of its
    parameters. Raises ConfigError for a decoder whose layers do not all keep keys and values of one shape; in use as
    `prompt_tuning`, and for gradient checkpointing, which drops what is in the cache.
    """
    from peft import PeftModel, PrefixTuningConfig

    _check_tokens("prefix_tuning", tokens)
    decoder, config = _decoder(model), model.config.get_text_config(decoder=True)
    start = _keys_and_values(decoder, torch.randint(0, config.vocab_size, (1, tokens)))  # (layers, 2, heads, tokens, D)
    layers, _, heads, _, width = start.shape
    settings = PrefixTuningConfig(
        num_virtual_tokens=tokens,
        token_dim=heads * width,
        num_layers=layers,
        num_attention_heads=heads,
        num_transformer_submodules=1,
        prefix_projection=projection is not None,
        encoder_hidden_size=projection,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuned = PeftModel(model, settings)
    if (settings.num_attention_heads, settings.token_dim) != (heads, heads * width):  # it goes by the configuration
        for parameter in trained:
            parameter.requires_grad_(True)
        raise ConfigError(
            f"prefix_tuning: peft takes the keys of {type(decoder).__name__} to be {settings.num_attention_heads} heads"
            f" of together {settings.token_dim}, and they are {heads} of {heads * width}; take lora or adapter"
        )
    if projection is None:
        # (tokens, layers, 2, heads, D), as peft lays them out
        flat = start.permute(3, 0, 1, 2, 4).reshape(tokens, -1)
        if not flat.is_meta:
            tuned.prompt_encoder["default"].load_prompt_embeddings(flat)
    Placement(tuned, tokens, deep=True)
    return tuned, share_trained(tuned)


def mam(
    model: nn.Module, tokens: int = 20, rank: int = 64, scale: float = 4.0, dropout: float = 0.0
) -> tuple[nn.Module, float]:
    """MAM (He et al., 2022): prefix tuning, and adapters in parallel: FFN(x) + scale * up(relu(down x)).

    `up` starts at zero. Returns and raises as `prefix_tuning`.
    """
    sites = find_sites(model, ("ffn",))
    tuned, _ = prefix_tuning(model, tokens)
    for site in sites:
        layer = model.get_submodule(site.layer_path)
        ffn = getattr(layer, site.slot)
        beside = like(Bottleneck(site.hidden_size, rank, scale, dropout, activation=F.relu), ffn)
        setattr(layer, site.slot, Parallel(ffn, beside))
    return tuned, share_trained(tuned)


class Placement:
    """Hooks on the decoder of a PeftModel that put its virtual tokens to work."""

    def __init__(self, tuned: nn.Module, tokens: int, deep: bool) -> None:
        base = tuned.get_base_model()
        self.decoder = _decoder(base)
        self.config = base.config.get_text_config(decoder=True)
        self.encode, self.tokens, self.deep = tuned.get_prompt, tokens, deep
        self.names = list(inspect.signature(self.decoder.forward).parameters)
        self.cut = 0  # positions that the running forward has more than the model around it knows
        self.decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        self.decoder.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        values = dict(zip(self.names, args, strict=False)) | kwargs
        self._check(values)
        embeds = values.get("inputs_embeds")
        if embeds is None:
            embeds = decoder.get_input_embeddings()(values.pop("input_ids"))
        values["inputs_embeds"] = embeds
        values.pop("input_ids", None)
        cache = find_cache(values)
        first = cache is None or int(cache.get_seq_length()) == 0
        more = self.tokens if first and not self.deep else 0  # in this forward's own input
        if values.get("attention_mask") is not None:
            values["attention_mask"] = F.pad(values["attention_mask"], (self.tokens, 0), value=1)
        for name in ("position_ids", "cache_position"):
            places = values.get(name)
            if places is not None:
                own = torch.arange(more, device=places.device, dtype=places.dtype)
                values[name] = torch.cat([own.expand(*places.shape[:-1], more), places + self.tokens], dim=-1)
        if first and self.deep:
            cache = DynamicCache(config=self.config) if cache is None else cache
            for number, layer in enumerate(self.encode(len(embeds)).layers):
                cache.update(layer.keys.to(embeds.device), layer.values.to(embeds.device), number)
            values["past_key_values"] = cache
            name_cache(values, self.names)
        elif first:
            values["inputs_embeds"] = torch.cat([self.encode(len(embeds)).to(embeds), embeds], dim=1)
        self.cut = more
        return (), values

    def _after(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.deep and kwargs.get("use_cache") is False and getattr(output, "past_key_values", None) is not None:
            output.past_key_values = None  # nobody asked for it: it was for the prefix, and holds this forward alone
        if not self.cut:
            return output
        if isinstance(output, tuple):
            return (output[0][:, self.cut :], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, self.cut :]
        return output

    def _check(self, values: dict[str, Any]) -> None:
        """ConfigError for what would be computed wrongly."""
        cache, mask = find_cache(values), values.get("attention_mask")
        if getattr(cache, "is_compileable", False):
            raise ConfigError(
                "virtual tokens need room that a static cache does not have; leave cache_implementation out"
            )
        if mask is not None and (not torch.is_tensor(mask) or mask.dim() != 2):
            raise ConfigError(
                f"{type(self.decoder).__name__} gets a mask that is made outside of it, to which no virtual tokens can"
                " be added; take lora, adapter or llama_adapter for this family"
            )
        if self.deep and self.decoder.training and _recomputes(self.decoder):
            raise ConfigError("prefix tuning lives in the KV cache, which gradient checkpointing drops: switch it off")
        reach = _reach(self.config)
        if reach is not None and mask is not None and not mask.is_meta:
            length = self.tokens + mask.shape[1]
            if length > reach and (mask[:, :1] == 0).any():
                raise ConfigError(
                    f"{type(self.decoder).__name__} has attentions that see {reach} positions, and here are {length}:"
                    " in a row that is padded on the left they would see padding in the place of virtual tokens;"
                    " generate such prompts one by one"
                )
        known = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position")
        tokens = values.get("input_ids")
        shape = (values["inputs_embeds"] if tokens is None else tokens).shape[:2]
        for name, value in values.items():
            if name not in known and torch.is_tensor(value) and value.shape[:2] == shape and not self.deep:
                raise ConfigError(
                    f"{type(self.decoder).__name__} reads {name} at every position, and virtual tokens have none; take"
                    " prefix_tuning for this family"
                )


def _decoder(model: nn.Module) -> nn.Module:
    """The module that runs the decoder's layers."""
    return model.get_submodule(decoder_layers(model)[0].rpartition(".")[0])


def _reach(config: Any) -> int | None:
    """Positions that the shortest-sighted attention sees; None for all."""
    kinds = getattr(config, "layer_types", None) or ()
    if kinds and all(kind == "full_attention" for kind in kinds):
        return None
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window), default=None)


def _recomputes(decoder: nn.Module) -> bool:
    value = getattr(decoder, "is_activation_checkpointing", None)  # its name in newer transformers
    return bool(decoder.is_gradient_checkpointing if value is None else value)


@torch.no_grad()
def _keys_and_values(decoder: nn.Module, ids: Tensor) -> Tensor:
    """(layers, 2, heads, S, D): keys and values that the decoder keeps of ids (1, S)."""
    device = decoder.get_input_embeddings().weight.device
    with eval_mode(decoder):
        cache = find_cache(decoder(input_ids=ids.to(device), use_cache=True))
    kept = [[getattr(layer, part, None) for part in ("keys", "values")] for layer in getattr(cache, "layers", ())]
    shapes = {None if tensor is None else tuple(tensor.shape) for pair in kept for tensor in pair}
    if len(shapes) != 1 or None in shapes:
        raise ConfigError(
            f"prefix_tuning: {type(decoder).__name__} does not keep keys and values of one shape in every layer (got"
            f" {sorted(map(str, shapes))}), which a prefix has to; take prompt_tuning, lora or adapter"
        )
    return torch.stack([torch.cat([tensor.to(device) for tensor in pair]) for pair in kept])


def _check_tokens(name: str, tokens: int) -> None:
    if not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"{name}: tokens: wanted a whole number from 1 up, got {tokens!r}")
