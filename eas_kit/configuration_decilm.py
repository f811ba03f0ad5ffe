"""The configuration class that a nemotron-nas export brings along, as no library has one for this model_type.

A copy of this file lies beside the exported config.json, whose auto_map names it, so
`AutoConfig.from_pretrained(folder, trust_remote_code=True)` works. It stands alone, for any version of transformers.
"""

from types import SimpleNamespace

from transformers import PretrainedConfig


def _opened(value):
    """Dicts as objects: engines read config.block_configs[i].attention.no_op."""
    return SimpleNamespace(**{k: _opened(v) for k, v in value.items()}) if isinstance(value, dict) else value


def _plain(value):
    return {k: _plain(v) for k, v in vars(value).items()} if isinstance(value, SimpleNamespace) else value


class DeciLMConfig(PretrainedConfig):
    """A Llama's fields, and in `block_configs` what the attention and the feed-forward of each layer are."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        if hasattr(PretrainedConfig, "rope_scaling"):  # the older name of rope_parameters would overwrite them
            kwargs.pop("rope_scaling", None)
        self.block_configs = [_opened(block) for block in block_configs]
        super().__init__(**kwargs)

    def to_dict(self):
        """As in config.json: the blocks are plain dicts again."""
        return super().to_dict() | {"block_configs": [_plain(block) for block in self.block_configs]}
