"""Which denoising step a forward pass belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mole_diffusion.errors import MoLEError

from ..experts import Run
from ..families import FAMILIES
from .call import Call, current_call

ROUNDING = 1e-5  # of fp32, where a timestep was divided and multiplied again


@dataclass(frozen=True)
class Step:
    """Where in the denoising the model is called.

    Args:
        timestep: The timestep the denoiser was given, a number or a tensor of one or more (equal) entries.
        timesteps: All timesteps of this sampling run, in the order in which they come.
        order: How often the scheduler evaluates the denoiser for a step (diffusers' `scheduler.order`). By default
            that of the running call's scheduler where the timesteps are its, else 1.
    """

    timestep: Tensor | float
    timesteps: Sequence[float] | Tensor
    order: int | None = None

    @property
    def index(self) -> int:
        """Position of this step, from 0. The evaluations of a second-order scheduler stay in the same step.

        Steps are told apart by their timesteps and not by counting calls, because a pipeline may call its denoiser
        several times in a step, or enter the schedule in the middle (image to image).

        Raises:
            MoLEError: The timestep is none of this run's.
        """
        now, places = _first(self.timestep), self._places
        if now not in places:
            raise MoLEError(
                f"the denoiser was called at timestep {now:g}, which is none of the {self.total} steps of the "
                "pipeline's scheduler. A pipeline with a scheduler of its own draws with LoRAs inside "
                "`with pipe.composing(scheduler=its.scheduler):`."
            )
        return places[now]

    @property
    def total(self) -> int:
        """Number of steps."""
        return len(set(self._places.values()))

    @property
    def _places(self) -> dict[float, int]:
        values = _floats(self.timesteps)
        order = self._order()
        if order == 1:  # one timestep a step; some schedulers visit it twice
            between, places, index = self._between(), {}, 0
            for timestep in dict.fromkeys(values):
                places[timestep] = index
                index += timestep not in between
            return places
        # First t_0, then for every further step the point on the way to it (KDPM2) or itself (Heun), and itself.
        return {timestep: (index + order - 1) // order for index, timestep in enumerate(values)}

    def _order(self) -> int:
        return int(getattr(self._scheduler(), "order", 1)) if self.order is None else self.order

    def _between(self) -> set[float]:
        """The points halfway to a step's end, at which PNDM's first three steps (Runge-Kutta's) look twice each."""
        given = getattr(self._scheduler(), "prk_timesteps", None)
        visits = [] if given is None else _floats(given)  # of each step its begin, halfway, halfway, its end
        return set(visits[1::4]) - set(visits[::4]) - set(visits[3::4])

    def _scheduler(self) -> Any:
        """That of the running call, where the timesteps are its."""
        call = current_call()
        scheduler = None if call is None else call.scheduler
        return scheduler if getattr(scheduler, "timesteps", None) is self.timesteps else None


def step_of(run: Run) -> Step:
    """The denoising step that a forward pass of the denoiser belongs to; a model outside of any pipeline has one step.

    A scheduler that counts is asked where it stands: what transformers of flow matching are told is another number than
    the scheduler's, and rounded to the precision of the latents, so that neighbouring steps may look the same.
    """
    if "step" not in run.notes:
        assert run.timestep is not None
        if isinstance(run.call, Call):
            timesteps = run.call.timesteps
            now = _counted(run.call.scheduler)
            run.notes["step"] = Step(_nearest(_first(run.timestep), timesteps) if now is None else now, timesteps)
        else:
            run.notes["step"] = Step(run.timestep, [_first(run.timestep)])
    step: Step = run.notes["step"]
    return step


def refuse_untold(run: Run, method: str) -> None:
    """Raises MoLEError in a denoiser that runs without a forward pass of its own, which would tell the step."""
    if run.component in {family.denoiser for family in FAMILIES}:
        raise MoLEError(
            f"composition {method!r} needs to know the step, and modules of the {run.component} run without a call of "
            f"it that tells: `{run.component}.forward(...)`, say, is none. Call `{run.component}(...)`, or take a "
            'composition of weights that stay: `set_composition("linear")`.'
        )


def _nearest(now: float, timesteps: Sequence[float] | Tensor) -> float:
    """The one of the timesteps that a number is but for rounding, if any."""
    values = _floats(timesteps)
    if now in values:
        return now
    nearest = min(values, key=lambda timestep: abs(timestep - now), default=now)
    return nearest if abs(nearest - now) <= ROUNDING * abs(now) else now


def _counted(scheduler: Any) -> float | None:
    """The timestep that a scheduler is at; `None` where it does not count, or was not told where it begins."""
    index = getattr(scheduler, "step_index", None)
    index = getattr(scheduler, "begin_index", None) if index is None else index
    timesteps = getattr(scheduler, "timesteps", ())
    return None if index is None or index >= len(timesteps) else float(timesteps[index])


def _floats(timesteps: Sequence[float] | Tensor) -> list[float]:
    return [float(timestep) for timestep in (timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps)]


def _first(timestep: Tensor | float) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
