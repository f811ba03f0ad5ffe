"""Models by name or folder: the bundled one, and whatever decoder transformers' auto classes load."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from eas_kit.errors import EASError
from eas_kit.hub import looks_like_path

from .shapes import METER_SIZES, PAPER_SIZES, paper_config

__all__ = [
    "BUNDLED",
    "METER_SIZES",
    "OWN",
    "PAPER_SIZES",
    "best_device",
    "load_base",
    "load_model",
    "load_processor",
    "paper_config",
]

BUNDLED = {"tiny": Path(__file__).parent / "tiny" / "weights"}
# models that are put together here: name -> module, whose load(name, **kwargs) gives (model, processor), in eval mode
OWN = {
    "lavin": "lavin",
    "tiny-lavin": "lavin",
    "meter": "meter_loading",
    "tiny-meter": "meter_loading",
}
WITH_WEIGHTS = frozenset({*BUNDLED, *(name for name in OWN if name.startswith("tiny"))})  # that come with eas_kit
# config.model_type -> module that makes it known to transformers' auto classes
OWN_TYPES = {
    "lavin": "lavin",
    "eas_meter": "meter",
}
# what is asked of the hub (or of its local cache) in the same way for the weights and for the processor
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
WANTED = "wanted a decoder model of text, or of images and text (with causal language model head)"


def load_model(name_or_folder: str | Path, device: str | None = None, **kwargs):
    """A decoder model (images and text, or text alone) and its processor, ready for inference.

    Args:
        name_or_folder: "tiny" (bundled), a local folder, a name on the Hugging Face hub, or one of `OWN`, models that
            are put together here: "lavin" from llama= and clip=, "tiny-lavin" (`eas_kit.models.lavin.load`), "meter"
            from checkpoint=, "tiny-meter" (`eas_kit.models.meter_loading.load`).
        device: "auto" (a GPU if there is one, else the CPU), "cpu", "cuda:1" ...; None: as ``from_pretrained`` puts it.
        kwargs: for ``from_pretrained`` (``dtype``, ``device_map``, ``quantization_config``, ``attn_implementation``
            ...). ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``subfolder`` and ``trust_remote_code``
            (off unless you give it) hold for the processor too.

    Returns:
        ``(model, processor)``, the model in eval mode; for a model of text alone, its tokenizer is the processor. The
        bundled model is stored in 16 bits and loaded in float32 unless ``dtype`` says otherwise; other models are
        loaded in the type that their files have. Weights other than safetensors are read with ``weights_only=True``.

    Raises:
        EASError: where nothing of that name is found, where weights or processor are missing or broken, where it is
            no decoder model or only adapters, where its processor needs a package that is not installed, where it
            would have to run code that comes with it, and where both ``device`` and ``device_map`` are given. The
            message says what to do.
    """
    return _load(name_or_folder, device, kwargs, _read_processor)


def load_base(name_or_folder: str | Path, device: str | None = None, **kwargs):
    """The model alone, as `load_model` would return it; nothing is asked about its processor."""
    return _load(name_or_folder, device, kwargs, lambda *_: None)[0]


def _load(
    name_or_folder: str | Path,
    device: str | None,
    kwargs: dict[str, Any],
    read_processor: Callable,
    choose_class: Callable | None = None,
):
    """See `load_model`. `choose_class(name, config, options)`: what loads the weights; None: `auto_class`."""
    if device is not None and "device_map" in kwargs:
        raise EASError(f"load_model: give device={device!r} or device_map={kwargs['device_map']!r}, not both")
    if not kwargs.get("weights_only", True):
        raise EASError("load_model: weights_only=False would run what a pickle says; save such weights as safetensors")
    if is_own(name_or_folder):
        model, processor = import_module(f"{__name__}.{OWN[name_or_folder]}").load(name_or_folder, **kwargs)
        return _finished(model, processor, name_or_folder, device)
    name, source = _find(name_or_folder)
    if name in BUNDLED:
        if "torch_dtype" not in kwargs:  # its old name
            kwargs.setdefault("dtype", "float32")
        kwargs.setdefault("attn_implementation", "eager")  # faster than sdpa at this size on a CPU
    # None would make transformers ask at the keyboard whether to run the code
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
    options = _resolved(source, kwargs)
    _refuse_adapters(name, source, options)
    auto = (choose_class or auto_class)(name, _read_config(name, source, options, kwargs.get("config")), options)
    if Path(source).is_dir() and "gguf_file" not in kwargs:
        _check_weights(name, Path(source) / (kwargs.get("subfolder") or ""))
    processor = read_processor(name, source, options)
    model = _read_weights(name, source, auto, kwargs | options)
    # a relative folder would be another one, or a name on the hub, after a change of directory
    name = str(Path(source).resolve()) if name not in BUNDLED and Path(source).is_dir() else name
    revision = getattr(options.get("revision"), "resolved", None)
    return _finished(model, processor, name, device, revision, kwargs.get("subfolder"))


def _finished(model: Any, processor: Any, name: str, device: str | None, revision: Any = None, subfolder: Any = None):
    """Model and processor, with what the folders that net.save_pretrained writes say of them.

    A loader of `OWN` may have noted `options` in `model.eas_kit_source`: what it has to be given again.
    """
    model.name_or_path = name
    model.eas_kit_source = getattr(model, "eas_kit_source", {}) | {
        "revision": revision,
        "subfolder": subfolder or None,
        "processor_class": None if processor is None else type(processor).__name__,
    }
    if device is not None:
        model.to(best_device() if device == "auto" else device)
    return model.eval(), processor


def is_own(name: Any) -> bool:
    """True for a name in `OWN`; a folder that is called so is meant by a Path, or by "./name"."""
    return isinstance(name, str) and name in OWN


def auto_config(source: str | Path, **options: Any) -> Any:
    """AutoConfig's, which learns of a model type of `OWN_TYPES` when it meets one."""
    from transformers import AutoConfig, PreTrainedConfig

    try:
        return AutoConfig.from_pretrained(source, **options)
    except ValueError:
        told, _ = PreTrainedConfig.get_config_dict(source, **options)
        if told.get("model_type") not in OWN_TYPES:
            raise
        import_module(f"{__name__}.{OWN_TYPES[told['model_type']]}")
        return AutoConfig.from_pretrained(source, **options)


def load_processor(name_or_folder: str | Path, **kwargs):
    """The processor alone (of a model of text: the tokenizer), as `load_model` would return it."""
    if is_own(name_or_folder):
        return import_module(f"{__name__}.{OWN[name_or_folder]}").load(name_or_folder, **kwargs)[1]
    name, source = _find(name_or_folder)
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
    options = _resolved(source, kwargs)
    with suppress(OSError, ValueError, KeyError):  # a processor may lie alone; a model of ours names its class
        auto_config(source, **options)
    return _read_processor(name, source, options)


def best_device() -> str:
    """ "cuda" or "mps" where there is one, else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _find(name_or_folder: str | Path) -> tuple[str, str]:
    """Name, and what transformers shall read: a folder, or the name on the hub."""
    name = str(name_or_folder)
    folder = BUNDLED.get(name, Path(name).expanduser())
    if folder.is_dir():
        return name, str(folder)
    if name in BUNDLED:
        raise EASError(
            f"the weights of the bundled model {name!r} are not in {folder}: reinstall eas_kit, "
            f"or make them with `python -m eas_kit.models.{name} --out DIR` and move DIR/weights there"
        )
    if folder.exists():
        raise EASError(f"load_model: {name} is a file; pass the folder it is in")
    if looks_like_path(name_or_folder):
        raise EASError(f"no model {name!r}: it is not bundled ({', '.join(BUNDLED)}), and there is no such folder")
    return name, name


def _resolved(source: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The hub's options, with one commit for all files that are read: the branch may move in between."""
    from transformers.utils.hub import resolve_revision

    options = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
    where = {key: options[key] for key in ("revision", "token", "local_files_only", "cache_dir") if key in options}
    revision = resolve_revision(source, **where)
    return options | {"revision": revision} if revision is not None else options


def _refuse_adapters(name: str, source: str, options: dict[str, Any]) -> None:
    from transformers.utils import find_adapter_config_file

    from eas_kit.config import read_json

    where = {key: value for key, value in options.items() if key != "trust_remote_code"}
    try:
        file = find_adapter_config_file(source, **where)
    except OSError:  # nothing of that name, or no right to read it: said with the reason when the config is read
        return
    if file is None:
        return
    about = read_json(file, what="load_model")
    base = about.get("base_model_name_or_path")
    if about.get("peft_type") == "EAS":
        raise EASError(
            f"{name!r} holds adapters of eas_kit: eas_kit.load({name!r}) loads them with their base model ({base});"
            " a model in the same folder needs a folder of its own"
        )
    raise EASError(
        f"{name!r} holds adapters of peft ({about.get('peft_type')} for {base}): fold them in first, with"
        f" peft.PeftModel.from_pretrained(base, {name!r}).merge_and_unload(), save_pretrained that and its processor"
        " into one new folder, and load that"
    )


def _read_config(name: str, source: str, options: dict[str, Any], given: Any):
    from huggingface_hub.errors import StrictDataclassError
    from transformers import PreTrainedConfig

    if isinstance(given, PreTrainedConfig):
        return given
    try:
        return auto_config(source, **options)
    except OSError as error:
        if Path(source).is_dir():
            raise _no_config(name, error) from error
        raise EASError(
            f"no model {name!r}: it is not bundled ({', '.join(BUNDLED)}), not a folder, and the Hugging Face hub"
            f" gave: {_said(error)}"
        ) from error
    except (ValueError, KeyError, StrictDataclassError) as error:
        told, _ = PreTrainedConfig.get_config_dict(source, **options)
        if "auto_map" in told and not options["trust_remote_code"]:
            raise _needs_code(name) from error
        if "model_type" not in told:
            raise _no_config(name, error) from error
        import transformers

        raise EASError(
            f"{name!r}: transformers {transformers.__version__} does not read its config.json (model_type"
            f" {told.get('model_type')!r}): {_said(error)}"
        ) from error


def auto_class(name: str, config: Any, options: dict[str, Any]):
    """The auto class that knows this config: of images and text first, of text alone second."""
    import transformers

    found = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise EASError(f"{name!r} is {found}, a model with an encoder and a decoder; {WANTED}")
    # models that can be either say which they are; the others have no such field
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise EASError(f"{name!r} is {found}, an encoder; {WANTED}")
    code = getattr(config, "auto_map", None) or {}
    for kind, known in (
        ("AutoModelForImageTextToText", transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        ("AutoModelForCausalLM", transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        if type(config) in known:
            return getattr(transformers, kind)
        if kind in code:
            if not options["trust_remote_code"]:
                raise _needs_code(name)
            return getattr(transformers, kind)
    raise EASError(
        f"{name!r} is {found}, which neither AutoModelForImageTextToText nor AutoModelForCausalLM of transformers"
        f" loads; {WANTED}. If it is one, load it with its own class: attach, probe and search take it as it is"
    )


def _check_weights(name: str, folder: Path) -> None:
    if not any(file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)):
        held = ", ".join(sorted(file.name for file in folder.iterdir()))
        raise EASError(
            f"{name!r} has a config but no weights: wanted *.safetensors or pytorch_model*.bin, the folder holds"
            f" {held}; copy the weights there, or save the model again with save_pretrained"
        )


def _read_processor(name: str, source: str, options: dict[str, Any]):
    from transformers import AutoProcessor, AutoTokenizer

    try:
        processor = AutoProcessor.from_pretrained(source, **options)
    except ImportError as error:
        reason = _said(error).partition(". ")[0]  # advice on installing follows, at length
        raise EASError(
            f"{name!r} has a processor that needs a package which is not installed ({reason}): pip install it from the"
            " same index as torch (eas_kit[vision]: torchvision, num2words). Or load the model alone with its class of"
            " transformers: attach takes it"
        ) from error
    except (OSError, ValueError) as error:
        reason = error
        if "Unrecognized processing class" in str(error):  # keeps to itself why the tokenizer could not be had
            try:
                AutoTokenizer.from_pretrained(source, **options)
            except Exception as cause:
                reason = cause
        if "trust_remote_code" in str(reason):
            raise _needs_code(name) from reason
        raise _no_processor(name, _said(reason)) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else ()
    if set(words) <= set(getattr(tokenizer, "all_special_tokens", ())):  # what some classes make out of no files
        raise _no_processor(name, f"{type(tokenizer).__name__} came without a vocabulary")
    return processor


def _read_weights(name: str, source: str, auto: Any, kwargs: dict[str, Any]):
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        model, report = auto.from_pretrained(source, **kwargs | {"output_loading_info": True})
    except (OSError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise EASError(f"{name!r}: its weights cannot be loaded with {auto.__name__}: {_said(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing and getattr(model, "hf_quantizer", None) is None:
        raise EASError(
            f"{name!r} lacks {len(missing)} of the weights of {type(model).__name__} (the first: {missing[0]}), which"
            " would be random: a file is missing, or it was saved without its language model head. If random weights"
            " are meant, load it with its own class of transformers"
        )
    return model


def _no_config(name: str, error: BaseException) -> EASError:
    return EASError(
        f"{name!r} has no readable config.json of a model ({_said(error)}); pass the folder that save_pretrained of a"
        " model wrote, or with subfolder= the part of it that did"
    )


def _no_processor(name: str, reason: str) -> EASError:
    return EASError(
        f"{name!r} has no processor or tokenizer that can be loaded ({reason}); save it beside the weights with"
        " processor.save_pretrained(folder). Or load the model alone with its class of transformers: attach takes it"
    )


def _needs_code(name: str) -> EASError:
    return EASError(
        f"{name!r} needs Python code that comes with it. eas_kit never runs such code by itself: read it, and if you"
        " trust it, trust_remote_code=True is yours to give"
    )


def _said(error: BaseException) -> str:
    """The beginning of what transformers said, which can go on with a list of every class that would do."""
    return " ".join(str(error).split())[:300] or type(error).__name__
