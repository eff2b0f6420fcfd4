"""What can go wrong with the hub, in words that say what to do."""

import errno
from collections.abc import Generator
from contextlib import contextmanager

from litgpt.cli.secret import Secret, hide


class HubError(ValueError):
    """What was asked for cannot be had from the hub; the message says why and what to do."""


@contextmanager
def clear_errors(repo_id: str, access_token: Secret | str | None, revision: str | None = None) -> Generator[None]:
    """Turn the hub client's errors into messages that say what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo_id}"
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(_gated(repo_id, page, access_token)) from None
    except errors.RepositoryNotFoundError as error:
        raise HubError(_not_found(repo_id, error.response.status_code, access_token)) from None
    except errors.RevisionNotFoundError:
        raise HubError(
            f"{repo_id} has no such revision (revision={revision}). Its branches, tags and commits: {page}/tree/main"
        ) from None
    except errors.HFValidationError:
        raise HubError(
            f"{repo_id!r} is not a repository id: expected org/name, as `litgpt download list` shows."
        ) from None
    except errors.OfflineModeIsEnabled:
        raise HubError(
            f"{repo_id}: HF_HUB_OFFLINE is set, and what the Hub cache has of it is damaged. Unset it to download."
        ) from None
    except errors.HfHubHTTPError as error:
        raise HubError(_refused(repo_id, page, error.response.status_code, access_token)) from None
    except (http_error_class(), ConnectionError, TimeoutError) as error:
        raise HubError(
            f"{repo_id} cannot be downloaded: no connection to {constants.ENDPOINT} ({_cause(error)})."
            f"{_meant(repo_id)} Check the network (and HF_ENDPOINT, HTTPS_PROXY); the same command goes on where this "
            "one stopped."
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HubError(
                f"The disk is full: {repo_id} does not fit. Free some space and run the same command again, or choose "
                "another place with `checkpoint_dir`."
            ) from None
        raise


def http_error_class() -> type[Exception]:
    """What all errors of a request derive from, a lost connection's too; its HTTP library depends on the client."""
    from huggingface_hub import errors

    return next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _gated(repo_id: str, page: str, access_token: Secret | str | None) -> str:
    steps = f"accept its terms on {page}, then pass a token of that account as `access_token` or in HF_TOKEN."
    if _has_token(access_token):
        return f"{repo_id} is gated, and the account of this access token has no access: {steps}"
    return f"{repo_id} is gated: {steps}"


def _has_token(access_token: Secret | str | None) -> bool:
    """Whether a token was sent: given, in the environment, or from the client's login."""
    from huggingface_hub import get_token

    return bool(access_token or get_token())


def _not_found(repo_id: str, status: int, access_token: Secret | str | None) -> str:
    private = "" if _has_token(access_token) else " If it is private, pass `access_token` or set HF_TOKEN."
    return f"There is no repository {repo_id!r} on the hub (answer {status}).{_meant(repo_id)}{private}"


def _meant(repo_id: str) -> str:
    """The known checkpoints that are called nearly so."""
    from litgpt.catalog import known_checkpoints
    from litgpt.cli.suggest import did_you_mean

    return "" if repo_id in known_checkpoints() else did_you_mean(repo_id, known_checkpoints())


def _refused(repo_id: str, page: str, status: int, access_token: Secret | str | None) -> str:
    if status in (401, 403):
        said = "does not accept this access token" if _has_token(access_token) else "wants an access token"
        return f"{repo_id}: the hub {said} (answer {status}). Pass a valid one as `access_token` or in HF_TOKEN."
    return f"{repo_id} cannot be downloaded: the hub answers {status}. Try again later, or look at {page}."


def _cause(error: BaseException) -> str:
    """The innermost reason."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return hide(str(error)) or type(error).__name__  # a header that is not valid is shown, token and all
