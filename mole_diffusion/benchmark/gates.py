"""The gates a benchmark draws with: read from a folder, or trained where that has none yet.

A training goes on where it was killed, and its gates appear in one step when they are whole. Each belongs to one
process, which draws with them too (see `.share`), so nobody waits and nothing is trained twice.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

from PIL import Image

from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.methods import Method
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.files import file_name, write_json
from mole_diffusion.training import Concept, train_gates

GATES, SECONDS = "gates", "seconds.json"
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def gates_folder(config: BenchmarkConfig, out: Path, composition: str, method: Method) -> Path:
    """Where the gates of a composition and method lie, or will lie once they are trained.

    Raises:
        MoLEError: The toybox has none for this composition.
    """
    if method.training is not None:
        return out / GATES / file_name(method.label) / file_name(composition)
    if config.gates == "toybox":
        from mole_diffusion import toybox

        return toybox.gates_dir(composition)
    return Path(str(config.gates)) / file_name(composition)


def train_missing_gates(
    config: BenchmarkConfig,
    out: Path,
    pipe: Any,
    composition: str,
    method: Method,
    *,
    clip: DifferentiableCLIP,
    references: Callable[[str], Sequence[Image.Image]],
    on_step_end: Callable[[int, Mapping[str, float]], None],
) -> None:
    """Trains the gates of a composition and method, if they are to be trained and are not there.

    Args:
        config: The benchmark.
        out: The benchmark's folder.
        pipe: A pipeline with the LoRAs of the composition, and without gates; left without.
        composition: Name of the composition whose gates are missing.
        method: The method that draws with them.
        clip: The CLIP that guides the training.
        references: The pictures of a concept.
        on_step_end: As in `train_gates`.

    Raises:
        MoLEError: As in `train_gates`.
    """
    folder = gates_folder(config, out, composition, method)
    if method.training is None or folder.is_dir():
        return
    names, work = composition.split("+"), folder.with_name(f"{folder.name}.work")
    start, first = time.perf_counter(), 0

    def step_end(step: int, numbers: Mapping[str, float]) -> None:
        nonlocal first
        first = first or step
        on_step_end(step, numbers)

    try:
        with _as_the_only_process():
            train_gates(
                pipe,
                method.training,
                prompts=training_prompts(config, names),
                concepts={name: _concept(config, name, references(name)) for name in names},
                clip=clip,
                out=work / "out",
                work=work / "checkpoints",
                pictures=False,
                progress=False,
                on_step_end=step_end,
            )
    finally:
        pipe.unload_gates()
    steps = method.training.steps - first + 1 if first else 0
    if steps:  # the time that a killed training spent is lost, but that of a step is known
        write_json(work / "out" / SECONDS, (time.perf_counter() - start) / steps * method.training.steps)
    os.replace(work / "out", folder)
    shutil.rmtree(work)


def training_prompts(config: BenchmarkConfig, names: Sequence[str]) -> list[str]:
    """Every template with the concepts in every order; in every rotation of their order where they are many."""
    rotations = [(*names[k:], *names[:k]) for k in range(len(names))]
    orders = list(permutations(names)) if len(names) <= 3 else rotations
    return [config.fill(template, order) for template in config.train_prompts for order in orders]


def _concept(config: BenchmarkConfig, name: str, references: Sequence[Image.Image]) -> Concept:
    known = config.concepts[name]
    token, *rest = known.phrase.split()
    class_name = " ".join(rest) or known.description
    return Concept(token=token, class_name=class_name, description=known.description, references=references)


@contextmanager
def _as_the_only_process() -> Iterator[None]:
    """Hides from the training that there are other processes: these train gates of their own, not the same together."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
