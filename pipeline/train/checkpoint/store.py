"""The store of a run's checkpoints. A local store is a folder. A remote store is an address that
fsspec can open, such as s3://bucket/prefix.

A checkpoint is a folder with the name of its step, such as `step_00000120`. If the step is saved
again, `step_00000120.1` replaces this folder, then `step_00000120.2`. The folder with the highest
number counts, and the others are deleted.

In a local store, one rename completes a checkpoint. A remote store cannot rename a folder, so the
manifest is uploaded last and deleted first. A folder without a manifest does not count. Names in a
remote store end with the attempt, as in `step_00000120.1-ATTEMPT`, so late uploads of an abandoned
attempt do not change another checkpoint. The size of each file is checked after its upload. Its
sha256 is checked after a download.

A store outside of its run's folder has an owner, because the lock of the run's folder does not
protect the store. A driver writes `owner.json` with a new token before it changes anything. Every
change checks the token first. If two drivers of one run use a store, the later one owns it. The
earlier one ends at its next save, even if it runs on another machine. A driver of another run is
refused.

A process downloads checkpoints to a folder of its own, which is deleted when the process ends. If
the process was killed, a `CheckpointStore.sweep` after a day deletes the folder.
"""

import contextlib
import errno
import functools
import json
import re
import shutil
import socket
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.errors import UserError
from pipeline.core.files import MARKER, Unreadable, retry_read, sync_folder, write_whole
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.spec import arguments_of
from pipeline.train.checkpoint.manifest import MANIFEST, DamagedManifest, read_manifest

TRAINER, OWNER = "trainer.json", "owner.json"
WRITING = ".writing-"  # prefix of the folder in which an attempt writes a checkpoint
_DELETING, _FETCHED = ".deleting-", ".fetched-"
_DAY_S = 86400.0
_FOLDER = re.compile(r"(?P<name>step_\d+)(?:\.(?P<earlier_saves>\d+))?(?P<attempt>-.+)?")
# by staging folder: the folder to which this process downloads
_downloads: dict[Path, tempfile.TemporaryDirectory[str]] = {}


class CheckpointError(UserError):
    """A checkpoint or a store cannot be used. The message is one line."""


class CheckpointStore:
    """The checkpoints of one run. A checkpoint that is not complete does not count.

    Every method that changes the store raises CheckpointError if another driver owns the store.

    Args:
        address: the path of a local store, or the address of a remote store. Credentials come from
            the environment.
        staging: a folder that every rank sees. Checkpoints of a remote store are written to it
            before they are uploaded, and downloaded to it. A local store needs none.
        token: the token of the owner, which every change requires; "": no owner is checked.

    Raises:
        CheckpointError: fsspec cannot open the address, or `refuse_credentials` refuses it.
    """

    def __init__(
        self, address: str | Path, staging: Path | None = None, *, token: str = ""
    ) -> None:
        refuse_credentials(str(address))
        self.folder, self.url, self.token = folder_of(str(address)), str(address), token
        if self.folder is not None:
            self.folder = self.staging = self.folder.absolute()
            self.url = str(self.folder)
            return
        assert staging is not None, address
        import fsspec

        self.url, self.staging = self.url.rstrip("/"), staging
        try:
            fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:  # "Install s3fs to ..."
            raise CheckpointError(
                f"checkpoints: an address must be one that fsspec can open; got {address}: {error}"
            ) from error
        self.fs = WithOSErrors(fs)

    def names(self) -> list[str]:
        """The names of the complete checkpoints, oldest first. Their files are not verified."""
        return list(self._complete())

    def address(self, name: str) -> str:
        """The path or URI of a checkpoint or another file in the store; "": of the store itself."""
        return f"{self.url}/{self.folder_name(name)}".rstrip("/")

    def folder_name(self, name: str) -> str:
        """The name of the newest folder of a checkpoint; `name` if there is no such checkpoint."""
        folder = self._complete().get(name)
        return name if folder is None else folder[0]

    def finish(self, temp: Path, name: str) -> str:
        """Turn the folder `temp`, which has its manifest, into the checkpoint `name`. Returns the
        address of the checkpoint.

        If the process dies in this method, the store holds either the previous checkpoint of this
        name or the new one.
        """
        self.check_owner()
        previous = self._complete().get(name)
        folder = name if previous is None else f"{name}.{int(previous['earlier_saves'] or 0) + 1}"
        if self.folder is not None:
            temp.rename(self.folder / folder)
            sync_folder(self.folder)
        else:
            folder += f"-{temp.name.removeprefix(WRITING).removesuffix(f'-{name}')}"
            for file in temp.rglob("*"):
                if file.is_file() and file.name != MANIFEST:
                    self._put(file, f"{folder}/{file.relative_to(temp).as_posix()}")
            self.check_owner()
            self._put(temp / MANIFEST, f"{folder}/{MANIFEST}")
            shutil.rmtree(temp, ignore_errors=True)  # the next attempt deletes the rest
        self.check_owner()  # a driver that became the owner meanwhile may have deleted the files
        return f"{self.url}/{folder}"

    def fetch(self, name: str) -> Path:
        """The checkpoint's folder, on storage that every rank sees. The checkpoint is not verified.

        A download from a remote store stays until this process fetches again or ends.
        """
        current = self.folder_name(name)
        if self.folder is not None:
            return self.folder / current
        download = own_folder(self.staging) / name
        download.mkdir()
        with contextlib.suppress(FileNotFoundError, DamagedManifest):  # `find_damage` reports both
            manifest = self.fs.cat_file(f"{self.root}/{current}/{MANIFEST}")
            (download / MANIFEST).write_bytes(manifest)
            for file in read_manifest(manifest):
                (download / file).parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self.root}/{current}/{file}", str(download / file))
        return download

    def read(self, file: str) -> bytes:
        """The content of a file in the store, not verified. NAME/FILE is a file of a checkpoint.

        Raises:
            FileNotFoundError: there is no such file.
            Unreadable: the storage medium of a local store failed at every attempt.
            OSError: the file cannot be read for another reason.
        """
        name, slash, rest = file.partition("/")
        path = f"{self.folder_name(name)}/{rest}" if slash else file
        if self.folder is not None:
            return retry_read((self.folder / path).read_bytes)
        return self.fs.cat_file(f"{self.root}/{path}")

    def write(self, file: str, content: bytes) -> None:
        """Replace a file beside the checkpoints. Readers see either the old or the new content."""
        self.check_owner()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / file, content)
        else:
            self.fs.pipe_file(f"{self.root}/{file}", content)

    def delete(self, name: str, *, except_folder: str = "") -> None:
        """Delete all folders of a checkpoint, except the one named `except_folder`. If the process
        dies in between, no partly deleted folder counts as a checkpoint.
        """
        self.check_owner()
        for folder in self._folders():  # oldest first; else a replaced folder would count again
            if folder["name"] == name and folder[0] != except_folder:
                self._remove(folder[0])

    def set_aside(self, name: str, target: str) -> None:
        """Move a checkpoint to the path `target` in this store."""
        self.check_owner()
        current = self.folder_name(name)
        if self.folder is not None:
            (self.folder / target).parent.mkdir(exist_ok=True)
            (self.folder / current).rename(self.folder / target)
        else:
            self.fs.copy(f"{self.root}/{current}/", f"{self.root}/{target}/", recursive=True)
        self.delete(name)

    def sweep(self) -> None:
        """Delete the files of processes that have died, and folders that do not count.

        The caller must own the store and hold the run's lock (train/writer_lock.py).
        """
        self.check_owner()
        for prefix in (WRITING, _DELETING):
            for abandoned in self.staging.glob(f"{prefix}*"):
                shutil.rmtree(abandoned, ignore_errors=True)
        for marker in self.staging.glob(f"{MARKER}*"):
            marker.unlink(missing_ok=True)
        for download in self.staging.glob(f"{_FETCHED}*"):
            with contextlib.suppress(FileNotFoundError):  # its process has just ended
                if time.time() - download.stat().st_mtime > _DAY_S:
                    shutil.rmtree(download, ignore_errors=True)
        current = {folder[0] for folder in self._complete().values()}
        for folder in self._folders():
            if folder[0] not in current:
                with contextlib.suppress(OSError):
                    self._remove(folder[0])

    def check_owner(self) -> None:
        """Raises: CheckpointError if another driver owns the store, or none does. Without a token,
        nothing is checked.
        """
        owner = owner_of(self) if self.token else None
        if self.token and (owner is None or owner.token != self.token):
            raise CheckpointError(
                f"checkpoints: this driver must own {self.address('')} to write there; the owner is"
                f" {owner or 'none'}"
            )

    def _folders(self) -> list[re.Match[str]]:
        """The names of all folders of checkpoints, oldest first, as matches of `_FOLDER`. Folders
        that do not count are included.
        """
        try:
            paths = (
                step_folders(self.folder) if self.folder else self.fs.ls(self.root, detail=False)
            )
        except FileNotFoundError:
            return []
        matches = map(_FOLDER.fullmatch, (PurePosixPath(path).name for path in paths))
        return sorted(
            # Only names in a remote store end with the attempt.
            (match for match in matches if match and bool(match["attempt"]) != bool(self.folder)),
            key=lambda match: (match["name"], int(match["earlier_saves"] or 0), match[0]),
        )

    def _complete(self) -> dict[str, re.Match[str]]:
        """For each complete checkpoint, the folder that counts, by the name of the checkpoint. The
        oldest checkpoint is first.
        """
        return {
            folder["name"]: folder for folder in self._folders() if self._is_complete(folder[0])
        }

    def _is_complete(self, folder: str) -> bool:
        """Whether a folder of a checkpoint counts: in a remote store it must have a manifest.

        Raises:
            OSError: the store does not answer.
        """
        if self.folder is None:
            try:  # fsspec's `exists` (2026.9; sftp, webhdfs) returns False for a failed request
                self.fs.info(f"{self.root}/{folder}/{MANIFEST}")
            except FileNotFoundError:
                return False
        return True

    def _remove(self, folder: str) -> None:
        """Delete a folder. A partly deleted folder does not count as a checkpoint."""
        if self.folder is not None:
            renamed = self.folder / f"{_DELETING}{time.time_ns():x}-{folder}"
            (self.folder / folder).rename(renamed)
            shutil.rmtree(renamed)
            return
        if self._is_complete(folder):
            self.fs.rm_file(f"{self.root}/{folder}/{MANIFEST}")
        with contextlib.suppress(FileNotFoundError):  # the manifest was the only file
            self.fs.rm(f"{self.root}/{folder}", recursive=True)

    def _put(self, file: Path, path: str) -> None:
        self.fs.put_file(str(file), f"{self.root}/{path}")
        uploaded, size = self.fs.info(f"{self.root}/{path}")["size"], file.stat().st_size
        if uploaded != size:
            raise OSError(errno.EIO, f"{uploaded} of {size} bytes arrived", path)


def store_at(address: str, run: Path, *, token: str = "") -> CheckpointStore:
    """The store of a run's checkpoints at a path or address; "" stands for RUN/checkpoints."""
    default = RunFolder(run).checkpoints
    return CheckpointStore(address or default, default, token=token)


def refuse_credentials(address: str) -> None:
    """Refuse an address that may hold credentials, because addresses are written to run folders,
    journals and job files. The address is not opened.

    Raises:
        CheckpointError: the address holds credentials or a query, or is a chain of addresses.
    """
    if "://" in address and "::" in address:  # each address of a chain may hold credentials
        raise CheckpointError(
            "checkpoints: an address must be of one store, without fsspec's '::'; got a chain of"
            " several"
        )
    parts = urlsplit(address if "://" in address else "")
    if "@" in parts.netloc or parts.query:
        raise CheckpointError(
            "checkpoints: an address must hold no credentials, also not in a query: set credentials"
            " in environment variables"
        )


def folder_of(address: str) -> Path | None:
    """The folder of an address that is a path, or begins with file:// or local://; else None."""
    if "://" not in address:
        return Path(address)
    parts = urlsplit(address)
    return Path(parts.path) if parts.scheme in ("file", "local") else None


def absolute(address: str) -> str:
    """The address; if it is a path, the absolute path.

    Raises:
        CheckpointError: see `refuse_credentials`.
    """
    refuse_credentials(address)
    return address if "://" in address else str(Path(address).absolute())


def step_folders(folder: Path) -> list[Path]:
    """The folders of checkpoints in a local store, sorted by name, including replaced ones."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def trainer_of(store: CheckpointStore, name: str) -> dict[str, Any]:
    """The content of a checkpoint's trainer.json, whose sha256 is not checked; {} if the file is
    missing, unreadable or not JSON.

    Raises:
        OSError: trainer.json cannot be read now, and may be intact.
    """
    try:
        return json.loads(store.read(f"{name}/{TRAINER}"))
    except (FileNotFoundError, Unreadable, ValueError):
        return {}


@dataclass(frozen=True)
class Owner:
    """The run that owns a store, and the driver that trains the run."""

    run_id: str
    study: str
    run: str  # path of the run's folder
    # unique for each start of a driver; "": only a checkpoint names the owner
    token: str = ""
    host: str = ""
    since: str = ""

    def __str__(self) -> str:
        driver = f", driven on {self.host} since {self.since}" if self.token else ""
        return f"run {self.run_id[:8]} ({self.run}{driver})"


def owner_of(store: CheckpointStore) -> Owner | None:
    """The owner according to owner.json, or else to the newest intact trainer.json; None if there
    is neither.

    Raises:
        CheckpointError: owner.json is damaged.
        OSError: the store cannot be read.
    """
    try:
        content = store.read(OWNER)
    except FileNotFoundError:
        for name in reversed(store.names()):
            if trainer := trainer_of(store, name):
                return Owner(
                    *(str(trainer.get(key, "unknown")) for key in ("run_id", "study", "run"))
                )
        return None
    try:
        return Owner(**arguments_of(Owner, json.loads(content), subject=OWNER))
    except ValueError as error:
        raise CheckpointError(
            f"checkpoints: {store.address(OWNER)} must name the owner of the store; it is damaged:"
            f" {error}; delete it if no run trains there"
        ) from error


def claim(store: CheckpointStore, *, run: str, run_id: str, study: str) -> str:
    """Make a run the owner of a store that has no owner or already belongs to the run. Returns the
    token that the run's workers need to write.

    Raises:
        CheckpointError: another run owns the store, or owner.json is damaged. Nothing is changed.
        OSError: the store cannot be read or written.
    """
    owner = owner_of(store)
    if owner is not None and owner.run_id != run_id:
        raise CheckpointError(
            f"checkpoints: {store.address('')} must belong to run {run_id[:8]} ({run}); it belongs"
            f" to {owner}"
        )
    new = Owner(
        run_id,
        study,
        run,
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )
    store.write(OWNER, json.dumps(asdict(new), indent=1).encode())
    return new.token


class WithOSErrors:
    """A file system of fsspec. Turns every error except a ValueError into an OSError.

    s3fs (2026.9) raises botocore's errors for missing credentials and for a server that is down.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._fs, name)

        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except (OSError, ValueError):
                raise
            except Exception as error:
                if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                    raise PermissionError(
                        "checkpoints: the environment must hold credentials (AWS_ACCESS_KEY_ID,"
                        f" ...): {error}"
                    ) from error
                raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error

        return wrapper


def own_folder(staging: Path) -> Path:
    """An empty folder in `staging` to which this process downloads, until it calls this again."""
    if staging in _downloads:
        _downloads.pop(staging).cleanup()
    staging.mkdir(parents=True, exist_ok=True)
    _downloads[staging] = tempfile.TemporaryDirectory(
        prefix=_FETCHED, dir=staging, ignore_cleanup_errors=True
    )
    return Path(_downloads[staging].name)
