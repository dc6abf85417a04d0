"""`mole inspect`: what is in LoRA files, and what would act."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..drawing.opening import find_base

if TYPE_CHECKING:
    from mole_diffusion.lora import LoRAReport, Verdict


def inspect(
    files: Annotated[list[Path], typer.Argument(help="LoRAs, .safetensors.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model to hold them against: a folder, a name on the Hub or `toybox`. Then energies too."
        ),
    ] = None,
) -> None:
    """Say what is in LoRA files, for which base model they are, and what of them would act on it.

    Without --base, names and sizes are held against the published base models, without their weights.

    Examples:

    \b
      mole inspect cat.safetensors boot.safetensors
      mole inspect cat.safetensors --base ./my-model
    """
    if base is not None:
        find_base(base)
    from rich.console import Console

    from mole_diffusion.errors import MoLEError
    from mole_diffusion.lora import fitting, inspect_lora, judge

    models = None if base is None else read_models(base)
    console = Console(markup=False, highlight=False)
    refused: list[MoLEError] = []
    for file in files:
        try:
            report = inspect_lora(file)
            verdicts = fitting(file) if models is None else [judge(file, models, str(base))]
        except MoLEError as error:
            if len(files) == 1:
                raise
            refused.append(error)
            typer.echo(f"mole: {error}", err=True)
            continue
        console.print(_table(report, verdicts, models is not None))
    if refused:
        raise MoLEError(f"{len(refused)} of {len(files)} files cannot be read; see above. The others are shown.")


def _table(report: LoRAReport, verdicts: list[Verdict], with_base: bool) -> Any:
    from rich.table import Table

    from mole_diffusion.errors import printable

    ranks = [f"{rank} ({_counted(count)})" for rank, count in report.ranks.items()]
    # A file's name may hold anything, escape sequences of terminals too.
    # Without edges a hash has room in a line of 80 columns; in a narrower terminal it goes on in the next.
    table = Table(title=printable(report.source), show_header=False, title_justify="left", show_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("layout", report.layout)
    table.add_row("written by", report.trainer)
    fits = [verdict for verdict in verdicts if verdict.refusal is None]
    table.add_row("made for", " or ".join(verdict.base for verdict in fits if not with_base) or report.family)
    table.add_row("modules", ", ".join(f"{count} in {_called(name, fits)}" for name, count in report.modules.items()))
    table.add_row("kinds", _few([f"{kind} ({_counted(count)})" for kind, count in report.kinds.items()]))
    table.add_row("ranks", _few(ranks) or "none")
    table.add_row("alphas", _few([f"{alpha:g}" for alpha in report.alphas]) or "none: scaling 1")
    table.add_row("scaling", _few([f"{scaling:g}" for scaling in report.scalings]))
    table.add_row(
        "called by", _few([printable(trigger) for trigger in report.triggers]) or "no words named in the file"
    )
    if report.embeddings:
        brought = [f"{printable(word)} ({count} vectors)" for word, count in report.embeddings.items()]
        table.add_row("embeddings", f"{_few(brought)}, which `load_loras` loads as textual inversion")
    table.add_row("SHA-256", report.sha256)
    for verdict in verdicts:
        table.add_row("verdict", _said(verdict, sum(report.modules.values())))
        if verdict.energy is not None:
            loudest = [f"{printable(name)} {ratio:.3g}" for name, ratio in verdict.loudest]
            table.add_row("energy", f"|ΔW| / |W| = {verdict.energy:.3g}; most at {', '.join(loudest)}")
    if not verdicts:
        table.add_row("verdict", "no published base model that is known here has these names and sizes; see --base")
    if fits:
        spikes = [f"{printable(name)} {share:.0%}" for name, share in fits[0].spikes]
        table.add_row("spikes", _few(spikes, 3) or "none: no direction has more than nine tenths of a module's change")
    return table


def _called(component: str, fits: list[Verdict]) -> str:
    """A component of the file; what files call `unet` may be a transformer, or a nameless one have a name."""
    if fits and component not in fits[0].modules and len(fits[0].modules) == 1:
        return next(iter(fits[0].modules))
    return {"unet": "the denoiser", "unstated": "a component without a name"}.get(component, component)


def _counted(count: int) -> str:
    return f"{count} module" + "s" * (count != 1)


def _said(verdict: Verdict, in_file: int) -> str:
    from mole_diffusion.errors import printable

    if verdict.refusal is not None:
        return f"refused by {printable(verdict.base)}: {verdict.refusal}"
    parts = ", ".join(f"{_counted(count)} of {component}" for component, count in verdict.modules.items())
    fused = ", fused ones taken apart" if sum(verdict.modules.values()) > in_file else ""
    return f"all of it acts on {printable(verdict.base)}: {parts}{fused}"


def read_models(base: str) -> Mapping[str, Any]:
    """The components with LoRAs of a base model.

    Raises:
        MoLEError: It cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    from mole_diffusion.families import COMPONENTS
    from mole_diffusion.loading import loading
    from mole_diffusion.pipelines.read_wrongly import refuse_random_weights

    with loading(f"the base model {base}"):
        pipe = DiffusionPipeline.from_pretrained(find_base(base), use_safetensors=True)
    refuse_random_weights(pipe.components)
    return {name: model for name, model in pipe.components.items() if name in COMPONENTS and model is not None}


def _few(words: list[str], shown: int = 8) -> str:
    return ", ".join(words[:shown]) + (f" and {len(words) - shown} more" if len(words) > shown else "")
