"""Writing files so that nothing is lost: whole or not at all, tried before work begins, one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MoLEError

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST_NAME = 120  # bytes; file systems allow 255, and some names are put together from several
_NO_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³]) *(\..*)?", re.IGNORECASE)  # on Windows
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_LEFT_OVER = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-[^.]*\.part")
_FOREIGN_IS_DEAD = 24 * 3600.0  # seconds, of what another machine left


class NotWrittenError(MoLEError, OSError):
    """A file cannot be written: the disk is full, the place is not there or not allowed."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hands out a temporary path beside `path`; on success it takes `path`'s place in one step, on an error it goes.

    The temporary name ends like `path`, for writers that look at the suffix. Missing parent folders are made. What a
    process that was killed left beside it is cleaned away.

    Raises:
        NotWrittenError: The system does not let it be written.
    """
    target = Path(path)
    with _not_written(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target.parent)
        # A folder of its own: the file inside gets ordinary permissions, and nothing else can hold its name.
        prefix = f".{target.name[:40]}.{_HOST}-{os.getpid()}-"
        with tempfile.TemporaryDirectory(prefix=prefix, suffix=".part", dir=target.parent) as folder:
            temporary = Path(folder) / target.name
            yield temporary
            _put(temporary, target)


@contextmanager
def atomic_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Hands out a temporary folder; on success every file in it takes its place in `folder`, on an error none does.

    So do files in folders inside of it. Other files of `folder` stay.

    `folder` is made if it is missing. What a process that was killed left in it is cleaned away.

    Raises:
        NotWrittenError: The system does not let it be written.
    """
    target = Path(folder)
    with _not_written(target), saving_safetensors():
        target.mkdir(parents=True, exist_ok=True)
        _clean(target)
        prefix = f".files.{_HOST}-{os.getpid()}-"
        with tempfile.TemporaryDirectory(prefix=prefix, suffix=".part", dir=target) as temporary:
            yield Path(temporary)
            for file in sorted(file for file in Path(temporary).rglob("*") if file.is_file()):
                place = target / file.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                _put(file, place)


def _put(file: Path, target: Path) -> None:
    """Moves a finished file to its place, with the mode that new files have here: safetensors writes for the owner."""
    ordinary = file.with_name(".mode")
    ordinary.touch()
    if file.is_file():
        file.chmod(ordinary.stat().st_mode)
    ordinary.unlink()
    os.replace(file, target)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hands out a temporary folder beside `path`; on success it takes `path`'s place, on an error nothing is there.

    `path` is missing or an empty folder. What a process that was killed left beside it is cleaned away.

    Raises:
        NotWrittenError: The system does not let it be written.
    """
    target = Path(path)
    with atomic_path(target) as temporary, saving_safetensors():
        temporary.mkdir()
        yield temporary
        if target.is_dir():
            target.rmdir()  # Windows puts nothing in the place of an empty folder


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Writes `value` as indented JSON, atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text in UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes `tensors` as one safetensors file, atomically, keys sorted."""
    from safetensors.torch import save_file

    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with atomic_path(path) as temporary, saving_safetensors():
        save_file(ready, temporary, metadata=dict(metadata or {}))
    return Path(path)


@contextmanager
def saving_safetensors() -> Iterator[None]:
    """Turns what safetensors raises where the system refuses a write into the OSError that it was."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        code = next((code for code in (errno.ENOSPC, errno.EFBIG) if os.strerror(code) in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code) if code != errno.EIO else str(error)) from error


def write_last(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Writes what long work ends with; where `path` does not take it, it is kept elsewhere.

    Args:
        path: A file or a folder.
        write: Writes to the path that it is given.

    Raises:
        NotWrittenError: It could not be written to `path`. The message says where it lies instead.
    """
    write_all_last({Path(path): write})


def write_all_last(writes: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes several things that long work ends with, as `write_last`; one that fails does not hold up the others.

    Args:
        writes: By file or folder, what writes to the path that it is given.

    Raises:
        NotWrittenError: Something could not be written to its path. The message says where all such lies instead.
    """
    failed: dict[Path, Callable[[Path], object]] = {}
    first: NotWrittenError | None = None
    for target, write in writes.items():
        try:
            with _not_written(target), saving_safetensors():
                write(target)
        except NotWrittenError as error:
            failed[target], first = write, first or error
    if first is None:
        return
    kept = _keep(failed)
    others = f" So it is with {len(failed) - 1} more." if len(failed) > 1 else ""
    where = "There is no other place for it either." if kept is None else f"What was made lies in {kept}."
    raise NotWrittenError(f"{first}{others} {where}") from first


def try_file(path: str | os.PathLike[str]) -> Path:
    """Makes sure that a file can be written, before work begins whose result it takes. Nothing is left.

    Raises:
        NotWrittenError: It cannot, or it is a folder.
    """
    target = Path(path)
    with _not_written(target):
        if target.is_dir():
            raise NotWrittenError(f"{target} is a folder, and a file is to be written. Give it a name of its own.")
        _probe(target.parent, target.name)
    return target


def try_folder(path: str | os.PathLike[str]) -> Path:
    """Makes sure that files can be written into a folder, there or not, before work begins. Nothing is left.

    Raises:
        NotWrittenError: They cannot, or it is a file.
    """
    target = Path(path)
    with _not_written(target):
        if target.exists() and not target.is_dir():
            raise NotWrittenError(f"{target} is a file, and a folder is to be written. Choose another name.")
        _probe(target, "probe")
    return target


@contextmanager
def in_use(folder: str | os.PathLike[str], part: str = "") -> Iterator[None]:
    """Holds a folder for this process as long as it works there; a process that dies lets go.

    Args:
        folder: Made if it is missing, and taken away again where nothing was put into it.
        part: What of it is held: the number of this process, where several share a folder, or a file's name.

    Raises:
        MoLEError: Another process is at work in it.
        NotWrittenError: The folder cannot be written.
    """
    from filelock import FileLock, Timeout

    place = Path(folder)
    file, missing = place / f".in-use{part}", _missing(place)
    with _not_written(place):
        lock = FileLock(file, timeout=0)

        def take() -> None:
            place.mkdir(parents=True, exist_ok=True)
            lock.acquire()

        try:
            _again_if_gone(take)
        except Timeout:
            raise MoLEError(
                f"{place} is in use by another process, which works at the same. Wait until it has finished, or choose "
                "another place."
            ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not take away what is open; it is empty and means nothing
            file.unlink(missing_ok=True)
        lock.release()
        _take_away(missing)


def file_name(text: str) -> str:
    """A name for a file or folder from any text: the text itself where every system takes it and it leads nowhere.

    Otherwise without what they do not take, and with a few letters of its hash, so that no two texts share a name.
    """
    clean = _NO_NAME.sub("-", text).strip(". ")
    if clean == text != "" and len(text.encode()) <= _LONGEST_NAME and not _DEVICES.fullmatch(text):
        return text
    if _DEVICES.fullmatch(clean):
        clean = clean.replace(".", "-")
    short = clean.encode()[: _LONGEST_NAME - 10].decode(errors="ignore").strip(". ")
    return f"{short or 'name'}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"


def as_one_file(name: str) -> str:
    """What names have in common that some system takes for one file: it tells no capitals, or one kind of accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def refuse_alike(names: Iterable[str], what: str, remedy: str) -> None:
    """Raises MoLEError where two of `names`, which folders are named after, are one to some system."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.get(as_one_file(name))
        if other is not None:
            alike = f"{name!r} twice" if other == name else f"{other!r} and {name!r}, one folder to some systems"
            raise MoLEError(f"{what} has {alike}. {remedy}")
        seen[as_one_file(name)] = name


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _not_written(target: Path) -> Iterator[None]:
    try:
        named = b"\0" not in os.fsencode(target)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise NotWrittenError(f"{str(target)!r} cannot be written: no file has such a name. Choose another.")
    try:
        yield
    except NotWrittenError:
        raise
    except OSError as error:
        why, remedy = error.strerror or str(error), "Choose a place that can be written."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free some space, and start again."
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            why = "a part of its path is a file"
        raise NotWrittenError(f"{target} cannot be written: {why}. {remedy}") from error


def _probe(folder: Path, name: str) -> None:
    """Writes a little into a folder, and takes it and the folders made for it away again."""
    missing = _missing(folder)
    try:
        _again_if_gone(lambda: _write_a_little(folder, name))
    finally:
        _take_away(missing)


def _missing(folder: Path) -> list[Path]:
    """The folder and those around it that are not there, the innermost first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def _take_away(folders: Iterable[Path]) -> None:
    """Takes folders away that were made here, as far as they are empty."""
    for made in folders:
        with contextlib.suppress(OSError):  # somebody else may use it by now
            made.rmdir()


def _write_a_little(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".probe.{_HOST}-{os.getpid()}-", suffix=".part", dir=folder) as place:
        (Path(place) / name).write_bytes(b"\0" * 4096)


def _again_if_gone(attempt: Callable[[], object]) -> None:
    """Several processes of one launch try a folder at the same time, and each takes away what it made."""
    for _ in range(20):
        try:
            attempt()
            return
        except FileNotFoundError:
            time.sleep(0.001)
    attempt()


def _keep(writes: Mapping[Path, Callable[[Path], object]]) -> Path | None:
    """Where all of it could be written instead: one thing's own path, or a folder of several."""
    for place in (tempfile.gettempdir, Path.home):
        folder: Path | None = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="mole-kept-", dir=place()))
            for number, (target, write) in enumerate(writes.items()):
                kept = folder / target.name
                kept = folder / f"{number}-{target.name}" if kept.exists() else kept
                with saving_safetensors():
                    write(kept)
        except (OSError, RuntimeError):  # RuntimeError: nobody knows where home is
            if folder is not None:  # half of it is of no use, and may be what fills the disk
                shutil.rmtree(folder, ignore_errors=True)
            continue
        return kept if len(writes) == 1 else folder
    return None


def _clean(folder: Path) -> None:
    """Takes away what processes that were killed while they wrote have left in a folder."""
    with os.scandir(folder) as entries:
        left = [(entry, found) for entry in entries if (found := _LEFT_OVER.fullmatch(entry.name))]
    for entry, found in left:
        try:
            made = entry.stat(follow_symlinks=False).st_mtime
        except FileNotFoundError:
            continue
        here = found[1] == _HOST
        if (here and not _alive(int(found[2]), made)) or (not here and time.time() - made > _FOREIGN_IS_DEAD):
            shutil.rmtree(entry.path, ignore_errors=True)


def _alive(process: int, made: float) -> bool:
    """Whether the process that made a folder at this time still runs, and not another one under its number."""
    try:
        import psutil
    except ModuleNotFoundError:  # training brings it, and cleans away what is left
        return True
    try:
        return bool(psutil.Process(process).create_time() <= made + 1)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
