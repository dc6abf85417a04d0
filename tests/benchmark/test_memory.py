"""The memory of a call, counted by hand."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from mole_diffusion.benchmark.memory import call_memory

MIB = 2**18  # numbers in float32


def test_the_peak_is_what_lives_at_once() -> None:
    def call() -> None:
        first = torch.ones(4 * MIB)  # 4
        second = first + 1  # 8
        del first  # 4
        third = torch.cat([second, second])  # 12
        del second, third
        torch.ones(MIB)

    for _ in range(2):
        assert call_memory(call, torch.device("cpu")) == pytest.approx(12, abs=1e-3)


def test_what_was_there_does_not_count() -> None:
    weights = torch.ones(8 * MIB)
    assert call_memory(lambda: weights[: 2 * MIB] * 2, torch.device("cpu")) == pytest.approx(2, abs=1e-3)
    assert call_memory(lambda: None, torch.device("cpu")) == pytest.approx(0, abs=1e-3)


def test_what_an_earlier_call_left_and_this_one_gives_back_saves_it_nothing() -> None:
    left: list[torch.Tensor] = []
    call_memory(lambda: left.append(torch.ones(8 * MIB)), torch.device("cpu"))
    block = weakref.ref(left[0])

    def call() -> None:
        left.clear()
        assert block() is not None  # else torch writes a warning to the terminal
        torch.ones(2 * MIB)

    assert call_memory(call, torch.device("cpu")) == pytest.approx(2, abs=1e-3)
    assert block() is None


def test_garbage_is_not_collected_in_between() -> None:
    def call() -> None:
        assert not gc.isenabled()

    call_memory(call, torch.device("cpu"))
    assert gc.isenabled()


def test_other_devices_tell_nothing() -> None:
    assert call_memory(lambda: torch.ones(1), torch.device("mps")) is None
