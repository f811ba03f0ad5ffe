"""Effective Attention Skipping (EAS, arXiv 2403.15226) for multimodal language models.

The names below are loaded when they are first used, so that ``import eas_kit`` costs nothing and pulls in
no plotting or notebook package.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# public name -> module that defines it
_HOME = {
    "EASConfig": "config",
    "EASError": "errors",
    "EASModel": "model",
    "PIA": "pia",
    "SearchConfig": "config",
    "TrainConfig": "config",
    "attach": "model",
    "check_merge": "proof",
    "describe": "sites",
    "detach": "model",
    "estimate_memory": "memory",
    "find_sites": "sites",
    "fit": "training",
    "load": "model",
    "load_mask": "masks",
    "load_model": "models",
    "load_task": "tasks",
    "measure": None,  # a module
    "merged": "merging",
    "probe_redundancy": "probe",
    "save_mask": "masks",
    "search": "training",
    "skipping": "slots",
    "static_merge": "static",
    "tables": None,
    "update_preferences": "bandit",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'eas_kit' has no attribute {name!r}")
    home = _HOME[name]
    if home is None:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
