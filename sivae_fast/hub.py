"""Models on the Hugging Face Hub; the one file that knows `huggingface_hub`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

PREFIX = "hub:"
MODEL, CONFIG, CARD, PICTURE = "model.safetensors", "config.json", "README.md", "samples.png"
FILES = (MODEL, CONFIG, CARD, PICTURE)


def pull(repo_id: str, dest: str | os.PathLike | None = None, *, token=None) -> Path:
    """The folder with the model `repo_id`, "owner/name" or "owner/name@revision", which `load` takes.

    dest: where it goes; None: the cache of huggingface_hub. Only the four files of a model are fetched.
    Raises ValueError for a name of another form, ImportError without huggingface_hub, FileNotFoundError for a
    repository that holds no model of this project, OSError for what the Hub answers.
    """
    repo_id, _, revision = repo_id.partition("@")
    _check(repo_id)
    options = {"revision": revision or None, "local_dir": dest, "token": token}
    download = _library().snapshot_download
    with _failing(f"{repo_id} was not fetched"):
        folder = Path(download(repo_id, allow_patterns=list(FILES), **options))
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(f"{repo_id} holds no {MODEL}: it is no model of this project")
    return folder


def upload(folder: str | os.PathLike, repo_id: str, *, private: bool = False, token=None) -> str:
    """Uploads the files of a model as one commit, into a repository that is made if need be; its address.

    private: of a repository that is made. Raises as `pull` does.
    """
    _check(repo_id)
    api = _library().HfApi(token=token)
    options = {"allow_patterns": list(FILES), "commit_message": "Upload a model of sivae-fast"}
    with _failing(f"{repo_id} was not uploaded"):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
    return str(address)


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Errors, of the Hub or of whatever HTTP library is below, as OSError in one line."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "LocalEntryNotFoundError":  # a long text about caches
            raise OSError(f"{what}: the Hugging Face Hub cannot be reached") from error
        raise OSError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _check(repo_id: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
        raise ValueError(f"repo_id is {repo_id!r}, must be owner/name")


def _library():
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"the Hub needs a package that is missing ({error}): pip install huggingface_hub"
        ) from error
    return huggingface_hub
