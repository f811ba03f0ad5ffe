"""``load_model("meter", checkpoint=...)`` and ``load_model("tiny-meter")``: METER with its head and its processor."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eas_kit.errors import ConfigError, EASError

from .meter import LABELS, TASKS, Meter, MeterConfig, paper_size
from .meter_checkpoint import fill, read_state

TINY = Path(__file__).parent / "tiny_meter" / "weights"
HEADS_FILE = "heads.safetensors"
_COMMON = ("task", "dtype", "attn_implementation")
_ARGUMENTS = {
    "meter": (*_COMMON, "checkpoint", "image_size", "answers", "tokenizer", "config", "local_files_only", "token"),
    "tiny-meter": _COMMON,
}


def load(name: str, **kwargs: Any) -> tuple[Meter, CLIPProcessor]:
    """What `eas_kit.load_model` does for "meter" and "tiny-meter": `(model, processor)`, the model in eval mode.

    Args:
        task: the head, "vqa" (default), "nlvr2" or "retrieval".
        dtype: of the weights; float32 where nothing is said.
        attn_implementation: as transformers names them; "sdpa", for "tiny-meter" "eager".
        checkpoint: of "meter", the path of the published .ckpt file (or of one tuned on from it).
        image_size: pixels a side; None: 384, for nlvr2 288.
        answers: of task "vqa", the list of answers, or how many there are (3,129).
        tokenizer: RoBERTa's, a folder or a name on the hub (token, local_files_only: as transformers has them).
        config: a MeterConfig, for other sizes than the published ones.

    Weights that the checkpoint does not hold are those of the head; `model.checkpoint_report` lists what became of
    every name. Raises EASError for a checkpoint that is not there, cannot be read or does not fit, naming what is
    missing, and ConfigError for settings that do not exist.
    """
    unknown = sorted(set(kwargs) - set(_ARGUMENTS[name]))
    if unknown:
        raise ConfigError(
            f"load_model({name!r}): there is no setting {unknown[0]!r}; wanted some of {', '.join(_ARGUMENTS[name])}"
        )
    task = kwargs.setdefault("task", "vqa")
    if task not in TASKS:
        raise ConfigError(f"load_model({name!r}): task: wanted one of {TASKS}, got {task!r}")
    return _tiny(**kwargs) if name == "tiny-meter" else _published(**kwargs)


def _tiny(task: str, dtype: Any = None, attn_implementation: str = "eager") -> tuple[Meter, CLIPProcessor]:
    from safetensors.torch import load_file
    from transformers import AutoProcessor

    from .tiny_meter.architecture import make_config

    missing = [file for file in ("model.safetensors", HEADS_FILE) if not (TINY / file).is_file()]
    if missing:
        raise EASError(
            f"the weights of the bundled model 'tiny-meter' ({', '.join(missing)}) are not in {TINY}: reinstall"
            " eas_kit, or make them with `python -m eas_kit.models.tiny_meter --out DIR` and move DIR/weights there"
        )
    model = _cast(Meter._from_config(make_config(task), attn_implementation=attn_implementation), dtype)
    state, heads = load_file(TINY / "model.safetensors"), load_file(TINY / HEADS_FILE)
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    state |= {f"head.{key.removeprefix(task + '.')}": v for key, v in heads.items() if key.startswith(f"{task}.")}
    if task != "nlvr2":
        state["token_type.weight"] = state["token_type.weight"][:2]
    model.load_state_dict(state)
    return _finished(model, {"task": task}), AutoProcessor.from_pretrained(TINY, local_files_only=True)


def _published(
    task: str,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
    answers: int | Sequence[str] | None = None,
    tokenizer: str | Path = "FacebookAI/roberta-base",
    config: MeterConfig | Mapping[str, Any] | None = None,
    dtype: Any = None,
    attn_implementation: str = "sdpa",
    **hub: Any,
) -> tuple[Meter, CLIPProcessor]:
    if checkpoint is None:
        raise EASError(
            "load_model('meter'): wanted checkpoint=, the path of meter_clip16_288_roberta_pretrain.ckpt, which METER's"
            " authors publish (github.com/zdou0830/METER). For a model without weights: paper_config('meter-vqa')"
        )
    given = isinstance(config, MeterConfig) or (isinstance(config, Mapping) and "vision_config" in config)
    if config is not None and not given:
        raise ConfigError(f"load_model('meter'): config: wanted a MeterConfig, got a {type(config).__name__}")
    if config is not None and image_size is not None:
        raise ConfigError("load_model('meter'): give image_size= or config=, which has one, not both")
    if isinstance(config, Mapping):  # as adapters that were saved note it
        config = MeterConfig.from_dict(dict(config))
    config = copy.deepcopy(config) if given else paper_size(task, image_size)
    config.task = task
    _set_answers(config, task, answers)
    state = read_state(checkpoint)
    processor = CLIPProcessor(_pictures(config.vision_config.image_size), _tokenizer(tokenizer, hub))
    model = _cast(Meter._from_config(config, attn_implementation=attn_implementation), dtype)
    model.checkpoint_report = report = fill(model, state)
    if report.unexpected:
        warnings.warn(
            f"load_model('meter'): {len(report.unexpected)} names of the checkpoint are unknown and left out, the"
            f" first: {', '.join(report.unexpected[:5])}; see model.checkpoint_report.unexpected",
            stacklevel=4,
        )
    options = {"task": task, "checkpoint": str(Path(checkpoint).expanduser().resolve())}
    own = {"config": config.to_dict()} if given else {"image_size": config.vision_config.image_size}
    options |= own | {"tokenizer": str(tokenizer)}
    options |= {"answers": config.num_labels} if task == "vqa" else {}
    return _finished(model, options), processor


def _set_answers(config: MeterConfig, task: str, answers: int | Sequence[str] | None) -> None:
    """The number of labels of the head, and their names where they are given."""
    if task != "vqa":
        if answers is not None:
            raise ConfigError(
                f"load_model('meter'): answers= is for task 'vqa', not for {task!r}, whose head has its own"
            )
        config.num_labels = LABELS[task]
        return
    if isinstance(answers, str) or (answers is not None and not isinstance(answers, int | Sequence)):
        raise ConfigError(f"load_model('meter'): answers: wanted a list of texts or a number, got {answers!r}")
    if isinstance(answers, Sequence):
        if len(answers) < 2 or len(set(answers)) < len(answers):
            raise ConfigError(
                f"load_model('meter'): answers: wanted two or more, each once, got {len(answers)}, of which"
                f" {len(set(answers))} differ"
            )
        config.id2label = dict(enumerate(answers))
        config.label2id = {answer: number for number, answer in enumerate(answers)}
    elif answers is not None:
        if answers < 2:
            raise ConfigError(f"load_model('meter'): answers: wanted two or more, got {answers}")
        config.num_labels = answers


def _pictures(side: int) -> CLIPImageProcessorPil:
    """CLIP's: the shorter side to `side` pixels, bicubic, the middle cut out, CLIP's mean and deviation."""
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _tokenizer(source: str | Path, hub: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **hub)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EASError(
            f"load_model('meter'): no tokenizer {str(source)!r} ({reason}); give tokenizer= a folder with RoBERTa's"
            " files or a name on the hub"
        ) from error


def _cast(model: Meter, dtype: Any) -> Meter:
    """The new model in its dtype, before weights go into it."""
    from eas_kit.meta import as_dtype

    return model.to(torch.float32 if dtype is None else as_dtype(dtype))


def _finished(model: Meter, options: dict[str, Any]) -> Meter:
    """In eval mode, with what `load` has to be given again for the same model."""
    model.eas_kit_source = {"options": options}
    return model.eval()
