"""`push_to_hub` of a packed model: the packed checkpoint, its plan and its card.

transformers' own would put an almost empty card in the place of the checkpoint's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bitknap.disk.manifest import written_in
from bitknap.quantization.packed.model_card import CARD, tagged
from bitknap.quantization.runtime.saving import save_pretrained
from bitknap.quantization.source.hub import calling_the_hub


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    max_shard_size: int | str = "50GB",
    tags: Iterable[str] = (),
    **commit: Any,
) -> Any:
    """Upload a packed model as `save_pretrained` writes it.

    Args:
        model: loaded by `from_pretrained` from a packed checkpoint.
        repo_id: the repository on the hub, which is made if it is not there.
        private: whether a new repository is private.
        token: token for the hub; the one of `hf auth login` if None.
        max_shard_size: most bytes of tensors in a file.
        tags: tags of the model card besides Bitknap's own.
        commit: `commit_message`, `commit_description`, `revision` and `create_pr`.

    Returns:
        huggingface_hub's description of the commit.

    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, max_shard_size=max_shard_size)
        card = Path(folder) / CARD
        if card.is_file():
            card.write_text(tagged(card.read_text(encoding="utf-8"), tags), encoding="utf-8")
        return upload(Path(folder), repo_id, private=private, token=token, **commit)


def save_and_push(model: Any, save_directory: str | Path, **kwargs: Any) -> None:
    """Do what `save_pretrained` does, and upload the folder if `push_to_hub` is true.

    Args:
        model: loaded by `from_pretrained` from a packed checkpoint.
        save_directory: the folder to write to.
        kwargs: as for any transformers model; those for the hub are as in `push_to_hub`, and
            `repo_id` is the folder's name if it is not given.

    Raises:
        InputError: see `save_pretrained`; or the hub refuses, or cannot be reached.
    """
    if not kwargs.pop("push_to_hub", False):
        save_pretrained(model, save_directory, **kwargs)
        return
    names = ("private", "token", "commit_message", "commit_description", "revision", "create_pr")
    commit = {name: kwargs.pop(name) for name in names if name in kwargs}
    repo_id = kwargs.pop("repo_id", Path(save_directory).name)
    save_pretrained(model, save_directory, **kwargs)
    upload(Path(save_directory), repo_id, **commit)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **commit: Any,
) -> Any:
    """Upload the files of a folder that Bitknap wrote, and no others.

    Args:
        folder: a packed checkpoint.
        repo_id: see `push_to_hub`.
        private: see `push_to_hub`.
        token: see `push_to_hub`.
        commit: see `push_to_hub`.

    Returns:
        huggingface_hub's description of the commit.

    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    commit.setdefault("commit_message", "Upload a packed checkpoint of Bitknap")
    with calling_the_hub(f"{repo_id}: cannot be uploaded to the hub"):
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=sorted(written_in(folder)),
            **commit,
        )
