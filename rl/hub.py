"""An exported model to the Hugging Face hub: checked first, listed first, private unless said otherwise.

memento push models/mine --to my-organisation/mine --dry-run
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memento.errors import UserError
from memento.preflight import HUB_ID
from memento.rl.export import CARD, check_model_folder

IGNORED = (".git", ".cache", "__pycache__")


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What a push sends: names and sizes in bytes, in order of their names."""

    repository: str
    files: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def plan_push(folder: str | Path, repository: str) -> PushPlan:
    """Check a model folder and list what would be sent. Asks the hub for nothing.

    Raises:
        UserError: `repository` is no ``organisation/name``; the folder is no whole model (`check_model_folder`), or has
            no model card.
    """
    folder = Path(folder)
    if not HUB_ID.fullmatch(repository):
        raise UserError(f"--to: {repository!r} is no hub repository (organisation/name).")
    if not (folder / "config.json").is_file():
        hint = f" Did you mean {folder / 'hf'}?" if (folder / "hf" / "config.json").is_file() else ""
        raise UserError(f"{folder} is no model folder; `memento export` makes one of a run.{hint}")
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} has no model card ({CARD}); `memento export` writes one.")
    check_model_folder(folder)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not set(f.relative_to(folder).parts) & set(IGNORED))
    return PushPlan(repository, tuple((str(f.relative_to(folder)), f.stat().st_size) for f in files))


def push(
    folder: str | Path,
    repository: str,
    *,
    public: bool = False,
    update: bool = False,
    endpoint: str | None = None,
) -> str:
    """Send a model folder to the hub, as one commit.

    Args:
        folder: of an exported model.
        repository: ``organisation/name``; made if it is not there.
        public: whether a new repository can be seen by everybody.
        update: also send to a repository that holds files already (the hub keeps what they were).
        endpoint: the hub's address; None takes the library's own.

    Returns:
        The address of the commit.

    Raises:
        UserError: as `plan_push`; no token, no right, no network, or a repository that is not empty. Nothing is sent.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError  # pyright: ignore[reportPrivateImportUsage]

    plan_push(folder, repository)
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        there = [name for name in api.list_repo_files(repository) if name != ".gitattributes"]
        if there and not update:
            raise UserError(
                f"{repository} holds {len(there)} files already ({', '.join(there[:3])} ...). Choose another name, or "
                "add --update: the hub keeps the earlier version."
            )
        commit = api.upload_folder(
            folder_path=Path(folder),
            repo_id=repository,
            commit_message="Model and card, by memento-rl",
            ignore_patterns=[f"{name}/*" for name in IGNORED],
        )
    except LocalTokenNotFoundError as error:
        raise UserError("there is no token for the hub: `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        hints = {401: "`hf auth login`, or set HF_TOKEN", 403: "the token has no right to write there"}
        raise UserError(f"the hub refuses: {_first_line(error)} ({hints.get(status, 'see the message')}).") from error
    except (HTTPError, OSError) as error:  # of the HTTP library, whichever it is
        raise UserError(
            f"the hub cannot be reached: {_first_line(error)}. `memento push ... --dry-run` needs no network."
        ) from error
    return str(commit.commit_url)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
