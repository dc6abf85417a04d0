"""The reader of prompts: whatever editor or shell wrote the file, each picture gets its own, or an error names it."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_diffusion.cli.gate_inputs import read_training_prompts as read_for_training
from mole_diffusion.errors import MoLEError
from mole_diffusion.prompts import read_prompt_lines, read_prompts

TEXT = "a café cat on grass\n\n  a blue boot on sand  \n"
LINES = ["a café cat on grass", "a blue boot on sand"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_any_unicode_and_any_line_ending(tmp_path: Path, encoding: str, ending: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(TEXT.replace("\n", ending).encode(encoding))
    assert read_prompts(file, ["0.png", "1.png"]) == LINES
    assert read_for_training(["a dog"], file, None, {}) == ["a dog", *LINES]
    file = tmp_path / "prompts.JSON"
    file.write_bytes(json.dumps({"1.png": LINES[1], "0.png": LINES[0]}, ensure_ascii=False).encode(encoding))
    assert read_prompts(file, ["0.png", "1.png"]) == LINES


def test_big_endian_marks_and_files_that_were_put_together(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xfe\xff" + TEXT.encode("utf-16-be"))
    assert read_prompt_lines(file) == LINES
    file.write_bytes(b"\xef\xbb\xbf" + LINES[0].encode() + b"\n\xef\xbb\xbf" + LINES[1].encode())
    assert read_prompt_lines(file) == LINES
    file.write_text("one\u2028line\nanother\u0085".replace("\u0085", ""), encoding="utf-8")
    assert read_prompt_lines(file) == ["one\u2028line", "another"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", TEXT.encode("cp1252"), r"a\.txt is not UTF-8 \(line 1\)\. Save it as UTF-8"),
        ("a.txt", "cat\n".encode("utf-16-le"), r"a\.txt has the control character '\\x00' in line 1"),
        ("a.txt", b"\xff\xfea", r"a\.txt is not UTF-16 \(line 1\)"),
        ("a.txt", b"a cat\nred \x1b[31m boot", r"a\.txt has the control character '\\x1b' in line 2"),
        ("a.csv", b"file,prompt\n0.png,a cat\n", r"a\.csv: prompts are read from a text file .*not from \.csv"),
        ("a.jsonl", b'{"file_name": "0.png"}\n', r"a\.jsonl: prompts are read from"),
        ("a.txt", b"one\ntwo\nthree\n", r"a\.txt has 3 prompts, and there are 2 pictures"),
        ("a.txt", b"", r"a\.txt has 0 prompts"),
        ("a.json", b'{"0.png": "a cat",}', r"a\.json is no JSON: "),
        ("a.json", b"[" * 100_000, r"a\.json is no JSON: "),
        ("a.json", b'["a", "b"]', r"a\.json must hold an object of picture names to prompts"),
        ("a.json", b'{"0.png": 1, "1.png": "b"}', r"a\.json must hold an object"),
        ("a.json", b'{"0.png": " ", "1.png": "b"}', r"a\.json must hold an object"),
        ("a.json", b'{"0.png": "a", "0.png": "b", "1.png": "c"}', r"a\.json has '0\.png' twice"),
        ("a.json", b'{"0.png": "a \\ud800 cat", "1.png": "b"}', r"the prompt of '0\.png' has '\\ud800', which is no"),
        ("a.json", b'{"0.png": "b", "1.png": "a \\u001b cat"}', r"the prompt of '1\.png' has '\\x1b', which is no"),
        ("a.json", b'{"0.png": "a"}', r"a\.json has no prompt for 1 of 2 pictures: 1\.png"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MoLEError, match=message):
        read_prompts(tmp_path / name, ["0.png", "1.png"])


def test_no_file_a_folder_and_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    for name, message in (
        ("none", "no such file"),
        ("pipe", "a pipe, not a file"),
        ("folder", "a folder, not a file"),
    ):
        with pytest.raises(MoLEError, match=rf"{name}\.txt: {message}"):
            read_prompts(tmp_path / f"{name}.txt", ["0.png"])


def test_names_as_a_mac_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"café.png": "a cat"}), encoding="utf-8")
    assert read_prompts(tmp_path / "a.json", [unicodedata.normalize("NFD", "café.png")]) == ["a cat"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.sampled_from(["txt", "json"]))
def test_any_bytes_are_prompts_or_our_error(tmp_path_factory: Any, data: bytes, ending: str) -> None:
    file = tmp_path_factory.getbasetemp() / f"any.{ending}"
    file.write_bytes(data)
    said, prompts = f"any.{ending}", ["a cat"]
    try:
        prompts = read_prompts(file, ["0.png"])
    except MoLEError as error:
        said = str(error)
    assert f"any.{ending}" in said
    assert len(prompts) == 1
    assert prompts[0].strip() == prompts[0] != ""


SIGNS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(SIGNS, min_size=2, max_size=5), ENCODINGS)
def test_prompts_come_back_as_they_were_written(tmp_path_factory: Any, prompts: list[str], encoding: str) -> None:
    names = [f"{k}.png" for k in range(len(prompts))]
    file = tmp_path_factory.getbasetemp() / "whole.txt"
    file.write_bytes("\n".join(prompts).encode(encoding))
    assert read_prompts(file, names) == prompts
    file = file.with_suffix(".json")
    file.write_bytes(json.dumps(dict(zip(names, prompts, strict=True))).encode(encoding))
    assert read_prompts(file, names) == prompts
