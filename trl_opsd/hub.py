"""Uploads to the Hub of what no trainer has made; trainers upload by themselves, as transformers does."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from .cli import UserError


def check_hub(push_to_hub: bool, hub_model_id: str | None) -> None:
    """
    Checks the two options that say where something is uploaded to.

    Args:
        push_to_hub (`bool`):
            Whether to upload.
        hub_model_id (`str`, *optional*):
            Repository.

    Raises:
        UserError: If one is given without the other.
    """
    if push_to_hub != (hub_model_id is not None):
        raise UserError(
            "`push_to_hub` and `hub_model_id` belong together: give both, with the repository as NAME or OWNER/NAME, or neither."
        )


def push(folder: str | Path, hub_model_id: str, private: bool | None = None) -> str:
    """
    Uploads a folder, all of it in one commit, to a repository that is made if it is not there.

    Args:
        folder (`str` or `Path`):
            What to upload. Checkpoints of a trainer, and its arguments, stay.
        hub_model_id (`str`):
            Repository, as `NAME` or `OWNER/NAME`.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to the owner's setting.

    Returns:
        `str`: Address of the repository.

    Raises:
        UserError: If the Hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        repo = api.create_repo(hub_model_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            commit_message=f"Upload {Path(folder).name}",
            ignore_patterns=["checkpoint-*", "training_args.bin", ".*"],
        )
    except (HTTPError, OSError, ValueError) as error:  # no connection; a refusal, no token; a name that is none
        reason = " ".join(str(error).split())
        raise UserError(f"`push_to_hub`: `{folder}` is not at `{hub_model_id}` ({reason:.300}).") from None
    return str(repo)
