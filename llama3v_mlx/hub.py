"""Repositories of the Hugging Face Hub, downloaded into its cache: after a look at the disk, and with clear errors."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .files import existing


class HubError(OSError):
    """A repository that cannot be downloaded; the message says why, and what to do."""


def download(name: str, revision: str | None, patterns: Sequence[str], more: float = 0.0) -> Path:
    """Download what the cache lacks of a repository's files, resuming a broken download; return their folder.

    Args:
        name: owner/name.
        revision: a branch, tag or commit; by default the main branch.
        patterns: glob patterns of the files that are needed.
        more: bytes that will be written to the same disk afterwards, as a share of the size of all these files.

    Raises:
        HubError: if the disk has no room, or the Hub does not give the files.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError, HFValidationError, HTTPError
    from tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})

    options = {"repo_id": name, "revision": revision, "allow_patterns": list(patterns)}
    try:
        try:
            files = snapshot_download(**options, dry_run=True, tqdm_class=Silent)
        except DryRunError:  # the Hub does not answer; the cache may do
            return Path(snapshot_download(**options))
        missing = sum(file.file_size or 0 for file in files if file.will_download)
        cache = Path(constants.HF_HUB_CACHE)
        if missing:
            check_room(name, cache, missing, int(more * sum(file.file_size or 0 for file in files)))
        folder = Path(snapshot_download(**options | {"revision": files[0].commit_hash if files else revision}))
    except HubError:
        raise
    except (HTTPError, HFValidationError, OSError, RuntimeError) as e:
        raise HubError(f"{name}: {_reason(e, name, revision)}") from e
    if missing:
        print(
            f"note: {name} takes {missing / 1e9:.2f} GB in {cache}; when they are no longer needed: "
            f"hf cache rm model/{name}",
            file=sys.stderr,
        )
    return folder


def check_room(name: str, cache: Path, missing: int, more: int) -> None:
    """Raise HubError unless the disk of the cache has room for what is missing, and for what follows."""
    free = shutil.disk_usage(existing(cache)).free
    if free >= missing + more:
        return
    what = f"{missing / 1e9:.2f} GB are to be downloaded to {cache}"
    if more:
        what += f" and about {more / 1e9:.2f} GB written afterwards"
    raise HubError(
        f"{name}: {what}, but only {free / 1e9:.2f} GB are free there; make room, or set HF_HOME to a folder on "
        "another disk"
    )


def _reason(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return f"accept its licence at https://huggingface.co/{name}, then: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder, and no such repository on the Hub; for a private one: hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}"
    if isinstance(error, OfflineModeIsEnabled):
        return "no such folder, and not in the cache, or not whole; HF_HUB_OFFLINE forbids downloading it"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {error.response.status_code}; try again later"
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HFValidationError):
        return f"no such folder, and not the name of a repository ({line})"
    return f"the download broke off ({line}); run the same command again to continue"
