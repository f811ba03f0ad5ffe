"""Models by name or folder: the bundled one, and whatever transformers' auto classes load."""

from __future__ import annotations

from pathlib import Path

from eas_kit.errors import EASError

BUNDLED = {"tiny": Path(__file__).parent / "tiny" / "weights"}


def load_model(name_or_folder: str | Path, device: str | None = None, **kwargs):
    """A multimodal model and its processor, ready for inference.

    Args:
        name_or_folder: "tiny" (bundled), a local folder, or a name on the Hugging Face hub.
        device: "auto" (a GPU if there is one, else the CPU), "cpu", "cuda:1" ...; None: as ``from_pretrained`` puts it.
        kwargs: for ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ``attn_implementation`` ...).

    Returns:
        ``(model, processor)``, the model in eval mode. The bundled model is stored in 16 bits and loaded in
        float32 unless ``dtype`` says otherwise; other models are loaded in the type that their files have.

    Raises:
        EASError: where neither a folder nor a bundled model of that name exists and the hub does not help, where it
            is no model of images and text, or where both ``device`` and ``device_map`` are given.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if device is not None and "device_map" in kwargs:
        raise EASError(f"load_model: give device={device!r} or device_map={kwargs['device_map']!r}, not both")
    name = str(name_or_folder)
    folder = BUNDLED.get(name, Path(name))
    source = str(folder) if folder.is_dir() else name
    if name in BUNDLED:
        if not folder.is_dir():
            raise EASError(
                f"the weights of the bundled model {name!r} are not in {folder}: reinstall eas_kit, "
                f"or make them with `python -m eas_kit.models.{name} --out DIR` and move DIR/weights there"
            )
        kwargs.setdefault("dtype", "float32")
        kwargs.setdefault("attn_implementation", "eager")  # faster than sdpa at this size on a CPU
    shared = {
        k: kwargs[k] for k in ("revision", "token", "cache_dir", "trust_remote_code", "local_files_only") if k in kwargs
    }
    try:
        processor = AutoProcessor.from_pretrained(source, **shared)
        model = AutoModelForImageTextToText.from_pretrained(source, **kwargs)
    except OSError as error:
        raise EASError(
            f"no model {name!r}: it is not bundled ({', '.join(BUNDLED)}), not a folder with a model and its "
            f"processor, and the Hugging Face hub gave: {error}"
        ) from error
    except ValueError as error:  # with a list of every class that would do
        said = str(error).splitlines()[0][:300]
        raise EASError(
            f"{name!r} is not a model that reads images and text, or its processor is missing: {said} ... "
            "Load such a model with its own class of transformers; attach, probe and search take it as it is"
        ) from error
    model.name_or_path = name
    if device is not None:
        model.to(best_device() if device == "auto" else device)
    return model.eval(), processor


def best_device() -> str:
    """ "cuda" or "mps" where there is one, else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
