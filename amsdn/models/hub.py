"""One file from the Hugging Face hub, quietly and without waiting for a network that is not there."""

import logging
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

TIMEOUT_S = 5.0


class HubError(Exception):
    """The hub could not supply a file; the text is the name of the underlying error."""


def fetch(repo: str, filename: str) -> Path:
    """The path of ``filename`` of repository ``repo``, from the local cache or else downloaded. Raises HubError."""
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)
    try:
        cached = try_to_load_from_cache(repo, filename)
        if isinstance(cached, str):
            return Path(cached)
        # One short probe first: the download itself retries for half a minute when there is no network.
        get_hf_file_metadata(hf_hub_url(repo, filename), timeout=TIMEOUT_S)
        return Path(hf_hub_download(repo, filename, etag_timeout=TIMEOUT_S))
    except Exception as e:  # the client raises its own errors, its transport's and the system's, without a common base
        raise HubError(type(e).__name__) from e
    finally:
        hub_log.setLevel(level)
