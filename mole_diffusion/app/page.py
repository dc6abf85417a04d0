"""The page's layout: which field stands where, and which function answers to which button."""

from __future__ import annotations

import html
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from .. import toybox
from ..choices import ROLES
from ..composition import COMPOSITIONS
from ..drawing.settings import LoRASettings, PictureSettings
from ..errors import MoLEError
from ..methods import options
from . import drawn_regions, form, said
from .allowed_folders import AllowedFolders
from .coloured import coloured, css_colour
from .session import Session
from .studio import Cancelled, Studio
from .training_tab import training_tab

STATIC = Path(__file__).with_name("static")
BEGIN = PictureSettings(
    "a photo of a <v1> cat and a <v2> boot on grass",
    loras=(LoRASettings("cat", "toybox:cat"), LoRASettings("boot", "toybox:boot")),
    steps=25,
    guidance_scale=2.0,
)
FIELDS = 5  # of a row: on, name, weight, trigger, role


def build(studio: Studio, allowed: AllowedFolders, begin: PictureSettings) -> gr.Blocks:
    """The page.

    Args:
        studio: What draws.
        allowed: What may be read by its name.
        begin: What it shows to a new visitor.
    """
    with gr.Blocks(title="mole", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        session = gr.State(None, time_to_live=86400)
        gr.Markdown("# mole: several LoRAs in one picture")
        with gr.Tab("Draw"):
            draw = _DrawTab(studio, allowed, session, begin)
        with gr.Tab("Train gates"):
            training_tab(studio, allowed, session, draw.edit_inputs, draw.base, draw.gates)
        page.load(draw.begin, outputs=[session, *draw.told_fields, *draw.row_outputs, *draw.colours])
    page.queue(default_concurrency_limit=1, max_size=64)  # one device: jobs come one after another
    return page


class _DrawTab:
    def __init__(self, studio: Studio, allowed: AllowedFolders, session: gr.State, begin: PictureSettings) -> None:
        self.studio, self.allowed, self.session, self.first = studio, allowed, session, begin
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self._inputs()
            with gr.Column(scale=4, min_width=320):
                self._outputs()
        self.edit_inputs = [session, *[one for row in self.rows for one in row[1:6]]]
        self.row_outputs = [one for row in self.rows for one in row] + [self.refused]
        self.colours = [self.prompt_shown, self.to_canvas]
        self.told_fields = [
            *(self.base, self.prompt, self.negative, self.composition, self.options, self.gates),
            *(self.width, self.height, self.steps, self.guidance, self.scheduler, self.seed, self.count),
        ]
        self._wire()

    # --- layout ---------------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        self.base = gr.Textbox(
            label="Base", info="toybox, a folder, a .safetensors file or a Hub id", elem_id="mole-base"
        )
        self.dropped = gr.File(
            label="Drop LoRA files here",
            file_count="multiple",
            file_types=[".safetensors"],
            height=130,
            elem_id="mole-drop",
        )
        self.subject = gr.Dropdown(toybox.subjects(), value=None, label="Or add a subject of the toybox")
        self.refused = gr.HTML("", elem_classes="mole-maybe")
        self.rows: list[list[Any]] = []
        for number in range(form.MOST_LORAS):
            with gr.Group(visible=False) as group:
                with gr.Row(elem_classes="mole-row"):
                    on = gr.Checkbox(True, label=f"LoRA {number + 1}", min_width=95, scale=1)
                    name = gr.Textbox(label=f"Name {number + 1}", min_width=90, scale=2)
                    weight = gr.Number(1.0, label=f"Weight {number + 1}", step=0.05, min_width=95, scale=1)
                    trigger = gr.Textbox(label=f"Trigger {number + 1}", min_width=110, scale=2)
                    role = gr.Dropdown(list(ROLES), value="subject", label=f"Role {number + 1}", min_width=130)
                verdict = gr.HTML("")
            self.rows.append([group, on, name, weight, trigger, role, verdict])
        with gr.Row():
            self.clear_off = gr.Button("Take away those that are off", size="sm", min_width=140)
            self.clear = gr.Button("Take all LoRAs away", size="sm", min_width=140)
        self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="mole-prompt")
        self.prompt_shown = gr.HTML("", elem_classes="mole-maybe")
        self.negative = gr.Textbox("", label="Negative prompt")
        with gr.Row():
            names = [form.BY_ITSELF, *COMPOSITIONS]
            self.composition = gr.Dropdown(names, value=form.BY_ITSELF, label="Composition", min_width=140)
            self.options = gr.Textbox("", label="Options of the composition", min_width=180)
        self.gates = gr.Textbox("", label="Gates", info="folder or Hub id of gates trained for these LoRAs, in order")
        with gr.Row():
            self.steps = gr.Number(label="Steps", precision=0, minimum=1, min_width=90)
            self.guidance = gr.Number(label="Guidance scale", step=0.5, min_width=90)
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
            self.count = gr.Number(1, label="Seeds side by side", precision=0, minimum=1, min_width=90)
        with gr.Accordion("Size and scheduler", open=False):
            with gr.Row():
                self.width = gr.Number(None, label="Width", precision=0, min_width=90)
                self.height = gr.Number(None, label="Height", precision=0, min_width=90)
                self.scheduler = gr.Textbox("", label="Scheduler", placeholder="the base's", min_width=160)
        self.restored = gr.File(
            label="Drop a picture of mole to restore its settings",
            file_types=[".png"],
            height=130,
            elem_id="mole-restore",
        )

    def _outputs(self) -> None:
        with gr.Column(elem_id="mole-bar"):  # on a phone it stays in sight
            with gr.Row():
                self.draw = gr.Button("Draw", variant="primary", elem_id="mole-draw", min_width=80)
                self.compare = gr.Button("Compare", elem_id="mole-compare", min_width=80)
                self.cancel = gr.Button("Cancel", variant="stop", elem_id="mole-cancel", min_width=80)
            self.status = gr.HTML("", elem_id="mole-status", elem_classes="mole-maybe")
        self.preview = gr.Image(label="Preview", visible=False, interactive=False, buttons=[])
        self.gallery = gr.Gallery(
            label="Pictures", columns=2, format="png", elem_id="mole-gallery", object_fit="contain"
        )
        gr.Markdown("### Regions\nBox or paint where a LoRA belongs; the others are found.")
        gr.HTML((STATIC / "canvas.html").read_text(encoding="utf-8"))
        self.drawn_regions = gr.Textbox("", elem_id="mole-drawn", elem_classes="mole-hidden", label="Drawn regions")
        self.to_canvas = gr.Textbox("", elem_classes="mole-hidden", label="To the canvas")
        self.edit_masks = gr.Button("Edit the masks of the latest picture", size="sm", elem_id="mole-edit-masks")
        with gr.Accordion("Masks: which LoRA acted where", open=True):
            self.masks = gr.Gallery(
                label="Masks over the pictures", columns=2, object_fit="contain", elem_id="mole-masks"
            )
        with gr.Accordion("Each alone, sum, this", open=False) as self.compared:
            self.sheet = gr.Image(label="Comparison", interactive=False, type="filepath")
        with gr.Accordion("Gates by layer and step", open=False):
            self.gate_pictures = gr.Gallery(label="Gate weights", columns=1, object_fit="contain")
        with gr.Accordion("How this picture was made", open=False):
            self.python = gr.Code(label="Python", language="python", elem_id="mole-python")
            self.command = gr.Code(label="Command line", language="shell", elem_id="mole-command")
            self.settings = gr.Code(label="Settings", language="json")
        with gr.Accordion("A Space of this picture", open=False):
            gr.Markdown("A folder to upload with `hf upload`: this page, beginning with that picture's settings.")
            self.space = gr.Textbox("my-space", label="Folder for the Space", elem_id="mole-space")
            self.make_space = gr.Button("Make the Space", size="sm", elem_id="mole-make-space")
            self.space_said = gr.HTML("", elem_classes="mole-maybe")

    def _wire(self) -> None:
        shown = [*self.row_outputs, *self.colours]
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        self.to_canvas.change(None, self.to_canvas, None, js="(text) => window.moleCanvas.show(text)")
        self.dropped.upload(self._drop, [*self.edit_inputs, self.prompt, self.dropped], [self.dropped, *shown], **quick)
        self.subject.input(self._add, [*self.edit_inputs, self.prompt, self.subject], [self.subject, *shown], **quick)
        self.clear.click(self._clear, [self.session, self.prompt], shown, **quick)
        self.clear_off.click(self._clear_off, [*self.edit_inputs, self.prompt], shown, **quick)
        typed = {**quick, "trigger_mode": "always_last"}  # else what is typed while one answer is awaited is lost
        for row in self.rows:
            for one in (row[1], row[2], row[4]):
                one.input(self._recolour, [*self.edit_inputs, self.prompt], self.colours, **typed)
        self.prompt.input(self._recolour, [*self.edit_inputs, self.prompt], self.colours, **typed)
        # Not `change`, which a restored picture sets off too: its options would go.
        self.composition.input(_hint, self.composition, self.options, **quick)
        fields = [*self.told_fields, self.drawn_regions]
        told = [self.python, self.command, self.settings]
        results = [self.status, self.preview, self.gallery, self.masks, self.gate_pictures, *told]
        self.draw.click(None, None, None, js="() => window.moleCanvas.lookAtPictures()")
        asked = self.draw.click(self._ask, self.session, self.status, **quick)
        asked.then(self._draw, [*self.edit_inputs, *fields], results, show_progress="hidden", concurrency_id="device")
        asked = self.compare.click(self._ask, self.session, self.status, **quick)
        asked.then(
            self._compare,
            [*self.edit_inputs, *fields],
            [self.status, self.preview, self.sheet, self.compared],
            show_progress="hidden",
            concurrency_id="device",
        )
        self.cancel.click(self._cancel, self.session, None, **quick)
        self.gallery.select(self._select, self.session, told, **quick)
        self.edit_masks.click(self._edit_masks, self.session, [self.to_canvas, self.status], **quick)
        self.restored.upload(
            self._restore,
            [self.session, self.restored],
            [self.status, self.restored, *self.told_fields, *shown],
            **quick,
        )
        self.make_space.click(self._make_space, [self.session, self.space], self.space_said, **quick)

    # --- answers --------------------------------------------------------------------------------------------------

    def begin(self) -> list[Any]:
        """A new visitor's page."""
        session = Session()
        session.take(self.first.loras)
        return [session, *self._told(session, self.first)]

    def _drop(self, session: Session, *rest: Any) -> list[Any]:
        *fields, prompt, files = rest
        _edit_quietly(session, fields)
        session.drop(files or [])
        return [None, *self._shown(session, prompt)]

    def _add(self, session: Session, *rest: Any) -> list[Any]:
        *fields, prompt, subject = rest
        _edit_quietly(session, fields)
        session.drop([f"toybox:{subject}"] if subject else [])
        return [None, *self._shown(session, prompt)]

    def _clear(self, session: Session, prompt: str) -> list[Any]:
        session.rows, session.refused = [], []
        return self._shown(session, prompt)

    def _clear_off(self, session: Session, *rest: Any) -> list[Any]:
        *fields, prompt = rest
        _edit_quietly(session, fields)
        session.rows = [row for row in session.rows if row.lora.on]
        return self._shown(session, prompt)

    def _recolour(self, session: Session, *rest: Any) -> list[Any]:
        *fields, prompt = rest
        _edit_quietly(session, fields)
        return self._colours(session, prompt)

    def _ask(self, session: Session) -> str:
        session.ask()
        return said.done("Waiting for the device …")

    def _cancel(self, session: Session) -> None:
        session.ticket.cancel()

    def _read(self, session: Session, rest: tuple[Any, ...]) -> list[Any]:
        rows, fields = rest[: FIELDS * form.MOST_LORAS], rest[FIELDS * form.MOST_LORAS :]
        session.edit(rows)
        base, *others = fields
        given = form.PageFields(base, session.loras, *others)
        return form.read(given, self.allowed)

    def _draw(self, session: Session, *rest: Any) -> Iterator[list[Any]]:
        nothing: list[Any] = [gr.skip()] * 6
        try:
            wanted = self._read(session, rest)
            for now in session.draw(self.studio, wanted):
                preview = gr.skip() if now.preview is None else gr.update(value=now.preview, visible=True)
                yield [said.progress(now), preview, *nothing]
        except (MoLEError, Cancelled) as error:
            yield [said.wrong(error), gr.update(value=None, visible=False), *nothing]
            return
        masks = [own.masks.overlay([own.picture])[0] for own in session.drawn if own.masks is not None]
        pictures = [
            (str(file), f"seed {own.settings.seed}") for file, own in zip(session.files, session.drawn, strict=True)
        ]
        gates = [str(path) for path in session.gates(0)]
        count = f"{len(pictures)} pictures are" if len(pictures) > 1 else "The picture is"
        yield [
            *(said.done(f"{count} ready."), gr.update(value=None, visible=False), pictures, masks, gates),
            *session.told(0),
        ]

    def _compare(self, session: Session, *rest: Any) -> Iterator[list[Any]]:
        try:
            settings = self._read(session, rest)[0]
            path = session.place("comparison.png")
            for now in session.compare(self.studio, settings, path):
                preview = gr.skip() if now.preview is None else gr.update(value=now.preview, visible=True)
                yield [said.progress(now), preview, gr.skip(), gr.skip()]
        except (MoLEError, Cancelled) as error:
            yield [said.wrong(error), gr.update(value=None, visible=False), gr.skip(), gr.skip()]
            return
        ready = said.done("The comparison is ready.")
        yield [ready, gr.update(value=None, visible=False), str(path), gr.update(open=True)]

    def _select(self, session: Session, chosen: gr.SelectData) -> list[Any]:
        return list(session.told(chosen.index))

    def _edit_masks(self, session: Session) -> list[Any]:
        masks = session.drawn[0].masks if session.drawn else None
        if masks is None:
            error = MoLEError("there are no masks yet. Draw with several LoRAs and a composition that finds them.")
            return [gr.skip(), said.wrong(error)]
        return [drawn_regions.show(list(masks.names), masks=masks, picture=session.drawn[0].picture), gr.skip()]

    def _restore(self, session: Session, file: str) -> list[Any]:
        try:
            own = session.restore(file, self.allowed)
        except MoLEError as error:
            nothing = [gr.skip()] * len([*self.told_fields, *self.row_outputs, *self.colours])
            return [said.wrong(error), None, *nothing]
        return [said.done("The settings of that picture are restored."), None, *self._told(session, own)]

    def _make_space(self, session: Session, folder: str) -> str:
        try:
            return said.done(f"The Space lies in {session.space(self.allowed.below(folder))}.")
        except MoLEError as error:
            return said.wrong(error)

    # --- what fields and rows show --------------------------------------------------------------------------------

    def _told(self, session: Session, own: PictureSettings) -> list[Any]:
        """Settings in every field, in the order of `told_fields`, `row_outputs` and `colours`."""
        coloured_prompt, _ = self._colours(session, own.prompt)
        return [
            *(own.base, own.prompt, own.negative_prompt or "", own.composition or form.BY_ITSELF),
            *(form.write_options(dict(own.composition_options)), own.gates or ""),
            *(own.width, own.height, own.steps, own.guidance_scale, own.scheduler or "", own.seed + own.index, 1),
            *self._rows(session),
            *(coloured_prompt, drawn_regions.show([row.lora.name for row in session.rows], own)),
        ]

    def _shown(self, session: Session, prompt: str) -> list[Any]:
        return [*self._rows(session), *self._colours(session, prompt)]

    def _rows(self, session: Session) -> list[Any]:
        found: list[Any] = []
        for number in range(form.MOST_LORAS):
            if number >= len(session.rows):
                found += [gr.update(visible=False), *[gr.skip()] * FIELDS, ""]
                continue
            lora, line = session.rows[number].lora, session.rows[number].line
            dot = f'<span class="mole-dot" style="background:{css_colour(number)}"></span>'
            verdict = f'<p class="mole-verdict">{dot}{html.escape(line)}</p>'
            own = [lora.on, lora.name, lora.strength, ", ".join(lora.triggers), lora.role]
            found += [gr.update(visible=True), *own, verdict]
        lines = "".join(f'<p class="mole-verdict" role="alert">{html.escape(line)}</p>' for line in session.refused)
        return [*found, lines]

    def _colours(self, session: Session, prompt: str) -> list[Any]:
        triggers = {lora.name: lora.triggers or (lora.name,) for lora in session.loras if lora.on}
        # A LoRA keeps its colour when another is switched off.
        every = {lora.name: triggers.get(lora.name, ()) for lora in session.loras}
        return [coloured(prompt[: form.LONGEST_PROMPT], every), drawn_regions.show(list(every))]


def _edit_quietly(session: Session, fields: list[Any]) -> None:
    """What is half typed is no mistake yet; `Draw` says it."""
    try:
        session.edit(fields)
    except MoLEError:
        return


def _hint(name: str) -> Any:
    if name == form.BY_ITSELF:
        return gr.update(value="", placeholder="")
    known = options(name)
    summary = (inspect.getdoc(COMPOSITIONS[name]) or "").splitlines()[0]
    return gr.update(value="", placeholder=form.write_options(known) or "none", info=summary)
