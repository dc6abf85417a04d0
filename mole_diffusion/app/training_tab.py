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
from .places import Places
from .session import Session
from .studio import Cancelled, Progress, Studio, Ticket

TEMPLATES = "a photo of {concepts} on grass\na photo of {concepts} on sand"
SHOWN = ("loss", "global", "local", "identity", "entropy")


def training_tab(
    studio: Studio, places: Places, session: gr.State, rows: Sequence[Any], base: gr.Textbox, gates: gr.Textbox
) -> None:
    """Lays it out.

    Args:
        studio, places, session: As for the page.
        rows: The session and the fields of the LoRAs' rows.
        base: The base's field.
        gates: The field that takes the trained gates.
    """
    gr.Markdown("Gates for the LoRAs that are on. No pictures are needed: CLIP compares what is drawn with the prompt.")
    templates = gr.Textbox(TEMPLATES, label="Prompts, one a line", lines=3, info="{concepts} names them in every order")
    with gr.Row():
        steps = gr.Number(200, label="Training steps", precision=0, minimum=1, min_width=100)
        batch = gr.Number(4, label="Pictures a step", precision=0, minimum=1, min_width=100)
        guidance = gr.Number(3.0, label="Guidance scale of training", min_width=100)
        out = gr.Textbox("my-gates", label="Folder for the gates", min_width=160)
    with gr.Row():
        start = gr.Button("Train, or go on", variant="primary", elem_id="mole-train")
        stop = gr.Button("Stop", variant="stop", elem_id="mole-stop")
    status = gr.HTML("", elem_id="mole-training")
    plot = gr.Image(label="Curves", interactive=False, type="filepath")
    samples = gr.Image(label="Before and after", interactive=False, type="filepath")

    def ask(own: Session) -> str:
        own.ticket = Ticket()
        return said.done("Waiting for the device …")

    def train(own: Session, *rest: Any) -> Iterator[list[Any]]:
        *fields, base_given, lines, number, pictures, scale, folder = rest
        try:
            own.edit(fields)
            settings = PictureSettings("gates", base=places.model(base_given), loras=tuple(own.loras))
            plan, config = training.plan(settings, lines, number, pictures, scale, places.path(folder))
            for event in training.train(studio, plan, config, own.ticket):
                if isinstance(event, Path):
                    drawn = event / "samples.png"
                    yield [said.done(f"The gates lie in {event}."), gr.skip(), str(drawn), str(event)]
                else:
                    now = Progress(event.number / event.total, None, f"training, step {event.number} of {event.total}")
                    yield [said.progress(now), _plot(own, event.curves), gr.skip(), gr.skip()]
        except Cancelled:
            said_so = said.done("Stopped. The same button goes on from the last checkpoint.")
            yield [said_so, gr.skip(), gr.skip(), gr.skip()]
        except MoLEError as error:
            yield [said.wrong(error), gr.skip(), gr.skip(), gr.skip()]

    asked = start.click(ask, session, status, queue=False, show_progress="hidden")
    asked.then(
        train,
        [*rows, base, templates, steps, batch, guidance, out],
        [status, plot, samples, gates],
        show_progress="hidden",
        concurrency_id="device",
    )
    stop.click(lambda own: own.ticket.cancel(), session, None, queue=False, show_progress="hidden")


def _plot(own: Session, numbers: Mapping[str, Sequence[float]]) -> str:
    panels: dict[str, dict[str, Sequence[float]]] = {name: {name: numbers[name]} for name in SHOWN if name in numbers}
    weights = {name.removeprefix("weight/"): v for name, v in numbers.items() if name.startswith("weight/")}
    return str(curves({**panels, "mean weight": weights}, own.place("curves.png")))
