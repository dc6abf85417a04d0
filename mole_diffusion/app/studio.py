"""One pipeline for all visitors: jobs come one after another, tell how far they are, and can be cancelled."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..composition import RegionMap
from ..drawing.draw import draw, prepare, sized
from ..drawing.opening import find_base, find_folder, load_pipeline, pick_device, quiet_loading, read_dtype
from ..drawing.settings import PictureSettings
from ..errors import MoLEError
from .preview import Previews

if TYPE_CHECKING:
    from PIL import Image


class Cancelled(Exception):
    """The visitor cancelled the job."""


class Ticket:
    """One job of one visitor."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends the job at its next evaluation of the denoiser; one that waits never begins."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises Cancelled where it was."""
        if self._cancelled.is_set():
            raise Cancelled


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        done: The part that is done, from 0 to 1.
        left: Seconds that are left, as far as known.
        doing: In words.
        preview: The picture so far, in some of these.
    """

    done: float
    left: float | None
    doing: str
    preview: Image.Image | None = None


@dataclass(frozen=True)
class FinishedPicture:
    """A picture that is ready.

    Attributes:
        picture: The picture as the pipeline gave it.
        settings: What draws it again.
        masks: Which pixels were whose, where the method knows.
        gates: What the gates gave by place and LoRA and step, `(places, N, steps)`, with the names; where there are.
    """

    picture: Image.Image
    settings: PictureSettings
    masks: RegionMap | None = None
    gates: tuple[Any, tuple[str, ...], tuple[str, ...]] | None = None


class Studio:
    """Holds the base that was used last, and what hangs on it.

    Args:
        device, dtype: As `mole generate` takes them.

    Raises:
        MoLEError: There is no such device or number format.
    """

    def __init__(self, device: str = "auto", dtype: str = "auto") -> None:
        self.device = pick_device(device)
        self.dtype = read_dtype(dtype, self.device)
        self._lock = threading.Lock()
        self._pipe: Any = None
        self._scheduler: Any = None
        self._base: Any = None
        self._prepared: Any = None

    def draw(self, wanted: Sequence[PictureSettings], ticket: Ticket) -> Iterator[Progress | FinishedPicture]:
        """Draws one picture after another.

        Args:
            wanted: One of each; `device` and `dtype` become those of the studio.
            ticket: To cancel it. Whoever stops iterating cancels it too.

        Raises:
            MoLEError: As the pipeline.
            Cancelled: It was.
        """
        yield from _in_a_thread(lambda tell: self._draw_all(wanted, ticket, tell), ticket)

    def work(self, job: Callable[[Callable[[Any], None]], None], ticket: Ticket) -> Iterator[Any]:
        """Runs something else on the pipeline, in turn: what it tells comes out. A training does this."""

        def in_turn(tell: Callable[[Any], None]) -> None:
            with self._lock:
                ticket.check()
                job(tell)

        yield from _in_a_thread(in_turn, ticket)

    def pipe(self, settings: PictureSettings) -> Any:
        """The pipeline, prepared for these settings. Only for whoever holds the turn: inside of `work`."""
        base = (settings.base, settings.base_config)
        if self._base != base:
            self._pipe = self._base = self._prepared = None  # first, so that two never lie in memory
            config = None if settings.base_config is None else Path(settings.base_config)
            with quiet_loading():
                found = find_base(settings.base, single_file=True)
                self._pipe = load_pipeline(found, config, self.dtype).to(self.device)
            self._pipe.set_progress_bar_config(disable=True)
            self._scheduler, self._base = self._pipe.scheduler, base
        files = [_stamp(lora.path) for lora in settings.loras]
        known = [replace(lora, on=True, strength=1.0) for lora in settings.loras]
        wanted = (known, files, settings.gates, settings.composition, settings.composition_options, settings.scheduler)
        if self._prepared != wanted:
            self._prepared = None
            self._pipe.scheduler = self._scheduler
            gates = None if settings.gates is None else find_folder("gates", settings.gates, example="me/cat-and-boot")
            prepare(self._pipe, replace(settings, gates=gates))
            self._prepared = wanted
        return self._pipe

    def forget(self) -> None:
        """What was prepared is prepared anew next time, since somebody changed it."""
        self._prepared = None

    def _draw_all(self, wanted: Sequence[PictureSettings], ticket: Ticket, tell: Callable[[Any], None]) -> None:
        watch = _Watch(tell, sum(own.steps for own in wanted))
        with self._lock:
            ticket.check()
            for number, given in enumerate(wanted):
                if self._base != (given.base, given.base_config):
                    tell(Progress(0.0, None, f"opening {given.base}"))
                settings = replace(given, device=str(self.device), dtype=str(self.dtype).removeprefix("torch."))
                pipe = self.pipe(settings)
                settings = sized(pipe, settings)
                watch.begin(f" {number + 1} of {len(wanted)}" if len(wanted) > 1 else "", settings)
                denoiser = getattr(pipe, pipe.family.denoiser)
                # Asked before every evaluation: a prior pass has no steps of its own that could be called back.
                handle = denoiser.register_forward_pre_hook(lambda *_: ticket.check())
                try:
                    tell(_draw_one(pipe, settings, watch))
                finally:
                    handle.remove()


class _Watch:
    """Called after each step of a picture; tells how far all of them are."""

    def __init__(self, tell: Callable[[Any], None], total: int) -> None:
        self.tell = tell
        self.total = total
        self.done = 0
        self.started = 0.0
        self.which = ""
        self.previews = Previews()

    def begin(self, which: str, settings: PictureSettings) -> None:
        """The next picture begins."""
        self.started = self.started or time.monotonic()
        self.which, self.settings = which, settings
        self.tell(Progress(self.done / self.total, None, f"beginning{which}"))

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        self.done += 1
        now = time.monotonic()
        left = (now - self.started) / self.done * (self.total - self.done)
        preview = self.previews.next(pipe, tensors["latents"], self.settings)
        self.tell(Progress(self.done / self.total, left, f"drawing{self.which}", preview))
        return {}


def _draw_one(pipe: Any, settings: PictureSettings, after_step: Callable[..., Any]) -> FinishedPicture:
    import torch

    if settings.gates is None or settings.composition not in (None, "mole"):
        picture = draw(pipe, settings, after_step)[0]
        return FinishedPicture(picture, settings, pipe.masks)
    with pipe.gates.record(accumulate=True) as record:
        picture = draw(pipe, settings, after_step)[0]
    steps = min(len(weights) for weights in record.by_pass.values())
    weights = torch.stack(
        [torch.stack([own.mean(dim=0) for own in record.by_pass[name][-steps:]], dim=-1) for name in record.names]
    )
    absent = ~record.present()
    weights = weights.detach().float().cpu().masked_fill(absent[..., None], float("nan"))
    return FinishedPicture(picture, settings, pipe.masks, (weights, record.names, record.lora_names))


def _in_a_thread(job: Callable[[Callable[[Any], None]], None], ticket: Ticket) -> Iterator[Any]:
    told: queue.Queue[tuple[str, Any]] = queue.Queue()

    def run() -> None:
        try:
            job(lambda event: told.put(("event", event)))
        except BaseException as error:
            told.put(("error", error))
        else:
            told.put(("end", None))

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            kind, value = told.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    except GeneratorExit:  # nobody listens any more: the page was closed
        ticket.cancel()
        raise


def _stamp(path: str) -> tuple[str, int, int]:
    try:
        status = Path(path).stat()
    except OSError as error:
        raise MoLEError(f"{Path(path).name} is not there any more ({error.strerror}). Drop it again.") from None
    return path, status.st_mtime_ns, status.st_size
