"""The store of a run's checkpoints: a folder, or an address that fsspec knows (s3://bucket/prefix).

A checkpoint is a folder with the name of its step, `step_00000120`. If the step is saved again,
`step_00000120.1` replaces it, then `.2`: the highest number counts, and the others are deleted.

In a folder, one rename completes a checkpoint. A store has no rename. There the manifest is the
last file that is put, and the first that is deleted: a folder without a manifest does not count. In
a store, names end with the attempt, as in `step_00000120.1-ATTEMPT`, so that late uploads of an
abandoned attempt reach no other checkpoint. Uploads are compared by size; sha256 is compared after
a fetch.

A store outside of its run's folder has an owner, because the lock of the run's folder does not
protect it. A driver writes `owner.json` with a token of its own before it changes anything. Every
change checks the token first. Of two drivers, the later one owns the store, and the earlier one
ends at its next save, on any machine.

What a process fetches from a store lies in a folder of its own, which is deleted when the process
ends. If a process was killed, the kernel has released the lock beside the folder, and the next
`CheckpointStore.sweep` deletes both.
"""

import atexit
import contextlib
import errno
import fcntl
import functools
import json
import re
import shutil
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from pipeline.core.errors import UserError
from pipeline.core.files import MARKER, Unreadable, retry_read, sync_folder, write_whole
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.spec import arguments_of
from pipeline.train.checkpoint.manifest import MANIFEST, DamagedManifest, read_manifest

TRAINER, OWNER = "trainer.json", "owner.json"
WRITING = ".writing-"  # prefix of the folder in which an attempt writes a checkpoint
_DELETING, _LOCK = ".deleting-", ".lock"
_FOLDER = re.compile(r"(step_\d+)(?:\.(\d+))?(-.+)?")  # name, number of earlier saves, attempt
_locks: dict[Path, IO[str]] = {}  # the locked file beside this process's folder, by staging folder


class CheckpointError(UserError):
    """A checkpoint that cannot be used, in one line."""


class CheckpointStore:
    """The checkpoints of one run. A checkpoint is complete under its name, or it is absent.

    Args:
        address: a path, or an address of fsspec. Credentials come from the environment.
        staging: a folder that every rank sees, in which checkpoints are written first and to which
            they are fetched; None: `address` is such a folder.
        token: the owner's token, which every change requires; "": no owner is checked.

    Raises:
        CheckpointError: nothing opens the address, it is a chain of several, or has a password.
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
        """The names of the checkpoints, oldest first. Their bytes are not verified (`damage`)."""
        return list(self._whole())

    def address(self, name: str) -> str:
        """The path or URI of a checkpoint or file, for people."""
        return f"{self.url}/{self.current(name)}".rstrip("/")

    def current(self, name: str) -> str:
        """The name of a checkpoint's folder; the newest one if it was saved again."""
        folder = self._whole().get(name)
        return name if folder is None else folder[0]

    def finish(self, temp: Path, name: str) -> str:
        """Make the sealed folder `temp` the checkpoint `name`. Returns its address.

        A process that dies at any point leaves the older checkpoint or the new one.
        """
        self.check_owner()
        before = self._whole().get(name)
        folder = name if before is None else f"{name}.{int(before[2] or 0) + 1}"
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
            shutil.rmtree(temp, ignore_errors=True)  # the next attempt sweeps the rest
        self.check_owner()  # a driver that took over before the last step has swept the parts
        return f"{self.url}/{folder}"

    def fetch(self, name: str) -> Path:
        """A folder with the checkpoint, intact or not, that every rank sees.

        It stays until this process fetches the next checkpoint or ends.
        """
        current = self.current(name)
        if self.folder is not None:
            return self.folder / current
        fetched = own_folder(self.staging) / name
        fetched.mkdir()
        with contextlib.suppress(FileNotFoundError, DamagedManifest):  # `damage` reports both
            manifest = self.fs.cat_file(f"{self.root}/{current}/{MANIFEST}")
            (fetched / MANIFEST).write_bytes(manifest)
            for file in read_manifest(manifest):
                (fetched / file).parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self.root}/{current}/{file}", str(fetched / file))
        return fetched

    def read(self, file: str) -> bytes:
        """A file beside the checkpoints, or NAME/FILE of a checkpoint, unverified.

        Raises:
            FileNotFoundError: there is none.
            Unreadable: its medium fails.
        """
        name, slash, rest = file.partition("/")
        path = f"{self.current(name)}/{rest}" if slash else file
        if self.folder is not None:
            return retry_read((self.folder / path).read_bytes)
        return self.fs.cat_file(f"{self.root}/{path}")

    def write(self, file: str, content: bytes) -> None:
        """Replace a file beside the checkpoints; readers see the older content or the new."""
        self.check_owner()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / file, content)
        else:
            self.fs.pipe_file(f"{self.root}/{file}", content)

    def delete(self, name: str, *, but: str = "") -> None:
        """Delete a checkpoint, except its folder `but`. A process that dies in between leaves
        nothing that looks whole.
        """
        self.check_owner()
        for folder in self._folders():  # oldest first, or a replaced folder would count again
            if folder[1] == name and folder[0] != but:
                self._remove(folder[0])

    def set_aside(self, name: str, aside: str) -> None:
        """Move a checkpoint to the path `aside` in this store."""
        self.check_owner()
        current = self.current(name)
        if self.folder is not None:
            (self.folder / aside).parent.mkdir(exist_ok=True)
            (self.folder / current).rename(self.folder / aside)
        else:
            self.fs.copy(f"{self.root}/{current}/", f"{self.root}/{aside}/", recursive=True)
        self.delete(name)

    def sweep(self) -> None:
        """Delete the files that dead writers have left.

        Only for the holder of the run's lock (train/writer_lock.py) and owner of the store.
        """
        self.check_owner()
        for prefix in (WRITING, _DELETING):
            for abandoned in self.staging.glob(f"{prefix}*"):
                shutil.rmtree(abandoned, ignore_errors=True)
        for marker in self.staging.glob(f"{MARKER}*"):
            marker.unlink(missing_ok=True)
        sweep_fetched(self.staging)
        current = {folder[0] for folder in self._whole().values()}
        for folder in self._folders():
            if folder[0] not in current:
                with contextlib.suppress(OSError):
                    self._remove(folder[0])

    def check_owner(self) -> None:
        """Raises: CheckpointError if another driver owns the store."""
        owner = owner_of(self) if self.token else None
        if self.token and (owner is None or owner.token != self.token):
            raise CheckpointError(
                f"checkpoints: the owner of {self.address('')} must be this driver; got"
                f" {owner or 'none'}: it writes nothing more there"
            )

    def _folders(self) -> list[re.Match[str]]:
        """The folders of checkpoints, complete or not, oldest first, as matches of `_FOLDER`."""
        try:
            paths = (
                step_folders(self.folder) if self.folder else self.fs.ls(self.root, detail=False)
            )
        except FileNotFoundError:
            return []
        matches = map(_FOLDER.fullmatch, (PurePosixPath(path).name for path in paths))
        return sorted(
            (each for each in matches if each and bool(each[3]) == (self.folder is None)),
            key=lambda each: (each[1], int(each[2] or 0), each[0]),
        )

    def _whole(self) -> dict[str, re.Match[str]]:
        """The current folder of each checkpoint, by the checkpoint's name, oldest first."""
        return {folder[1]: folder for folder in self._folders() if self._is_whole(folder[0])}

    def _is_whole(self, folder: str) -> bool:
        """Whether a checkpoint's folder has its manifest. fsspec's `exists` is not used: it is
        False after a failed request (2026.9; sftp, webhdfs).

        Raises:
            OSError: the store does not answer.
        """
        if self.folder is None:
            try:
                self.fs.info(f"{self.root}/{folder}/{MANIFEST}")
            except FileNotFoundError:
                return False
        return True

    def _remove(self, folder: str) -> None:
        """Delete a folder. A partly deleted checkpoint never has the checkpoint's name."""
        if self.folder is not None:
            doomed = self.folder / f"{_DELETING}{time.time_ns():x}-{folder}"
            (self.folder / folder).rename(doomed)
            shutil.rmtree(doomed)
            return
        if self._is_whole(folder):
            self.fs.rm_file(f"{self.root}/{folder}/{MANIFEST}")
        with contextlib.suppress(FileNotFoundError):  # it held nothing else
            self.fs.rm(f"{self.root}/{folder}", recursive=True)

    def _put(self, file: Path, path: str) -> None:
        self.fs.put_file(str(file), f"{self.root}/{path}")
        there, here = self.fs.info(f"{self.root}/{path}")["size"], file.stat().st_size
        if there != here:
            raise OSError(errno.EIO, f"{there} of {here} bytes arrived", path)


def store_at(address: str, run: Path, *, token: str = "") -> CheckpointStore:
    """The store of a run's checkpoints at a path or address; "" stands for RUN/checkpoints."""
    inside = RunFolder(run).checkpoints
    return CheckpointStore(address or inside, inside, token=token)


def refuse_credentials(address: str) -> None:
    """Refuse an address that has or may have a password, because it is written into run folders,
    journals and job files. Nothing is opened.

    Raises:
        CheckpointError: an address with credentials, or of several stores in a chain.
    """
    if "://" in address and "::" in address:  # each address of a chain may hold credentials
        raise CheckpointError(
            "checkpoints: an address must be of one store, without fsspec's '::'; got a chain of"
            " several"
        )
    parts = urlsplit(address if "://" in address else "")
    if "@" in parts.netloc or parts.query:
        raise CheckpointError(
            "checkpoints: an address holds no credentials, which are the environment's; got one"
            " with some"
        )


def folder_of(address: str) -> Path | None:
    """The folder of an address that is a path or begins with file://; None for any other."""
    if "://" not in address:
        return Path(address)
    parts = urlsplit(address)
    return Path(parts.path) if parts.scheme in ("file", "local") else None


def absolute(address: str) -> str:
    """The address, with a path made absolute.

    Raises:
        CheckpointError: see `refuse_credentials`.
    """
    refuse_credentials(address)
    return address if "://" in address else str(Path(address).absolute())


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def trainer_of(store: CheckpointStore, name: str) -> dict[str, Any]:
    """The content of a checkpoint's trainer.json, unverified; {} if it is missing or damaged.

    Raises:
        OSError: it cannot be read now, and may be intact.
    """
    try:
        return json.loads(store.read(f"{name}/{TRAINER}"))
    except (FileNotFoundError, Unreadable, ValueError):
        return {}


@dataclass(frozen=True)
class Owner:
    """A run, and the driver that trains it."""

    run_id: str
    study: str
    run: str  # its folder
    # of one start of a driver; "": no driver has claimed the store, a checkpoint names the owner
    token: str = ""
    host: str = ""
    since: str = ""

    def __str__(self) -> str:
        driver = f", driven on {self.host} since {self.since}" if self.token else ""
        return f"run {self.run_id[:8]} ({self.run}{driver})"


def owner_of(store: CheckpointStore) -> Owner | None:
    """The owner in owner.json, else in the newest intact trainer.json; None: there is no owner.

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
            f"checkpoints: {store.address(OWNER)} must say whose they are; it is damaged: {error};"
            " move it away if nobody trains there"
        ) from error


def claim(store: CheckpointStore, *, run: str, run_id: str, study: str) -> str:
    """Make a run the owner of a store that is free or its own. Returns the token of its workers.

    Raises:
        CheckpointError: another run owns it, or owner.json is damaged. Nothing was changed.
        OSError: the store cannot be read or written.
    """
    owner = owner_of(store)
    if owner is not None and owner.run_id != run_id:
        raise CheckpointError(
            f"checkpoints: {store.address('')} must be of run {run_id[:8]} ({run}); got those of"
            f" {owner}"
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
    """A file system of fsspec whose failures are OSErrors.

    s3fs (2026.9) raises botocore's own errors for missing credentials and for a server that is
    down.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._fs, name)

        @functools.wraps(method)
        def called(*given: Any, **more: Any) -> Any:
            try:
                return method(*given, **more)
            except (OSError, ValueError):
                raise
            except Exception as error:
                if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                    raise PermissionError(
                        "checkpoints: the environment must hold credentials (AWS_ACCESS_KEY_ID,"
                        f" ...): {error}"
                    ) from error
                raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error

        return called


def own_folder(staging: Path) -> Path:
    """An empty folder of this process in `staging`, for fetched checkpoints. It is deleted when the
    process ends.

    If a process was killed, the kernel has released its lock, and the next `sweep_fetched` deletes
    its folder.
    """
    if staging not in _locks:
        staging.mkdir(parents=True, exist_ok=True)
        handle = (staging / f".fetched-{uuid.uuid4().hex}{_LOCK}").open("w")
        fcntl.flock(handle, fcntl.LOCK_EX)
        _locks[staging] = handle
        atexit.register(_remove_fetched, Path(handle.name))
    folder = Path(_locks[staging].name).with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def sweep_fetched(staging: Path) -> None:
    """Delete the folders of processes that have ended. A folder that cannot be deleted stays."""
    for lock in staging.glob(f".fetched-*{_LOCK}"):
        # BlockingIOError: its process lives. NFS locks only files that are open for writing.
        with contextlib.suppress(OSError), lock.open("r+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_fetched(lock)


def _remove_fetched(lock: Path) -> None:
    folder = lock.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():  # else the next sweep finds it by its lock
        lock.unlink(missing_ok=True)
