"""`mole app`: the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .inputs import Device


def app_page(
    folder: Annotated[
        list[Path] | None,
        typer.Option(help="Folder whose models and gates the page may read; several times for several [default: .]."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 shows the page to the whole network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="[default: the first free one from 7860]")] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; auto is bfloat16 on a GPU that has it, else float32.")
    ] = "auto",
    browser: Annotated[bool, typer.Option(help="Open it in the browser.")] = True,
) -> None:
    """Open a page to play on: drop LoRAs, paint where they belong, draw, compare, train gates.

    It can be seen from this computer only, and reads models from the folders given only. Needs gradio:
    pip install 'mole-diffusion[app]'.

    Examples:

    \b
      mole app
      mole app --folder ./models --folder ./loras --port 8000 --no-browser
    """
    from mole_diffusion.app.serve import serve

    page = serve(folder or ["."], host=host, port=port, device=device, dtype=dtype, open_browser=browser, wait=False)
    typer.echo(f"The page is at {page.local_url} and Ctrl-C ends it.", err=True)
    page.block_thread()
