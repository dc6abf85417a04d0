"""YAML from anybody: the values that were meant, or one line, in bounded time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.report.paper_table import read_paper
from mole_diffusion.cli.gate_settings import read_config
from mole_diffusion.errors import MoLEError
from mole_diffusion.yaml_files import parse_yaml, read_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_plain_values() -> None:
    text = "a: 1\nb: [off, no, true, 1.5, null]\nc: &c {d: e}\nf: *c\ng:\n  <<: *c\n  h: i\n"
    assert parse_yaml(text) == {
        "a": 1,
        "b": ["off", "no", True, 1.5, None],
        "c": {"d": "e"},
        "f": {"d": "e"},
        "g": {"d": "e", "h": "i"},
    }
    assert parse_yaml("") is None


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfsteps: 3\n")
    assert read_yaml(tmp_path / "a.yaml") == {"steps": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"the key 'a' twice in one mapping, again in line 3"),
        ("x: {a: 1, a: 2}", "the key 'a' twice"),
        (LAUGHS, "more than 5000 values, with what its anchors repeat"),
        ("a: &a [*a]", "an anchor that holds itself"),
        ("[" * 5000 + "]" * 5000, "nested more than 20 deep"),
        ("- " * 3000 + "x", "nested more than 20 deep"),
        ("[" + "1, " * 20_000 + "1]", "more than 5000 values"),
        ("1: x", "the key in line 1 is no word"),
        ("[a]: x", "the key in line 1 is no word"),
        ("a: !!python/object/apply:os.system [echo]", "a python/object/apply:os.system in line 1, and there are only"),
        ("a: 2020-13-45", "a timestamp in line 1"),
        ("a: *nowhere", "undefined alias"),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("a: [1\n", "no YAML that can be read"),
        ("a: " + "9" * 5000, "no YAML that can be read"),
        ("\x1b[31m: \x00", "no YAML that can be read"),
        ("a: 2001-01-01", r"a timestamp in line 1, and there are only words.*Write it in quotes"),
        ("a:\n  - !!binary aGVsbG8=", "a binary in line 2"),
        ("a: !!set {x, y}", "a set in line 1"),
        ('a: ["x", "\\ud800 cat"]', "half a UTF-16 pair in line 1"),
        ('"\\udfff": 1', "half a UTF-16 pair in line 1"),
        ("a: !!int x", "no YAML that can be read"),
        ("a: !!float", "no YAML that can be read"),
        ("a: !!binary é", "a binary in line 1"),
        ("a: {" + "b" * 10**5 + ": 1, " + "b" * 10**5 + ": 2}", "no YAML that can be read"),
    ],
)
def test_what_is_no_yaml_for_settings(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode())
    before = time.process_time()
    for read in (read_yaml, BenchmarkConfig.from_file, read_paper, lambda path: read_config(None, path, None, {})):
        with pytest.raises(MoLEError) as error:
            read(path)
        said = str(error.value)
        assert said.isprintable()
        assert str(path) in said
        assert len(said) <= 2000
    with pytest.raises(MoLEError, match=message):
        parse_yaml(text)
    assert time.process_time() - before < 30


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_text("#" * 300_000)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    for name, message in (
        ("pipe.yaml", "a pipe, not a file"),
        ("large.yaml", "300,000 bytes, more than the 262,144"),
        ("latin.yaml", "not a text in UTF-8"),
        ("nowhere.yaml", "no such file"),
        ("", "a folder, not a file"),
    ):
        with pytest.raises(MoLEError, match=message):
            read_yaml(tmp_path / name)


@pytest.mark.parametrize("setting", ["steps=[", "gates.scope={a: 1, a: 2}", "steps=&a [*a]"])
def test_settings_of_the_command_line_are_yaml_too(setting: str) -> None:
    with pytest.raises(MoLEError, match=rf"--set {setting.partition('=')[0]}="):
        read_config(None, None, [setting], {})


def test_numbers_that_fill_the_memory(tmp_path: Path) -> None:
    values: dict[str, Any] = {"base": "toybox", "name": "x", "concepts": "toybox", "compositions": ["cat+boot"]}
    with pytest.raises(MoLEError, match="at most 100000 are drawn"):
        BenchmarkConfig.from_dict(
            {**values, "methods": ["linear"], "prompts": ["{concepts}"], "clip": "toybox", "seeds": 10**12}
        )
