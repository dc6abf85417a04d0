"""Fixtures every test may use: a tiny random Stable Diffusion, fresh for each test.

The process that gives tests to others reads this file too, and they begin once it has: so what takes ten seconds to
import is imported inside.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.fork_server import ForkServer

if TYPE_CHECKING:
    import torch

    from mole_diffusion.clip import DifferentiableCLIP


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: begun last, one of them would keep a process busy while the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collectstart() -> None:
    """Imports make little garbage, and looking for it between them takes a fifth of their time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What is there by now stays to the end: looking whether it is garbage would take long each time.

    What comes is looked through after 10,000 new objects instead of 700, which saves four seconds in a hundred.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


def pytest_sessionfinish() -> None:
    """At the very end libraries look for what nobody gave back."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """For jobs in processes of their own, see `tests.forked`."""
    server = ForkServer(tmp_path_factory.mktemp("hugging-face"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> DifferentiableCLIP:
    """A random small CLIP, which no test changes."""
    import torch

    from mole_diffusion.clip import DifferentiableCLIP
    from tests.tiny.clip import write_clip

    torch.manual_seed(0)
    return DifferentiableCLIP(write_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def components() -> dict[str, Any]:
    """Components of a tiny random Stable Diffusion."""
    from tests.tiny import tiny_components

    return tiny_components()


@pytest.fixture
def pipe() -> Any:
    """A stock `StableDiffusionPipeline` around tiny random components."""
    from tests.tiny import tiny_pipeline

    return tiny_pipeline()


@pytest.fixture
def same_noise_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed gives the same noise in every precision, which in older versions of torch it does not."""
    import torch

    randn = torch.randn

    def rounded(*size: Any, dtype: torch.dtype | None = None, **given: Any) -> torch.Tensor:
        return randn(*size, **given).to(dtype)

    monkeypatch.setattr(torch, "randn", rounded)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures for the report, and those that stand in for references, in one step instead of 25; one of a kind."""
    for module in ("report", "references"):
        monkeypatch.setattr(f"mole_diffusion.training.gates.{module}.STEPS", 1)
    monkeypatch.setattr("mole_diffusion.training.gates.report.SEEDS", (0,))
