"""What EAS is compared with: full tuning, LoRA and LLaMA-Adapter (peft), bottleneck adapters, and whole layers skipped.

Prompt tuning, prefix tuning and MAM are in `virtual_tokens.py`; DAS, which searches for the layers to skip, is
`EASConfig(kinds=("layer",), adapter="bottleneck")`.

Each function prepares a model that `fit` and a task's `evaluate` take as it is, and says which share of the model's
parameters it trains. A decoder's vision tower is never trained: modules are picked by their full path inside of the
language model, not by a name like "q_proj", which vision towers use as well.

A model that names its sites itself (METER) names what these functions need besides: `eas_layers`, the lists of layers
in which LoRA goes, and `eas_modules_to_save`, what has to train whatever the method, its task's head. Adapters stand
behind the feed-forwards of its sites of kind "layer".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .bottleneck import Behind, Bottleneck, like
from .errors import ConfigError
from .families import layer_names
from .masks import check_mask
from .rehearsal import leaves_tuple
from .sites import decoder_layers, find_sites, names_its_sites
from .trained_parts import TrainedParts, wanted_parts

VISION = ("vision", "visual", "image_encoder")  # in the paths of vision towers
MERGERS = (".merger.", ".deepstack_merger_list.")  # projectors that lie inside of them (Qwen-VL)


def full_tuning(model: nn.Module, projector: bool = True) -> tuple[nn.Module, float]:
    """The language model trains whole, embeddings and head included; with `projector` also what lies between the
    vision tower and it. A model without a decoder (METER) is tuned whole, its vision tower too, as METER's own
    training did. Returns the model (the same object) and the trainable share of its parameters.
    """
    inside = {id(p) for part in _language_model(model) for p in part.parameters()}
    for name, parameter in model.named_parameters():
        between = projector and (not any(word in name for word in VISION) or any(word in name for word in MERGERS))
        parameter.requires_grad_(id(parameter) in inside or between)
    return model, share_trained(model)


def lora(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.05, linears: tuple[str, ...] | None = None
) -> tuple[nn.Module, float]:
    """LoRA on the linears of the decoder layers, of METER those of RoBERTa and of the fusion layers, whose head trains
    along (peft's modules_to_save). Returns a PeftModel and the trainable share of its parameters.

    linears: names within a layer ("q_proj", "v_proj"); None: all of them. The output head is not among them.
    Raises ConfigError if no linear has such a name.
    """
    from peft import LoraConfig, get_peft_model

    targets, along = language_linears(model, linears), list(_trained_along(model)) or None
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, modules_to_save=along, bias="none"
    )
    tuned = get_peft_model(model, config)
    return tuned, share_trained(tuned)


def llama_adapter(model: nn.Module, tokens: int = 10, layers: int | None = None) -> tuple[nn.Module, float]:
    """LLaMA-Adapter (Zhang et al., 2023): in the last `layers` attentions (None: all) every query also attends to
    `tokens` learned vectors, through a gate that starts at zero. peft's AdaptionPrompt, on the language model.

    Returns the model (the same object, changed) and the trainable share of its parameters. What is learned has the
    dtype of the attention's weights. Raises ConfigError for families that peft has none for (it has Llama, Mistral and
    GPT-2, alone or inside of a multimodal model) and for heads whose widths do not add up to the model's, which it
    takes for granted.
    """
    from peft import AdaptionPromptConfig, AdaptionPromptModel

    path, stack = decoder_layers(model)
    decoder = model.get_submodule(path.rpartition(".")[0])
    config, layers = decoder.config, len(stack) if layers is None else layers
    if not 0 < layers <= len(stack) or tokens < 1:
        raise ConfigError(
            f"llama_adapter: wanted 1 to {len(stack)} layers and 1 token or more, got {layers} and {tokens}"
        )
    keys = getattr(model.get_submodule(find_sites(model)[0].path), "k_proj", None)
    heads = config.num_attention_heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    if keys is not None and keys.in_features // keys.out_features != groups:
        raise ConfigError(
            f"llama_adapter: peft's AdaptionPrompt takes {heads} heads to be as wide as the model together, here they"
            f" are not ({keys.in_features} wide, keys {keys.out_features}); take prefix_tuning instead"
        )
    before = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        settings = AdaptionPromptConfig(adapter_len=tokens, adapter_layers=layers)
        AdaptionPromptModel(decoder, {"default": settings}, "default")
    except ValueError as error:
        for parameter in before:
            parameter.requires_grad_(True)
        raise ConfigError(
            f"llama_adapter: {error} peft's AdaptionPrompt knows llama, mistral and gpt2, this language model is a"
            f" {config.model_type}; take prefix_tuning, which works for any decoder with a KV cache"
        ) from error
    return model, share_trained(model)


class LayerAdapter(Bottleneck):
    """A bottleneck in the place of a whole decoder layer: takes a layer's arguments, keeps nothing in the cache."""

    def __init__(self, layer: nn.Module, hidden_size: int, rank: int) -> None:
        super().__init__(hidden_size, rank)
        if hasattr(layer, "attention_type"):  # decoders with several attention masks ask each layer which it takes
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states)


def bottlenecks(model: nn.Module, rank: int = 128) -> tuple[nn.Module, float]:
    """A bottleneck adapter behind the feed-forward of every decoder layer, the rest frozen: one a layer, as "Adapter"
    in the paper's Table 1. Of METER, of every fusion layer of both streams, before the sum with what the feed-forward
    read; its head trains along. Returns the model (the same object, changed) and the trainable share of its parameters.
    """
    sites = find_sites(model, ("layer",))
    model.requires_grad_(False)
    TrainedParts(model, _trained_along(model)).train()
    for site in sites:
        ffn = model.get_submodule(site.ffn_path)
        model.set_submodule(site.ffn_path, Behind(ffn, like(Bottleneck(site.hidden_size, rank), ffn)))
    return model, share_trained(model)


def skip_layers(model: nn.Module, layers: Iterable[int], rank: int = 128) -> tuple[nn.Module, float]:
    """Whole decoder layers replaced by a bottleneck each, the rest frozen: what Dynamic Architecture Skipping (DAS)
    leaves, where EAS skips attentions and keeps feed-forwards. Returns as `bottlenecks`.

    Raises ConfigError for a layer that is not there, and for layer 0: the KV cache takes its length from that entry,
    so that without it every decoded token would be placed at the start. And for a family whose layers return tuples
    (GPT-J, Falcon).
    """
    _, stack = decoder_layers(model)
    chosen = check_mask(layers, len(stack))  # layers, not sites: a hybrid has more of them
    if 0 in chosen:
        raise ConfigError("skip_layers: layer 0 must stay, as the KV cache takes its length from it; skip a later one")
    first = find_sites(model)[0]
    width, known = first.hidden_size, stack[first.layer]
    if leaves_tuple(known, layer_names(known), width):
        raise ConfigError(
            f"skip_layers: {type(known).__name__} returns a tuple, which the adapter in its place does not; take"
            ' eas.attach(model, eas.EASConfig(kinds=("layer",), adapter="bottleneck")) and set its mask'
        )
    model.requires_grad_(False)
    for number in chosen:
        layer = stack[number]
        stack[number] = like(LayerAdapter(layer, width, rank), layer)
    return model, share_trained(model)


def language_linears(model: nn.Module, linears: tuple[str, ...] | None = None) -> list[str]:
    """Full module paths of the linears in the decoder layers (of a model that names its `eas_layers`, in those), all or
    those with the given last names.
    """
    lists = model.eas_layers if names_its_sites(model) else (decoder_layers(model)[0],)
    named = ((path, model.get_submodule(path).named_modules()) for path in lists)
    found = [f"{path}.{name}" for path, inside in named for name, module in inside if isinstance(module, nn.Linear)]
    chosen = [name for name in found if linears is None or name.split(".")[-1] in linears]
    if not chosen:
        known = sorted({name.split(".")[-1] for name in found})
        raise ConfigError(f"linears: wanted some of {known}, got {list(linears or ())}")
    return chosen


def _trained_along(model: nn.Module) -> tuple[str, ...]:
    """Paths of what trains whatever the method. LaVIN's parts are adapters of its own method, and no head."""
    return wanted_parts(model, None) if names_its_sites(model) else ()


def _language_model(model: nn.Module) -> list[nn.Module]:
    if names_its_sites(model):
        return [model]
    parts = [model.get_decoder()] if hasattr(model, "get_decoder") else [model]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return parts if head is None else [*parts, head]


def share_trained(model: nn.Module) -> float:
    """Share of the model's parameters that require a gradient."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained) / sum(n for n, _ in counts)
