"""A model repository of the Hugging Face hub (or of the server that HF_ENDPOINT names) as a place to push to."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from persona_pruner.errors import StorageError, UserError
from persona_pruner.evaluation.report.card import HUB


class HubTarget:
    """`to` is hf://owner/name. Raises UserError where it is none."""

    def __init__(self, to: str, private: bool = False) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        self.url, self.repository, self._private = to, to.removeprefix(HUB).strip("/"), private
        try:
            validate_repo_id(self.repository)
        except HFValidationError:
            self.repository = ""
        if self.repository.count("/") != 1:
            raise UserError(f"--to {to}: write hf://owner/name")
        self._api = HfApi()

    def begin(self) -> None:
        """Make the repository if it is not there. Raises UserError without a token or rights."""
        with _explained(self.url):
            self._api.create_repo(self.repository, private=self._private or None, exist_ok=True)

    def files(self) -> dict[str, str | None]:
        from huggingface_hub.hf_api import RepoFile

        with _explained(self.url):
            tree = self._api.list_repo_tree(self.repository, recursive=True)
            return {one.path: one.lfs.sha256 if one.lfs else one.blob_id for one in tree if isinstance(one, RepoFile)}

    def read(self, path: str) -> bytes:
        with _explained(self.url), tempfile.TemporaryDirectory(prefix="persona-pruner-") as directory:
            return Path(self._api.hf_hub_download(self.repository, path, local_dir=directory)).read_bytes()

    def write(self, directory: Path, removed: Sequence[str]) -> None:
        with _explained(self.url):
            self._api.upload_folder(
                repo_id=self.repository, folder_path=directory, commit_message="Push persona masks",
                delete_patterns=list(removed) or None,
            )  # fmt: skip


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Faults of the hub as one line each."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(f"{url}: {_NO_TOKEN}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise _of_status(url, status, str(error)) from None
    except ValueError as error:
        raise UserError(f"{url}: {_one_line(error)}") from None
    except (HTTPError, OSError) as error:
        raise StorageError(f"{url}: the hub cannot be reached: {_one_line(error)}") from None


_NO_TOKEN = "the hub knows no token of yours, or an invalid one: `hf auth login`, or set HF_TOKEN"


def _of_status(url: str, status: int, text: str) -> UserError:
    if status == 401:
        return UserError(f"{url}: {_NO_TOKEN}")
    if status == 403:
        return UserError(
            f"{url}: your token has no right to write there (a token with the role `write`, and the owner)"
        )
    return StorageError(f"{url}: the hub answered HTTP {status}: {_one_line(text)}")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
