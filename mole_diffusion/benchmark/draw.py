"""Drawing the pictures of a benchmark, one composition and method after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from mole_diffusion.benchmark.cell import Cell
from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.gates import gates_folder, train_missing_gates
from mole_diffusion.benchmark.memory import call_memory
from mole_diffusion.benchmark.methods import Method
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.gating import GateRecord
from mole_diffusion.pipelines import pipeline_class


class Cost(NamedTuple):
    """What one picture took, and what its gates did.

    Attributes:
        evaluations: UNet evaluations.
        seconds: Its share of the time of the call.
        memory: MiB that a call takes at its peak beyond the weights; `None` where that cannot be told.
        gates: Place to the mean weight of each LoRA over the steps, empty without gates.
    """

    evaluations: int
    seconds: float
    memory: float | None
    gates: dict[str, list[float | None]]


class Drawer:
    """One pipeline, with the LoRAs of one composition and the gates of one method at a time.

    Args:
        config: The benchmark.
        out: The benchmark's folder.
        device: Where to compute.
        clip: The CLIP that guides where gates are trained.
        references: Pictures of a concept, for trainings that compare with them.
    """

    def __init__(
        self,
        config: BenchmarkConfig,
        out: Path,
        device: torch.device | str,
        *,
        clip: DifferentiableCLIP,
        references: Callable[[str], Sequence[Image.Image]],
    ) -> None:
        self._config, self._out = config, out
        self._device = torch.device(device)
        self._clip, self._references = clip, references
        base = _base(config.base)
        self._pipe: Any = pipeline_class(base).from_pretrained(base).to(self._device)
        if config.resolution is not None:
            self._pipe.family.refuse_cut(self._pipe, config.resolution)
        self._pipe.set_progress_bar_config(disable=True)
        self._composition: str | None = None
        self._evaluations = 0
        getattr(self._pipe, self._pipe.family.denoiser).register_forward_hook(self._count)
        self._memory: dict[tuple[Any, ...], float | None] = {}

    def prepare(
        self, composition: str, method: Method, on_step_end: Callable[[int, Mapping[str, float]], None]
    ) -> None:
        """Gets LoRAs and gates ready for `draw`; gates that are missing are trained first.

        Raises:
            MoLEError, OSError: LoRAs or gates do not fit or are not there, or the training fails.
        """
        pipe = self._pipe
        if self._composition != composition:
            self._composition = None
            pipe.unload_loras()
            concepts = {name: self._config.concepts[name] for name in composition.split("+")}
            pipe.load_loras(
                {name: concept.lora for name, concept in concepts.items()},
                triggers={name: concept.phrase for name, concept in concepts.items()},
            )
            self._composition = composition
        pipe.unload_gates()
        way = method.build()
        if "gates" in way.needs:
            train_missing_gates(
                self._config,
                self._out,
                pipe,
                composition,
                method,
                clip=self._clip,
                references=self._references,
                on_step_end=on_step_end,
            )
            # From the file also where they were just trained, so that a run that was interrupted draws the same.
            pipe.load_gates(gates_folder(self._config, self._out, composition, method))
        pipe.set_composition(way)

    def draw(self, cells: Sequence[Cell]) -> list[tuple[Image.Image, Cost]]:
        """The pictures of cells that differ in their seeds only, drawn together, each with what it cost."""
        first, pipe = cells[0], self._pipe
        self._evaluations = 0
        start = time.perf_counter()
        record, pictures = self._draw(cells)
        evaluations, seconds = self._evaluations, (time.perf_counter() - start) / len(cells)
        memory = self._call_memory(cells)
        gates: list[dict[str, list[float | None]]] = [{} for _ in cells]
        if record is not None and "gates" in first.method.build().needs and pipe.gates is not None:
            gates = gates_by_picture(record, len(cells))
        costs = [Cost(evaluations, seconds, memory, used) for used in gates]
        return list(zip(pictures, costs, strict=True))

    def _draw(self, cells: Sequence[Cell]) -> tuple[GateRecord | None, list[Image.Image]]:
        if self._pipe.gates is None:
            return None, self._call(cells, self._config.steps)
        with self._pipe.gates.record(accumulate=True) as record:
            return record, self._call(cells, self._config.steps)

    def _call(self, cells: Sequence[Cell], steps: int) -> list[Image.Image]:
        config, first = self._config, cells[0]
        side = {} if config.resolution is None else dict.fromkeys(("height", "width"), config.resolution)
        output = self._pipe(
            [config.prompt(first.prompt, first.kept)] * len(cells),
            loras=dict.fromkeys(first.kept, config.scale),
            num_inference_steps=steps,
            guidance_scale=config.guidance_scale,
            **side,
            generator=[torch.Generator().manual_seed(cell.seed) for cell in cells],
        )
        return list(output.images)

    def _call_memory(self, cells: Sequence[Cell]) -> float | None:
        """Of a call of one step, which takes what every step does; measured once where nothing makes a difference."""
        first = cells[0]
        key = (first.composition, first.method.label, tuple(first.kept), len(cells))
        if key not in self._memory:
            self._memory[key] = call_memory(lambda: self._call(cells, 1), self._device)
        return self._memory[key]

    def _count(self, unet: nn.Module, args: Any, output: Any) -> None:
        experts = self._pipe.experts
        run = None if experts is None else experts.context
        self._evaluations += 1 if run is None else run.passes


def gates_by_picture(record: GateRecord, pictures: int) -> list[dict[str, list[float | None]]]:
    """The mean over all passes of each place's weights, for each picture of one call.

    Returns:
        By picture, place to one number per LoRA; `None` where a LoRA does not touch a place.
    """
    means = []
    for place in record.names:
        # A pass has the pictures' rows once, or twice under guidance; one row where gates do not look at the picture.
        rows = [gates.detach().double().cpu() for gates in record.by_pass[place]]
        rows = [gates.expand(pictures, -1) if len(gates) == 1 else gates for gates in rows]
        means.append(torch.stack([part for gates in rows for part in gates.split(pictures)]).mean(dim=0))
    values, present = torch.stack(means, dim=1), record.present()
    return [
        {
            place: [
                round(value, 6) if there else None
                for value, there in zip(values[picture, row].tolist(), present[row].tolist(), strict=True)
            ]
            for row, place in enumerate(record.names)
        }
        for picture in range(pictures)
    ]


def _base(base: str) -> str:
    if base == "toybox":
        from mole_diffusion import toybox

        return str(toybox.base_dir())
    return base
