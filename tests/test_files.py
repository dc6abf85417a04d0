"""Files are written whole or not at all, tried before work begins, kept where they can be, by one process at a time."""

from __future__ import annotations

import errno
import ntpath
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import (
    NotWrittenError,
    atomic_files,
    atomic_folder,
    atomic_path,
    file_name,
    in_use,
    refuse_alike,
    try_file,
    try_folder,
    write_all_last,
    write_json,
    write_last,
    write_safetensors,
)
from mole_diffusion.lora import LoRAFactors, save_lora
from mole_diffusion.sheets import picture_sheet


def forked(job: Any) -> int:
    """The exit code of `job` in a process of its own, negative for a signal."""
    child = os.fork()
    if not child:
        try:
            job()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_where_results_go_is_tried_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert try_file(tmp_path / "new" / "deep" / "a.png") == tmp_path / "new" / "deep" / "a.png"
    try_folder(tmp_path / "other")
    for attempt, message in (
        (lambda: try_file(tmp_path / "file" / "a.png"), r"a\.png cannot be written: a part of its path is a file"),
        (lambda: try_file(tmp_path), "is a folder, and a file is to be written"),
        (lambda: try_folder(tmp_path / "file"), "is a file, and a folder is to be written"),
        (lambda: try_file(tmp_path / ("x" * 300)), "cannot be written: File name too long"),
        (lambda: try_file("a\0b"), r"'a\\x00b' cannot be written: no file has such a name"),
        (lambda: try_folder("\ud800"), "no file has such a name"),
        (lambda: try_folder("/proc/mole"), "/proc/mole cannot be written: No such file or directory. Choose a place"),
    ):
        with pytest.raises(NotWrittenError, match=message):
            attempt()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_written_in_the_end_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(NotWrittenError, match=r"/proc/out\.json cannot be written: .*What was made lies in ") as caught:
        write_last("/proc/out.json", lambda path: write_json(path, [1]))
    kept = Path(str(caught.value).split("lies in ")[1].rstrip("."))
    assert kept.read_text() == "[\n  1\n]\n"
    assert kept.name == "out.json"


def test_one_that_cannot_be_written_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def write(path: Path) -> None:
        write_json(path, path.name)

    places = [Path("/proc/a.json"), tmp_path / "b.json", Path("/proc/c.json"), Path("/proc/mole/c.json")]
    with pytest.raises(NotWrittenError, match=r"/proc/a\.json cannot be written: .* So it is with 2 more\.") as caught:
        write_all_last(dict.fromkeys(places, write))
    kept = Path(str(caught.value).split("lies in ")[1].rstrip("."))
    assert sorted(path.name for path in kept.iterdir()) == ["2-c.json", "a.json", "c.json"]
    assert (tmp_path / "b.json").is_file()


def test_half_of_what_fits_nowhere_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))

    def write(folder: Path) -> None:
        write_json(folder / "a.json", 1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NotWrittenError, match="There is no other place for it either"):
        write_last(tmp_path / "out", write)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_takes_no_more_is_our_error(tmp_path: Path) -> None:
    """By a limit on the size of files, which the system tells like a full disk. What was there before stays."""
    picture = Image.effect_noise((300, 300), 90)
    factors = {"unet": {"mid_block.attentions.0.proj_in": LoRAFactors(torch.ones(8, 400), torch.ones(400, 8), 1.0)}}

    def several() -> None:
        with atomic_files(tmp_path) as folder:
            (folder / "a.json").write_text("new")
            (folder / "a.csv").write_text("x" * 20_000)

    jobs: dict[str, Any] = {
        "a.json": lambda: write_json(tmp_path / "a.json", "x" * 20_000),
        "a.safetensors": lambda: write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(20_000)}),
        "lora.safetensors": lambda: save_lora(factors, tmp_path / "lora.safetensors"),
        "a.csv": several,
        "a.png": lambda: picture_sheet([("row", [picture])], tmp_path / "a.png", title="", columns=["column"]),
    }
    for name in jobs:
        (tmp_path / name).write_text("as it was")

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        for job in jobs.values():
            with pytest.raises(NotWrittenError, match="cannot be written"):
                job()

    assert forked(write) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(jobs, "as it was")


def test_what_a_killed_process_left_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    def die() -> None:
        with atomic_path(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(die) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (tmp_path / ".mine.part").mkdir()
    with atomic_path(tmp_path / "b.json") as outer:
        assert not left.exists()
        outer.write_text("{}")
        write_json(tmp_path / "a.json", [])
        assert outer.exists()  # of a process that lives
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.part", "a.json", "b.json"]


def test_files_of_a_folder_come_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def die() -> None:
        with atomic_files(tmp_path) as temporary:
            (temporary / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(die) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(NotWrittenError), atomic_files(tmp_path) as temporary:
        shutil.copy(tmp_path / "none", temporary / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # what the killed one left is gone too
    assert (tmp_path / "a").read_text() == "old"
    with atomic_files(tmp_path) as temporary:
        for name in "ab":
            (temporary / name).write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}
    with pytest.raises(NotWrittenError, match="cannot be written"), atomic_files("/proc/mole"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX'")
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    def write() -> None:
        os.umask(0o027)
        write_safetensors(tmp_path / "one.safetensors", {"a": torch.ones(1)})
        with atomic_files(tmp_path / "folder") as folder:
            write_safetensors(folder / "two.safetensors", {"a": torch.ones(1)})
            (folder / "two.json").write_text("{}")
            (folder / "two.json").chmod(0o600)

    assert forked(write) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["one.safetensors", "two.json", "two.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_a_folder_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    def half() -> None:
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "a").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NotWrittenError, match=r"out cannot be written: No space left on device\. Free some space"):
        half()
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):  # where there is nothing, and where there is an empty folder
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "a").write_text("whole")
        assert (tmp_path / "out" / "a").read_text() == "whole"
        (tmp_path / "out" / "a").unlink()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(NotWrittenError, match="cannot be written"), atomic_folder(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_folder_is_used_by_one_process_and_free_when_that_dies(tmp_path: Path) -> None:
    code = (
        f"import time\nfrom mole_diffusion.files import in_use\nwith in_use({str(tmp_path)!r}):\n print(1, flush=True)"
    )
    other = subprocess.Popen([sys.executable, "-c", f"{code}\n time.sleep(60)"], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(MoLEError, match="is in use by another process"), in_use(tmp_path):
        pass
    with in_use(tmp_path, "-1"):  # another part of it
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    with in_use(tmp_path):
        time.sleep(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["cat", "merge(scale=0.5)", "é ü", "{x}", "cat+boot"])
def test_an_ordinary_name_is_its_own(name: str) -> None:
    assert file_name(name) == name


DEVICES = ["CON", "nul.png", "nul .png", "aux.tar.gz", "COM1", "lpt\u00b2", "com\u00b9.txt", "conout$", "CONIN$.x"]
ODD_NAMES = ["..", ".", "", "../x", "/etc/x", "a\\b", "c:x", "a.", "a ", "nul.a:b", "con:", "\ud800", *DEVICES]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=150) | st.sampled_from(ODD_NAMES))
def test_any_name_is_a_name_in_its_folder(tmp_path_factory: Any, text: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    name = file_name(text)
    assert (folder / name).resolve().parent == folder.resolve()
    assert not set(name) & set('<>:"/\\|?*\n\r\t\0')
    assert 0 < len(name.encode()) <= 130
    assert name == name.strip(". ")
    assert not getattr(ntpath, "isreserved", lambda name: False)(name)  # from Python 3.13 on
    assert file_name(name) == name


def test_devices_of_windows_are_no_names() -> None:
    for name in DEVICES:
        assert file_name(name) != name
        assert file_name(name).partition(".")[0].rstrip().lower() not in {"con", "nul", "aux", "com1", "com\u00b9"}


def test_names_that_some_systems_take_for_one_are_refused() -> None:
    refuse_alike(["cat", "boot", "cat-2", "ss", "s"], "`concepts`", "")
    for names, said in (
        (["Cat", "cat"], "has 'Cat' and 'cat', one folder to some systems. Rename one"),
        (["é", "e\u0301"], "one folder to some systems"),
        (["STRASSE", "straße"], "one folder to some systems"),
        (["cat", "cat"], "has 'cat' twice"),
    ):
        with pytest.raises(MoLEError, match=said):
            refuse_alike(names, "`concepts`", "Rename one.")


def test_names_that_are_cleaned_stay_apart() -> None:
    names = ["a:b", "a/b", "a\\b", "a-b", "a b", "a\nb", "a" * 200, "a" * 201]
    assert len({file_name(name) for name in names}) == len(names)
