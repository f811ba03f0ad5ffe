"""One process of a two-process search, started by test_processes.py with the environment torchrun would set."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import toys

import eas_kit as eas

SETTINGS = {
    "num_skipped": 2,
    "warmup_steps": 3,
    "updates": 4,
    "train_steps_per_update": 2,
    "batch_size": 6,
    "gradient_accumulation_steps": 2,
    "reward_batch_size": 7,  # odd: the two processes get different shares
    "learning_rate": 1e-2,
    "preference_lr": 30.0,
    "seed": 5,
    "progress": False,
}


def run(**changes):
    torch.manual_seed(0)
    base = toys.make_llava()
    # Without dropout, whose noise two processes cannot share, the steps are the same whoever computes them.
    net = eas.attach(base, eas.EASConfig(skip_rank=6, adapt_rank=4, dropout=0.0))
    result = eas.search(net, toys.ToyTask(), eas.SearchConfig(**SETTINGS | changes))
    history = eas.fit(net, toys.ToyTask(), eas.TrainConfig(max_steps=2, batch_size=4, progress=False))
    return net, result, history


def weights(net) -> float:
    return sum(float(p.detach().double().abs().sum()) for p in net.adapters.parameters())


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    net, result, history = run(output_dir=str(folder / "checkpoints"), checkpoint_every=4)
    result.save(folder / f"result-{rank}.json")
    resumed = run(output_dir=str(folder / "checkpoints"), resume=True)[1]
    found = {
        "processes": torch.distributed.get_world_size(),
        "weights": weights(net),
        "losses": history.losses,
        "resumed": resumed.history == result.history,
    }
    (folder / f"more-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
