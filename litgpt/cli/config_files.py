"""`--config FILE_OR_URL`."""

from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import yaml

from litgpt import __version__, resources

TIMEOUT = 20  # seconds
MAX_BYTES = 10_000_000  # a recipe has a few hundred lines; a mistyped URL may lead to a weights file


def read_config(place: str) -> dict[str, Any]:
    """Read a YAML (or JSON) file of settings, from disk, from the packaged recipes or from an http(s) address.

    Raises:
        FileNotFoundError: no such file; the message names recipes that look alike.
        ValueError: it cannot be fetched, or is not a mapping of settings.
    """
    text = _fetch(place) if place.lower().startswith(("http://", "https://")) else _read(place)
    if text.lstrip().startswith("<"):
        raise ValueError(f"--config {place} is a web page, not a YAML file; give the address of the raw file.")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"--config {place} is not valid YAML{where}: {problem}.") from None
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
    request = Request(url, headers={"User-Agent": f"litgpt/{__version__}"})
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            data = response.read(MAX_BYTES + 1)
    except HTTPError as error:
        raise ValueError(f"--config {url}: the server answers {error.code} {error.reason}.") from None
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"--config {url} cannot be fetched: {reason}. Without a network, give a file: the recipes under "
            "config_hub/ come with litgpt."
        ) from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"--config {url} is larger than {MAX_BYTES // 1_000_000} MB: that is no file of settings.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--config {url} is not a text file.") from None
