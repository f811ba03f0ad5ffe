"""Models by name or folder: the bundled one, and whatever transformers' auto classes load."""

from __future__ import annotations

from pathlib import Path

from eas_kit.errors import EASError

BUNDLED = {"tiny": Path(__file__).parent / "tiny" / "weights"}


def load_model(name_or_folder: str | Path, **kwargs):
    """A multimodal model and its processor, ready for inference.

    Args:
        name_or_folder: "tiny" (bundled), a local folder, or a name on the Hugging Face hub.
        kwargs: for ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ``attn_implementation`` ...).

    Returns:
        ``(model, processor)``, the model in eval mode. The bundled model is stored in 16 bits and loaded in
        float32 unless ``dtype`` says otherwise; other models are loaded in the type that their files have.

    Raises:
        EASError: where neither a folder nor a bundled model of that name exists and the hub does not help.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name = str(name_or_folder)
    folder = BUNDLED.get(name, Path(name))
    source = str(folder) if folder.is_dir() else name
    if name in BUNDLED:
        if not folder.is_dir():
            raise EASError(
                f"the weights of the bundled model {name!r} are not in {folder}: reinstall eas_kit, "
                f"or make them with: python -m eas_kit.models.{name} --out DIR"
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
    model.name_or_path = name
    return model.eval(), processor
