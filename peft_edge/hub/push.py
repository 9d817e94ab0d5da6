"""Push an adapter or a whole model to the Hub, with a model card and the record of the run."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper

from peft_edge.backbones import save_backbone
from peft_edge.hub.adapter_files import BACKBONE_FILES, SOURCE_NAME, write_adapter
from peft_edge.hub.card import CARD_NAME, CardSubject, adapter_card, shareable
from peft_edge.hub.pretrained import load_pretrained

if TYPE_CHECKING:  # importing the package must not import pydantic
    from peft_edge.records import Record


def push_adapter(
    model: PeftModel,
    repo_id: str,
    *,
    record: str | os.PathLike[str] | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload adapter",
) -> str:
    """Push the active adapter of a model to the Hub; `load_pretrained(repo_id)` then loads it on any machine.

    The backbone is pushed to the subfolder `source_model`, unless its name starts with `timm/`. Pushed files contain no
    local paths. One commit contains all files, so an interrupted push changes no files on the Hub.

    Args:
        model: The adapted model. It is not changed.
        repo_id: `"owner/name"`; the repository is created if missing.
        record: The file `record.json` of the run that trained the adapter. It is pushed, and its results are added to
            the card.
        license: The Hub's identifier of a license, which the card names. None means the license of timm's pretrained
            weights if the run used these weights (according to `record`), and otherwise no license.
        private: Whether a repository that this function creates is private. None uses the default of the Hub.
        revision: The branch to push to; it is created if missing.
        token: A token of the Hub. By default, it is the token from `hf auth login` or from the environment variable
            `HF_TOKEN`.
        commit_message: The title of the commit.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: If the record is damaged, or the number of class names differs from the number of classes.
        OSError: If the push fails; the message says why.
    """
    run = _read_shareable(record)
    subject = CardSubject.from_model(model, source=repo_id, license=license)
    is_on_hub = subject.base.startswith("timm/")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        write_adapter(model, folder, adapter_card(subject, run, folder), base_name=None if is_on_hub else repo_id)
        if not is_on_hub:
            copied = copy.deepcopy(model)
            # PEFT's `unload` keeps the trained head, so restore the original head first.
            for name, module in list(copied.get_base_model().named_modules()):
                if isinstance(module, ModulesToSaveWrapper):
                    copied.get_base_model().set_submodule(name, module.original_module)
            save_backbone(copied.unload(), folder / SOURCE_NAME)
        return _upload(folder, run, repo_id, commit_message, private, revision, token)


def push_update(
    update: Path,
    repo_id: str,
    *,
    record: str | os.PathLike[str] | None = None,
    license: str | None = None,
    **options: Any,
) -> str:
    """Push the adapter or the whole model that a run has trained, and return the URL of the commit.

    `update` is the folder of the adapter or model. See `push_adapter` for the other arguments.

    Raises:
        ValueError: If the record or a file in `update` is damaged.
        OSError: If the push fails, or a file in `update` is missing.
    """
    if (update / CONFIG_NAME).exists():
        return push_adapter(load_pretrained(update), repo_id, record=record, license=license, **options)
    run = _read_shareable(record)
    name = json.loads((update / BACKBONE_FILES[0]).read_text(encoding="utf-8"))["architecture"]
    subject = CardSubject(base=name, architecture=name, peft_type=None, source=repo_id, license=license)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        for file in BACKBONE_FILES:
            shutil.copyfile(update / file, folder / file)
        adapter_card(subject, run, folder).save(folder / CARD_NAME)
        return _upload(folder, run, repo_id, **{"commit_message": "Upload model", **options})


def _read_shareable(path: str | os.PathLike[str] | None) -> Record | None:
    """Read the record of a run, and shorten each local path in it to its last part. If `path` is None, return None."""
    from peft_edge.records import Record

    return None if path is None else shareable(Record.from_json(Path(path).read_text(encoding="utf-8")))


def _upload(
    folder: Path,
    record: Record | None,
    repo_id: str,
    commit_message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Push all files in `folder`, and `record` if it is not None, in one commit. Return the URL of the commit.

    The repository and the branch `revision` are created if they do not exist. If the push fails, raise an OSError.
    """
    if record is not None:
        (folder / "record.json").write_text(record.to_json(), encoding="utf-8")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            # Delete the backbone of an earlier push. Otherwise, `load_pretrained` would use it for this adapter.
            delete_patterns=[f"{SOURCE_NAME}/*"],
        )
    except Exception as error:  # the class of the error depends on the HTTP library that huggingface_hub uses
        reason = next(iter(str(error).strip().splitlines()), "")
        raise OSError(
            f"{repo_id}: expected to push to {api.endpoint}, found {type(error).__name__}: {reason:.500}. No file was "
            "changed on the Hub, and the local files are complete: fix the problem and push again"
        ) from error
    return str(commit.commit_url)


_peft_push_to_hub = PeftModel.push_to_hub


@wraps(_peft_push_to_hub)
def _push_to_hub(self: PeftModel, repo_id: str, **options: Any) -> object:
    """Call `push_adapter` for the adapter types of this package, and PEFT's own method for other types."""
    is_ours = self.peft_config[self.active_adapter].peft_type in ("CONV_LORA", "CONV_ADAPTER")
    return (push_adapter if is_ours else _peft_push_to_hub)(self, repo_id, **options)


# Replace PEFT's own `push_to_hub`, which overwrites our card and pushes neither the backbone nor the class names.
PeftModel.push_to_hub = _push_to_hub
