"""The tab that trains gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..drawing.settings import PictureSettings
from ..errors import MoLEError
from ..sheets import curves
from . import said, training
from .allowed_folders import AllowedFolders
from .session import Session
from .studio import Cancelled, Progress, Studio

TEMPLATES = "a photo of {concepts} on grass\na photo of {concepts} on sand"
CURVES = ("loss", "global", "local", "identity", "entropy")


def training_tab(
    studio: Studio, allowed: AllowedFolders, session: gr.State, rows: Sequence[Any], base: gr.Textbox, gates: gr.Textbox
) -> None:
    """Lays it out.

    Args:
        studio, allowed, session: As for the page.
        rows: The session and the fields of the LoRAs' rows.
        base: The base's field.
        gates: The field that takes the trained gates.
    """
    gr.Markdown(
        "Gates for the LoRAs that are on, on the base of the other tab. No pictures are needed: CLIP compares what is "
        "drawn with the prompt. The trigger of each LoRA is its token and its class: `sks dog`."
    )
    templates = gr.Textbox(TEMPLATES, label="Prompts, one a line", lines=3, info="{concepts} names them in every order")
    with gr.Row():
        steps = gr.Number(200, label="Training steps", precision=0, minimum=1, min_width=100)
        batch = gr.Number(4, label="Pictures a step", precision=0, minimum=1, min_width=100)
        guidance = gr.Number(3.0, label="Guidance scale of training", min_width=100)
    with gr.Row():
        out = gr.Textbox("my-gates", label="Folder for the gates", min_width=160)
        clip = gr.Textbox(
            "",
            label="CLIP that guides",
            placeholder="the toybox's own",
            info="for another base, open_clip's ViT-B-32:laion2b_s34b_b79k, or a folder",
            min_width=160,
        )
    with gr.Row():
        start = gr.Button("Train, or go on", variant="primary", elem_id="mole-train")
        stop = gr.Button("Stop", variant="stop", elem_id="mole-stop")
    status = gr.HTML("", elem_id="mole-training", elem_classes="mole-maybe")
    plot = gr.Image(label="Curves", interactive=False, type="filepath")
    samples = gr.Image(label="Before and after", interactive=False, type="filepath")

    def ask(own: Session) -> str:
        own.ask_to_train()
        return said.done("Waiting for the device …")

    def train(own: Session, *rest: Any) -> Iterator[list[Any]]:
        *fields, base_given, lines, number, pictures, scale, guide, folder = rest
        try:
            own.edit(fields)
            settings = PictureSettings("gates", base=allowed.model(base_given), loras=tuple(own.loras))
            plan, config = training.plan(settings, lines, number, pictures, scale, guide, folder, allowed)
            for event in training.train(studio, plan, config, own.training):
                if isinstance(event, Path):
                    drawn = event / "samples.png"
                    yield [said.done(f"The gates lie in {event}."), gr.skip(), str(drawn), str(event)]
                elif isinstance(event, Progress):
                    yield [said.progress(event), gr.skip(), gr.skip(), gr.skip()]
                else:
                    yield [said.progress(_progress(event)), _plot(own, event.curves), gr.skip(), gr.skip()]
        except Cancelled:
            said_so = said.done("Stopped. The same button goes on from the last checkpoint.")
            yield [said_so, gr.skip(), gr.skip(), gr.skip()]
        except MoLEError as error:
            yield [said.wrong(error), gr.skip(), gr.skip(), gr.skip()]

    asked = start.click(ask, session, status, queue=False, show_progress="hidden")
    asked.then(
        train,
        [*rows, base, templates, steps, batch, guidance, clip, out],
        [status, plot, samples, gates],
        show_progress="hidden",
        concurrency_id="device",
    )
    stop.click(lambda own: own.training.cancel(), session, None, queue=False, show_progress="hidden")


def _progress(step: training.StepDone) -> Progress:
    doing = f"step {step.number} of {step.total}"
    return Progress(step.number / step.total, None, doing if step.number < step.total else "drawing before and after")


def _plot(own: Session, numbers: Mapping[str, Sequence[float]]) -> str:
    panels: dict[str, dict[str, Sequence[float]]] = {name: {name: numbers[name]} for name in CURVES if name in numbers}
    weights = {name.removeprefix("weight/"): v for name, v in numbers.items() if name.startswith("weight/")}
    return str(curves({**panels, "mean weight": weights}, own.place("curves.png")))
