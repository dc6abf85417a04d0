"""What a gate training leaves beside the gates: a record, a card, curves, heat maps, pictures before and after."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import atomic_path, try_folder, write_json, write_last
from mole_diffusion.gating import MoLEModel
from mole_diffusion.gating.card import LIBRARY
from mole_diffusion.gating.folder import CONFIG, WEIGHTS, is_config
from mole_diffusion.reading import regular_text
from mole_diffusion.sheets import curves, gate_heat_maps, picture_sheet
from mole_diffusion.tables import markdown_table, number
from mole_diffusion.training.engine.history import History
from mole_diffusion.training.gates.concepts import Concept
from mole_diffusion.training.gates.config import GateTrainingConfig

TRAINING_FILE, CARD_FILE = "training.json", "README.md"
SEEDS = (0, 1, 2, 3)
PROMPTS_SHOWN = 2
STEPS = 25


class TrainingReport:
    """Made before a training, when the gates on `pipe` are still untrained; writes after it.

    Args:
        pipe: The pipeline.
        config: The settings of the training.
        prompts: The prompts trained on.
        concepts: What each LoRA stands for, by its name.
        clip_texts: What CLIP read for each prompt.
    """

    def __init__(
        self,
        pipe: Any,
        config: GateTrainingConfig,
        prompts: Sequence[str],
        concepts: Mapping[str, Concept],
        clip_texts: Sequence[str],
    ) -> None:
        self.pipe = pipe
        self.config = config
        self.prompts = list(prompts)
        self.concepts = concepts
        self.clip_texts = list(clip_texts)
        self._untrained = {name: value.clone() for name, value in pipe.gates.state_dict().items()}

    def write(self, out: Path, gates: MoLEModel, history: History, pictures: bool) -> None:
        """Writes everything into `out`, the gates last, so that gates there mean that the rest is there too.

        What goes wrong with a picture is raised after the gates are written.

        Raises:
            NotWrittenError: `out` cannot be written. The message says where the gates lie instead.
        """
        record = {
            "config": dataclasses.asdict(self.config),
            "prompts": dict(zip(self.prompts, self.clip_texts, strict=True)),
            "concepts": {
                name: {
                    "token": concept.token,
                    "class_name": concept.class_name,
                    "description": concept.description,
                    "references": len(concept.references),
                }
                for name, concept in self.concepts.items()
            },
            "numbers": history.numbers,
        }

        def write_all(folder: Path, with_pictures: bool = False) -> None:
            # The record first: it shows whose folder this is.
            write_json(folder / TRAINING_FILE, record)
            try:
                if with_pictures:
                    self._draw_all(folder, gates, history)
            finally:
                with atomic_path(folder / CARD_FILE) as temporary:
                    temporary.write_text(self._card(gates, history, with_pictures), encoding="utf-8")
                gates.save_pretrained(folder)

        write_last(out, lambda folder: write_all(folder, pictures and folder == out))

    def _draw_all(self, out: Path, gates: MoLEModel, history: History) -> None:
        curves(_panels(history), out / "curves.png", title=" + ".join(gates.lora_names))
        tables = history.tables()
        absent = ~_present(gates, tables["late"].places)
        heat_maps = {when: table.values.masked_fill(absent, float("nan")) for when, table in tables.items()}
        gate_heat_maps(heat_maps, tables["late"].places, gates.lora_names, out / "gates.png")
        self._samples(out / "samples.png", gates)

    def _samples(self, path: Path, gates: MoLEModel) -> None:
        """Pictures of the first prompts at fixed seeds, with the untrained gates and with the trained ones."""
        trained = {name: value.clone() for name, value in gates.state_dict().items()}
        rows = []
        try:
            for prompt in self.prompts[:PROMPTS_SHOWN]:
                for label, state in (("before", self._untrained), ("after", trained)):
                    gates.load_state_dict(state)
                    rows.append((label, self._draw(prompt)))
        finally:
            gates.load_state_dict(trained)
        title = " / ".join(self.prompts[:PROMPTS_SHOWN])
        picture_sheet(rows, path, title=title, columns=[f"seed {seed}" for seed in SEEDS])

    def _draw(self, prompt: str) -> list[Image.Image]:
        bar = getattr(self.pipe, "_progress_bar_config", {})
        self.pipe.set_progress_bar_config(disable=True)
        try:
            # One by one: training may have had no room for more.
            return [
                self.pipe(
                    prompt,
                    num_inference_steps=STEPS,
                    guidance_scale=self.config.picture_guidance_scale,
                    height=self.config.resolution,
                    width=self.config.resolution,
                    generator=torch.Generator().manual_seed(seed),
                ).images[0]
                for seed in SEEDS
            ]
        finally:
            self.pipe.set_progress_bar_config(**bar)

    def _lora_line(self, lora: Mapping[str, Any]) -> str:
        name, (low, high) = lora["name"], lora["ranks"]
        token = f', token "{_in_a_line(self.concepts[name].token)}"' if name in self.concepts else ""
        return f"- {_in_a_line(name)}: factors of SHA-256 {lora['sha256']}, ranks {low} to {high}{token}"

    def _card(self, gates: MoLEModel, history: History, pictures: bool) -> str:
        """The model card, in the form of the Hugging Face Hub."""
        base, on_hub = _base_model(self.pipe)
        config = self.config
        numbers = [name for name in history.numbers if not name.startswith("weight/")]
        lines = [
            "---",
            LIBRARY,
            *([f"base_model: {base}"] if on_hub else []),
            "tags: [lora, mixture-of-lora-experts, stable-diffusion]",
            "---",
            "",
            f"# Gates for {_in_a_line(' + '.join(gates.lora_names))}",
            "",
            "Gates of [Mixture of LoRA Experts](https://openreview.net/forum?id=uWvKBCYh4S), trained by "
            "`mole_diffusion.train_gates`. They weigh exactly these LoRAs on this base:",
            "",
            f"- base: {base}",
            *(self._lora_line(lora) for lora in gates.config.loras),
            "",
            "```python",
            f"pipe.load_loras({{{', '.join(f'{json.dumps(name)}: ...' for name in gates.lora_names)}}})",
            "pipe.load_gates(folder)",
            "```",
            "",
            f"Trained for {config.steps} steps of {config.batch_size} pictures, seed {config.seed}, on "
            f"{len(self.prompts)} prompts, such as:",
            "",
            *(f"- {_in_a_line(prompt)}" for prompt in self.prompts[:5]),
            "",
            markdown_table(
                ["", "first tenth", "last tenth"],
                [[name, number(history.first_mean(name), 4), number(history.last_mean(name), 4)] for name in numbers],
            ),
            "Losses are CLIP's view while training, of single-step predictions; they are no scores of pictures. "
            f"Settings and numbers of every step: `{TRAINING_FILE}`.",
            "",
        ]
        if pictures:
            lines += [
                "![curves](curves.png)",
                "![gates, early and late](gates.png)",
                "![before and after](samples.png)",
                "",
            ]
        return "\n".join(lines)


def check_out(folder: str | os.PathLike[str]) -> None:
    """Makes sure, before a training, that its report can be written into a folder and replaces nobody else's files.

    Raises:
        NotWrittenError: It cannot be written.
        MoLEError: It has files of these names that no gate training wrote.
    """
    place = try_folder(folder)
    for name, ours in _OURS.items():
        file = place / name
        if file.exists() and not (file.is_file() and ours(file)):
            raise MoLEError(
                f"{file} is there and was not written by a gate training; it would be replaced. Choose another folder, "
                "or move it away."
            )


def _is_record(file: Path) -> bool:
    found = _json(file)
    return isinstance(found, dict) and {"config", "prompts", "numbers"} <= set(found)


def _is_card(file: Path) -> bool:
    try:
        return LIBRARY in regular_text(file)
    except MoLEError:
        return False


def _has_record(file: Path) -> bool:
    return (file.parent / TRAINING_FILE).is_file() or (file.parent / CONFIG).is_file()


def _json(file: Path) -> Any:
    try:
        return json.loads(regular_text(file, largest=2**30))
    except (ValueError, RecursionError):
        return None


_OURS: dict[str, Callable[[Path], bool]] = {
    TRAINING_FILE: _is_record,
    CONFIG: is_config,
    CARD_FILE: _is_card,
    WEIGHTS: lambda file: is_config(file.parent / CONFIG),
    **dict.fromkeys(("curves.png", "gates.png", "samples.png"), _has_record),
}
"""Every file of a report, and how to tell that it is one."""


def _in_a_line(text: str) -> str:
    """A name or prompt as Markdown shows it in its place: in one line, and no part of a table or of code."""
    return " ".join(text.split()).replace("|", r"\|").replace("`", "'")


def _base_model(pipe: Any) -> tuple[str, bool]:
    """Name of the base, and whether it is one of the Hub; of a local folder only its own name, which others may see."""
    name = str(pipe.config.get("_name_or_path") or "")
    if not name:
        return "unknown", False
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists():
        return name, True
    return _in_a_line(re.split(r"[/\\]", name.rstrip("/\\"))[-1]), False


def _panels(history: History) -> dict[str, dict[str, list[float]]]:
    """What belongs on one scale, panel by panel."""
    numbers = history.numbers
    weights = {name.removeprefix("weight/"): v for name, v in numbers.items() if name.startswith("weight/")}
    terms = {name: numbers[name] for name in ("loss", "global", "local", "identity", "balance") if name in numbers}
    return {
        **{name: {name: values} for name, values in terms.items()},
        "gate entropy (nats)": {"entropy": numbers["entropy"]},
        "temperature": {"temperature": numbers["temperature"]},
        "mean weight": weights,
    }


def _present(gates: MoLEModel, places: Sequence[str]) -> torch.Tensor:
    """(places, N) bool: which LoRA touches which place."""
    experts = {spec.name: spec.indices for spec in gates.specs}
    return torch.tensor([[index in experts[place] for index in range(gates.num_experts)] for place in places])
