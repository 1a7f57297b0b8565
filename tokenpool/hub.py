"""Share models on the Hugging Face Hub: a repository with the file of `tokenpool.save` and its model card."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn

from tokenpool import checkpoint
from tokenpool.version import __version__


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    run: str | Path | None = None,
    command: str = "",
    metadata: Mapping[str, Any] | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload a model with its model card to the Hub. The repository is created if needed.

    Args:
        model: result of `tokenpool.create_model` or `timm.create_model`.
        repo_id: repository, such as "user/name".
        run: see `tokenpool.save`.
        command: see `tokenpool.save`.
        metadata: see `tokenpool.save`.
        private: whether a new repository is private.
        token: access token. Default: the token of `hf auth login`, or $HF_TOKEN.

    Returns:
        The URL of the repository.

    Raises:
        TypeError, ValueError, FileNotFoundError: see `tokenpool.save`. Nothing is uploaded then.
        OSError: if the Hub cannot be reached, or refuses. The message names the repository.
    """
    try:
        validate_repo_id(repo_id)  # first, because the name becomes that of a folder
    except HFValidationError as error:
        raise ValueError(f'cannot push to {repo_id!r}: expected "user/name" ({_first_line(error)})') from error
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.rpartition("/")[2]
        load = f"tokenpool.from_hub({repo_id!r})"
        checkpoint.save_folder(model, folder, load, run=run, command=command, metadata=metadata)
        api = HfApi(token=token, library_name="tokenpool", library_version=__version__)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"tokenpool {__version__}")
        except LocalTokenNotFoundError as error:
            raise PermissionError(f"cannot push to {repo_id}: no access token; run `hf auth login` first") from error
        except (OSError, HTTPError) as error:
            raise OSError(
                f"cannot push to {repo_id}: {_first_line(error)}; save the model by tokenpool.save(model, folder), and "
                f"upload it by `hf upload {repo_id} folder`"
            ) from error
    return str(url)


def from_hub(
    repo_id: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> nn.Module:
    """Load a model from the Hub, from its local cache, or from a local folder. No pickle is read.

    The cache is that of huggingface_hub ($HF_HOME). With HF_HUB_OFFLINE=1, only the cache is read.

    Args:
        repo_id: repository, such as "user/name"; or a folder of `tokenpool.save`.
        revision: branch, tag or commit. Default: the main branch.
        token: access token for private repositories. Default: the token of `hf auth login`, or $HF_TOKEN.
        cache_dir: folder of the cache. Default: that of huggingface_hub.

    Returns:
        The model, patched or plain as it was saved, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such repository, revision or file.
        ConnectionError: if the Hub cannot be reached, and the cache does not have the model.
        ValueError: if `repo_id` is not the name of a repository, or `tokenpool.save` did not write the model.
    """
    if Path(repo_id).is_dir():
        if revision is not None:
            raise ValueError(f"{repo_id} is a folder, which has no revisions: leave out revision={revision!r}")
        return checkpoint.load(repo_id)
    at = f"{repo_id}" if revision is None else f"{repo_id} at revision {revision}"
    try:
        path = hf_hub_download(
            str(repo_id),
            checkpoint.MODEL_FILE,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            library_name="tokenpool",
            library_version=__version__,
        )
    except HFValidationError as error:
        raise ValueError(f'{repo_id} is no local folder and no repository: expected "user/name"') from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{at} is not in the cache, and the Hub cannot be reached: connect to the network without "
            "HF_HUB_OFFLINE, or give a local folder"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"the Hub has no {at}: check the name; a private repository needs `hf auth login` or token"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{at} has no {checkpoint.MODEL_FILE}: tokenpool.push_to_hub did not write it; take its own library, and "
            "tokenpool.patch"
        ) from error
    except HfHubHTTPError as error:
        raise ConnectionError(f"cannot read {at}: {_first_line(error)}") from error
    return checkpoint.load(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
