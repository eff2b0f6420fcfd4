"""`--config FILE_OR_URL`."""

import sys
import threading
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import yaml

from litgpt import __version__
from litgpt.cli import resources
from litgpt.cli.untrusted import ExcessError, load_yaml

TIMEOUT = 20  # seconds that a server may be silent
TOTAL_TIMEOUT = 30  # seconds in all, however busy it seems
PATIENCE = 2  # seconds until it is said what is waited for
MAX_BYTES = 256_000  # a recipe has a few hundred lines; a mistyped URL may lead to a weights file


def is_address(place: str) -> bool:
    """Whether what is given as `--config` is the address of a file on the web."""
    return place.lower().startswith(("http://", "https://"))


def read_config(place: str) -> dict[str, Any]:
    """Read a YAML (or JSON) file of settings, from disk, from the packaged recipes or from an http(s) address.

    Raises:
        FileNotFoundError: no such file; the message names recipes that look alike.
        ValueError: it cannot be fetched, or is not a mapping of settings.
    """
    text = _fetch(place) if is_address(place) else _read(place)
    if text.lstrip().startswith("<"):
        raise ValueError(f"--config {place} is a web page, not a YAML file; give the address of the raw file.")
    try:
        settings = load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"--config {place} is not valid YAML{where}: {problem}.") from None
    except ExcessError:
        raise ValueError(f"--config {place} is nested or repeated too much for a file of settings.") from None
    except (ValueError, TypeError) as error:  # of a date, a number, a key
        raise ValueError(f"--config {place} is not valid YAML: {error}.") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"--config {place} does not hold settings as `name: value`.")
    return settings


def _read(place: str) -> str:
    path = resources.find(place)
    if path.is_dir():
        raise ValueError(f"--config {place} is a directory; give a YAML file.")
    return path.read_text(encoding="utf-8")


def _fetch(url: str) -> str:
    """The text at an address, in a bounded time: a server that sends a byte a second is not silent."""
    outcome: list[str | Exception] = []

    def fetch() -> None:
        try:
            outcome.append(_fetched(url))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=fetch, name="litgpt-config", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        print(f"Waiting for --config {url}", file=sys.stderr, flush=True)
        thread.join(TOTAL_TIMEOUT - PATIENCE)
    if not outcome:
        raise ValueError(
            f"--config {url} has not arrived after {TOTAL_TIMEOUT} seconds. Download it yourself and give the file."
        )
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _fetched(url: str) -> str:
    request = Request(url, headers={"User-Agent": f"litgpt/{__version__}"})
    try:
        with build_opener(_Redirects).open(request, timeout=TIMEOUT) as response:
            data = response.read(MAX_BYTES + 1)
    except HTTPError as error:
        raise ValueError(f"--config {url}: the server answers {error.code} {error.reason}.") from None
    except (URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"--config {url} cannot be fetched: {reason}. Without a network, give a file: the recipes under "
            "config_hub/ come with litgpt."
        ) from None
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"--config {url} is larger than {MAX_BYTES // 1000} KB: that is too large for a file of settings."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--config {url} is not a text file.") from None


class _Redirects(HTTPRedirectHandler):
    """Follows an address on the web to another, https to https only, and to nothing else (urllib takes ftp, too)."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after not in ("http", "https") or (before == "https" and after == "http"):
            raise URLError(f"the server leads on to {newurl:.200}, which is not followed")
        fp.close()  # before its body, of any size, is read
        return super().redirect_request(req, fp, code, msg, headers, newurl)
