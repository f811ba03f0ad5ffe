"""What EAS is compared with: full tuning and LoRA (peft).

Each function prepares a model that `fit` and a task's `evaluate` take as it is, and says which share of the model's
parameters it trains. The vision tower is never trained: modules are picked by their full path inside of the language
model, not by a name like "q_proj", which vision towers use as well.
"""

from __future__ import annotations

from torch import nn

from .errors import ConfigError
from .sites import decoder_layers

VISION = ("vision", "visual", "image_encoder")  # in the paths of vision towers


def full_tuning(model: nn.Module, projector: bool = True) -> tuple[nn.Module, float]:
    """The language model trains whole, embeddings and head included; with `projector` also what lies between the
    vision tower and it. Returns the model (the same object) and the trainable share of its parameters.
    """
    inside = {id(p) for part in _language_model(model) for p in part.parameters()}
    for name, parameter in model.named_parameters():
        between = projector and not any(word in name for word in VISION)
        parameter.requires_grad_(id(parameter) in inside or between)
    return model, _share(model)


def lora(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.05, linears: tuple[str, ...] | None = None
) -> tuple[nn.Module, float]:
    """LoRA on the linears of the decoder layers. Returns a PeftModel and the trainable share of its parameters.

    linears: names within a layer ("q_proj", "v_proj"); None: all of them. The output head is not among them.
    Raises ConfigError if no linear has such a name.
    """
    from peft import LoraConfig, get_peft_model

    targets = language_linears(model, linears)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    tuned = get_peft_model(model, config)
    return tuned, _share(tuned)


def language_linears(model: nn.Module, linears: tuple[str, ...] | None = None) -> list[str]:
    """Full module paths of the linears in the decoder layers, all or those with the given last names."""
    path, layers = decoder_layers(model)
    found = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in found if linears is None or name.split(".")[-1] in linears]
    if not chosen:
        known = sorted({name.split(".")[-1] for name in found})
        raise ConfigError(f"linears: wanted some of {known}, got {list(linears or ())}")
    return [f"{path}.{name}" for name in chosen]


def _language_model(model: nn.Module) -> list[nn.Module]:
    parts = [model.get_decoder()] if hasattr(model, "get_decoder") else [model]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return parts if head is None else [*parts, head]


def _share(model: nn.Module) -> float:
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained) / sum(n for n, _ in counts)
