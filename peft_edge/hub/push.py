"""Pushes an adapter, or a whole model, to the Hub: with its card, its record, and the backbone where nobody has it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper
from torch import nn

from peft_edge.backbones import save_backbone
from peft_edge.hub.adapter_files import BACKBONE_FILES, SOURCE_NAME, write_adapter
from peft_edge.hub.card import CARD_NAME, Subject, adapter_card, shareable
from peft_edge.hub.pretrained import load_pretrained
from peft_edge.records import Record

RECORD_NAME = "record.json"

_OUR_TYPES = ("CONV_LORA", "CONV_ADAPTER")


def push_adapter(
    model: PeftModel,
    repo_id: str,
    *,
    record: str | os.PathLike[str] | None = None,
    license: str | None = None,
    **hub: Any,
) -> str:
    """Pushes the active adapter of a model to the Hub; `load_pretrained(repo_id)` then loads it anywhere.

    A backbone that is not on the Hub itself goes along, in a subfolder. Nothing that is pushed names a path of this
    machine. All files arrive in one commit, so a push that is interrupted changes nothing.

    Args:
        model: The adapted model.
        repo_id: `"owner/name"`; the repository is made where there is none.
        record: The `record.json` of the run that made the adapter; the card is written from it.
        license: The Hub's identifier of a license, for the card; by default that of timm's pretrained weights.
        **hub: `private`, whether a new repository is; `revision`, the branch, which is made where there is none;
            `token`, by default the one of `hf auth login` or of the environment; `commit_message`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The record is damaged, or there are not as many class names as classes.
        OSError: The push failed; the message says why, and nothing was changed on the Hub.
    """
    known, subject = _read_record(record), Subject.of(model).at(repo_id, license)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        write_adapter(model, folder, adapter_card(subject, known, folder))
        if not subject.base.startswith("timm/"):
            save_backbone(_backbone_of(model), folder / SOURCE_NAME)
            _name_base(folder / CONFIG_NAME, repo_id)
        return _upload(folder, known, repo_id, **{"commit_message": "Upload adapter", **hub})


def push_update(
    update: Path, repo_id: str, *, record: str | os.PathLike[str] | None = None, license: str | None = None, **hub: Any
) -> str:
    """Pushes what a run has made: its adapter, or its model where the method trains the model's own weights.

    Args:
        update: The folder of the adapter or of the model.
        repo_id: As for `push_adapter`, as is all that follows.
        record: The run's.
        license: For the card.
        **hub: The rest.

    Returns:
        The address of the commit.

    Raises:
        ValueError: A file of the update is damaged.
        OSError: The push failed, or a file of the update is missing.
    """
    if (update / CONFIG_NAME).exists():
        return push_adapter(load_pretrained(update), repo_id, record=record, license=license, **hub)
    known = _read_record(record)
    name = json.loads((update / BACKBONE_FILES[0]).read_text(encoding="utf-8"))["architecture"]
    subject = Subject(base=name, architecture=name, peft_type=None).at(repo_id, license)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        for file in BACKBONE_FILES:
            shutil.copyfile(update / file, folder / file)
        adapter_card(subject, known, folder).save(folder / CARD_NAME)
        return _upload(folder, known, repo_id, **{"commit_message": "Upload model", **hub})


def _read_record(path: str | os.PathLike[str] | None) -> Record | None:
    return None if path is None else shareable(Record.from_json(Path(path).read_text(encoding="utf-8")))


def _backbone_of(model: PeftModel) -> nn.Module:
    """Returns a copy of what was adapted; PEFT's `unload` leaves the adapter's head in it."""
    adapted: Any = copy.deepcopy(model)
    heads = [
        (name, module.original_module)
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    ]
    backbone = adapted.unload()
    for name, head in heads:
        backbone.set_submodule(name, head)
    return backbone


def _name_base(path: Path, repo_id: str) -> None:
    """Says that the backbone is in this repository, where it was a folder of this machine."""
    config = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": repo_id}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _upload(
    folder: Path,
    record: Record | None,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    if record is not None:
        (folder / RECORD_NAME).write_text(record.to_json(), encoding="utf-8")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # The backbone of an earlier push would be taken for the one of this.
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=[f"{SOURCE_NAME}/*"],
        )
    except Exception as error:  # the client's HTTP library, and so its errors, differ by its version
        reason = next(iter(str(error).strip().splitlines()), "")
        raise OSError(
            f"{repo_id}: expected to push to {api.endpoint}, found {type(error).__name__}: {reason:.500}. Nothing was "
            "changed there, and what is on the disk here is complete: push again once that is mended"
        ) from error
    return str(commit.commit_url)


_push_of_peft = PeftModel.push_to_hub


@wraps(_push_of_peft)
def _push_to_hub(self: PeftModel, repo_id: str, **options: Any) -> Any:
    peft_type = self.peft_config[self.active_adapter].peft_type
    return (push_adapter if peft_type in _OUR_TYPES else _push_of_peft)(self, repo_id, **options)


# Transformers' method, which PEFT's models inherit, would put its own card in the place of ours, and leave out the
# backbone and the names of the classes.
PeftModel.push_to_hub = _push_to_hub
