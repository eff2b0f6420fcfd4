"""One file from a web address: whole or not at all, fetched once."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tqdm import tqdm

from litgpt.checkpoint import atomic_file
from litgpt.hub import HubError
from litgpt.hub.hub_error import http_error_class
from litgpt.hub.transfer import Patience


def fetch_url(url: str, path: Path) -> Path:
    """Downloads `url` to `path`, unless that is there.

    Raises:
        HubError: No connection, no such file, or not all of it arrives.
    """
    if path.is_file():
        return path
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"file_url={url}: an address that begins with https:// is expected.")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"HF_HUB_OFFLINE is set, and {url} is not there as '{path}'. Fetch it where there is a network.")
    patience = Patience(connected=False, pause=threading.Event().wait)
    print(f"Downloading {url} to '{path}'", file=sys.stderr)
    while True:
        try:
            with atomic_file(path) as temporary:
                _download(url, temporary, patience)
            return path
        except http_error_class() as error:
            try:
                patience.bear(error)
            except http_error_class():
                raise HubError(_explained(url, error)) from None


def _download(url: str, path: Path, patience: Patience) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    headers = {"Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # The client raises where fewer bytes arrive than were announced.
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response, open(path, "wb") as file:
        patience.connected = True
        hf_raise_for_status(response)
        announced = int(response.headers.get("Content-Length", 0)) or None
        bar = tqdm(total=announced, desc=path.name, unit="B", unit_scale=True, delay=2, disable=None)
        with bar:
            for chunk in response.iter_bytes():
                file.write(chunk)
                bar.update(len(chunk))


def _explained(url: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"{url} cannot be downloaded: the server answers {status}. Check the address, or try again later."
    return (
        f"{url} cannot be downloaded: no connection ({error}). Check the network (and HTTPS_PROXY), or put the file "
        "there yourself."
    )
