"""Fixtures every test may use: a tiny random Stable Diffusion, fresh for each test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import tiny_components, tiny_pipeline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: begun last, one of them would keep a process busy while the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture
def components() -> dict[str, Any]:
    """Components of a tiny random Stable Diffusion."""
    return tiny_components()


@pytest.fixture
def pipe() -> Any:
    """A stock `StableDiffusionPipeline` around tiny random components."""
    return tiny_pipeline()


@pytest.fixture
def same_noise_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed gives the same noise in every precision, which in older versions of torch it does not."""
    randn = torch.randn

    def rounded(*size: Any, dtype: torch.dtype | None = None, **given: Any) -> torch.Tensor:
        return randn(*size, **given).to(dtype)

    monkeypatch.setattr(torch, "randn", rounded)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures for the report, and those that stand in for references, in two steps instead of 25; fewer of them."""
    for module in ("report", "references"):
        monkeypatch.setattr(f"mole_diffusion.training.gates.{module}.STEPS", 2)
    monkeypatch.setattr("mole_diffusion.training.gates.report.SEEDS", (0, 1))
