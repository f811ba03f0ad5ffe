"""The Hugging Face hub: adapters fetched from it and pushed to it, and the model card that goes with them."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import ConfigError, MergeError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .model import EASModel

CARD_FILE = "README.md"
MARK = "<!-- written by eas_kit, {digest}: replaced when saved again, unless it was edited -->"


def looks_like_path(name: str | Path) -> bool:
    """True for what cannot be a name on the hub, `name` or `user/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if isinstance(name, Path) or name.startswith(("~", ".", os.sep)):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def fetch(source: str | Path, files: Iterable[str], **options: Any) -> Path:
    """The folder `source`; or, for `user/name` on the hub, the folder in the local cache with its `files`.

    `options`: revision, token, cache_dir, local_files_only. Raises ConfigError if the hub and the cache have neither.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(files), **options))
    except (OSError, ValueError) as error:  # every error of huggingface_hub about repositories is one of these
        said = " ".join(str(error).split())[:400]
        raise ConfigError(
            f"load: there is no folder {source}, and the Hugging Face hub has no such adapters: {said}"
        ) from error


def push(
    net: EASModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> CommitInfo:
    """See `EASModel.push_to_hub`."""
    from huggingface_hub import HfApi

    from .saving import base_name, save_adapters

    name = base_name(net.base)
    if name is None or Path(name).is_absolute():
        warnings.warn(
            f"push_to_hub: the base model was not loaded from the hub ({name}), so that nobody else can load it by its"
            ' name; set net.base.name_or_path = "user/name" first if it is there',
            stacklevel=3,
        )
    api = HfApi(token=token, library_name="eas_kit", library_version=__version__)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapters"
        save_adapters(net, folder, repo_id=repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not _may_replace(_remote_card(api, repo_id, revision, scratch)):
            (folder / CARD_FILE).unlink()
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Adapters of eas_kit",
        )


def _remote_card(api: Any, repo_id: str, revision: str | None, scratch: str) -> str | None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = api.hf_hub_download(repo_id, CARD_FILE, revision=revision, cache_dir=Path(scratch) / "cache")
    except LocalEntryNotFoundError:  # the hub did not answer, so that nobody knows
        raise
    except EntryNotFoundError:
        return None
    return Path(file).read_text(encoding="utf-8")


def make_card(net: EASModel, about: dict[str, Any], repo_id: str | None = None) -> str:
    """The model card, README.md: base model, mask, ranks and how to load, for people and for the hub's search."""
    from huggingface_hub import ModelCardData

    from .merging import check_attentions_only
    from .models import BUNDLED

    try:
        check_attentions_only(net)
        call = "**inputs, merge=True)  # one prompt, or a left-padded batch"
    except MergeError:
        call = "**inputs)  # one prompt, or a left-padded batch"
    name, config = about["base_model_name_or_path"], net.config
    on_hub = bool(name) and name not in BUNDLED and not Path(name).is_absolute()
    data = ModelCardData(
        base_model=name if on_hub else None, library_name="eas_kit", tags=["eas_kit", "arxiv:2403.15226"]
    )
    if on_hub:
        base = f"[{name}](https://huggingface.co/{name}) at revision {about['revision'] or 'not recorded'}"
    else:
        base = f"`{name}`, which comes with eas_kit" if name in BUNDLED else "not on the hub"
    known = on_hub or name in BUNDLED
    processor = f'"{name}"' if known else "folder_of_the_base_model"
    what = repo_id or "path/to/this/folder"
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# Adapters for {name if known else about['base_model_class']}",
        "",
        "Adapters of *Effective Attention Skipping* ([arXiv 2403.15226](https://arxiv.org/abs/2403.15226)), made with"
        f" eas_kit {__version__}. They are of use only with the base model they were trained on.",
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | {base} |",
        f"| its class | {about['base_model_class']} |",
        f"| processor | {about['processor_class'] or 'that of the base model'} |",
        f"| sites | {net.num_sites}: {', '.join(config.kinds)} |",
        f"| skipped (zero-based) | {', '.join(map(str, net.mask)) or 'none'} |",
        f"| rank at skipped, kept sites | {config.skip_rank}, {config.adapt_rank} |",
        "",
        "```python",
        "import eas_kit as eas",
        "from eas_kit.models import load_processor",
        "",
        f'net = eas.load("{what}"{"" if known else ", base=model"})',
        f"processor = load_processor({processor})",
        f"net.generate({call}",
        "```",
        "",
    ]
    text = "\n".join(lines)
    return text + MARK.format(digest=_digest(text)) + "\n"


def may_replace(file: Path) -> bool:
    """True if there is no card yet, or one that eas_kit wrote and nobody edited."""
    return _may_replace(file.read_text(encoding="utf-8", errors="replace") if file.exists() else None)


def _may_replace(text: str | None) -> bool:
    if text is None:
        return True
    found = re.fullmatch(r"(.*\n)" + re.escape(MARK).replace(r"\{digest\}", "([0-9a-f]+)") + r"\n", text, re.DOTALL)
    return found is not None and _digest(found[1]) == found[2]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
