"""Fetch a checkpoint from the Hugging Face hub into its local cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retrofit.runtime.errors import NotFoundError, RetrofitError

CONFIGS = ("model_index.json", "*config.json", "retrofit.json")
TEXTS = ("*.json", "*.txt", "*.model")
WEIGHTS = "*.safetensors"
VARIANTS = ("*.*.safetensors", "*.index.*.json")  # half-precision copies beside the weights


def fetch(
    repo: str, patterns: Sequence[str], *, revision: str | None = None, ignore: Sequence[str] = ()
) -> Path:
    """Bring files of a repository into the cache.

    Args:
        repo: `owner/name`.
        patterns: Globs over the repository's paths, `*` crossing folders.
        revision: Branch, tag or commit; None is the default branch.
        ignore: Globs to leave out.

    Returns:
        The repository's folder in the cache.

    Raises:
        NotFoundError: If there is no such repository or revision, or no access to it.
        RetrofitError: If the hub can't be reached or answers with an error.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignore)
        )
    except hub.GatedRepoError as error:
        raise NotFoundError(
            f"{repo}: access to it must be granted first. Ask for it on "
            f"https://huggingface.co/{repo} and run `hf auth login`."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise NotFoundError(
            f"{repo}: has no revision {revision!r}. Look at its branches and tags on the hub."
        ) from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise NotFoundError(
            f"{repo}: neither a folder here nor a repository on the hub. Check the spelling; for a "
            "private one run `hf auth login`."
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError) as error:
        raise RetrofitError(
            f"{repo}: not in the local cache, and the hub can't be reached. Connect (or unset "
            "HF_HUB_OFFLINE), or give a local folder."
        ) from error
    except hub.HfHubHTTPError as error:
        raise RetrofitError(f"{repo}: the hub answered {error}. Try again later.") from error
    return Path(found)
