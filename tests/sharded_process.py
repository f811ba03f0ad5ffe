"""One of two processes that share one model, started by test_placement.py with the environment torchrun would set."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_prompt import make_net
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from toys import make_batch, make_llama, make_prompts, row_of
from transformers import AutoModelForCausalLM

import eas_kit as eas
from eas_kit.errors import EASError

MASKS = ((0, 2), (1, 3))
PROMPTS = make_prompts((7, 5), None)
SHAPE = {"num_key_value_heads": 2, "intermediate_size": 58}  # what two processes can halve


def model(**changes) -> nn.Module:
    return make_llama(**SHAPE | changes)


def batch(rank: int) -> dict:
    """Each process its own example, of a length of its own."""
    return row_of(make_batch(images=None), rank)


def gradients(net: eas.EASModel, rank: int, parameters: dict[str, nn.Parameter]) -> dict:
    """`parameters`: the adapters' as an optimiser holds them; FSDP2 shows whole ones in their place for a while."""
    for parameter in parameters.values():
        parameter.grad = None
    loss = net(**batch(rank)).loss
    loss.backward()
    return {"loss": loss.item(), "grads": {n: whole(p.grad) for n, p in parameters.items() if p.grad is not None}}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def answers(net: eas.EASModel) -> dict:
    with torch.no_grad():
        logits = net(**PROMPTS).logits
    return {"logits": logits, "tokens": generated(net), "condensed": generated(net, merge="low_rank")}


def generated(net: eas.EASModel, merge: bool | str = False) -> torch.Tensor:
    return net.generate(**PROMPTS, merge=merge, max_new_tokens=4)


def refusal(net: eas.EASModel) -> str:
    try:
        net.generate(**make_prompts((7,), None), merge=True, max_new_tokens=4)
    except EASError as error:
        return str(error)
    return "merged"


def fsdp(rank: int, folder: Path) -> dict:
    """fully_shard, layer by layer and then what is left, while a mask is set; then both masks in turn."""
    net = make_net(MASKS[0], model=model(), dropout=0.0).train()
    for layer in net.base.model.layers:
        fully_shard(layer)
    fully_shard(net)
    parameters = dict(net.adapters.named_parameters())
    found = {"sharded": type(net.base.model.layers[0].mlp.up_proj.weight.data).__name__}
    found["not_gathered"] = refusal(net.eval())
    register_fsdp_forward_method(net, "generate")
    found["generated_first"] = generated(net)
    for mask in MASKS:
        net.train().mask = mask
        found[mask] = gradients(net, rank, parameters)
        found[mask] |= answers(net.eval())
    found["reason"] = eas.describe(net).reason[0]
    found["refusal"] = refusal(net)
    found["after"] = answers(net)
    net.save_pretrained(folder / "adapters")
    found["detached"] = type(eas.detach(net).model.layers[1].self_attn).__name__
    return found


def tensor_parallel(rank: int, folder: Path) -> dict:
    """transformers' own tensor parallelism."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto", attn_implementation="eager").eval()
    base.generation_config.eos_token_id = None
    net = make_net(MASKS[0], model=base)
    found = {"sharded": type(base.model.layers[0].mlp.up_proj.weight.data).__name__}
    for mask in MASKS:
        net.mask = mask
        found[mask] = answers(net)
    found["reason"] = eas.describe(net).reason[0]
    found["refusal"] = refusal(net)
    found["after"] = answers(net)
    return found


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {"fsdp": fsdp(rank, folder), "tensor_parallel": tensor_parallel(rank, folder)}
    torch.save(found, folder / f"found-{rank}.pt")
    distributed.destroy_process_group()
