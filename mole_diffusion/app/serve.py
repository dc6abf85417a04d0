"""Starting the page, closed to others by default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..drawing.settings import PictureSettings
from ..errors import MoLEError
from ..extras import needs
from .allowed_folders import AllowedFolders
from .studio import Studio

LOOPBACK = "127.0.0.1"
OWN_NAMES = ["127.0.0.1", "localhost", "[::1]"]
LARGEST_UPLOAD = "2gb"

# What gradio writes in pale grey and on bright orange has too little contrast to read: WCAG asks for 4.5 to 1.
READABLE = {
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "input_placeholder_color": "*neutral_600",
    "input_placeholder_color_dark": "*neutral_300",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "button_cancel_background_fill": "#b91c1c",
    "button_cancel_background_fill_dark": "#b91c1c",
}


def serve(
    folders: Sequence[str | Path] = (".",),
    *,
    host: str = LOOPBACK,
    port: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    open_browser: bool = False,
    wait: bool = True,
    begin: PictureSettings | None = None,
) -> Any:
    """Starts the page.

    Args:
        folders: What lies below these may be named as base, gates or LoRA.
        host: Which network may see it; by default this computer alone.
        port: By default the first that is free from 7860 on.
        device, dtype: As `mole generate` takes them.
        open_browser: Show it at once.
        begin: What the page shows to a new visitor; by default two subjects of the toybox.
        wait: Until the process is interrupted; else return.

    Returns:
        gradio's `Blocks`; `local_url` is its address.

    Raises:
        MoLEError: gradio is missing, a folder is, or the port is taken.
    """
    with needs("app", "the page"):
        import gradio
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .page import BEGIN, STATIC, build

    page = build(Studio(device, dtype), AllowedFolders(folders), begin or BEGIN)
    # A page of somebody else's can have its name lead to this computer, and would be let in by it.
    trusted = [Middleware(TrustedHostMiddleware, allowed_hosts=OWN_NAMES)] if host in (*OWN_NAMES, "::1") else []
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    script = (STATIC / "canvas.js").read_text(encoding="utf-8")
    try:
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            prevent_thread_lock=not wait,
            quiet=True,
            max_file_size=LARGEST_UPLOAD,
            footer_links=[],
            ssr_mode=False,
            theme=gradio.themes.Default(**fonts).set(**READABLE),
            css=(STATIC / "page.css").read_text(encoding="utf-8"),
            head=f"<script>{script}</script>",
            enable_monitoring=False,
            _frontend=False,  # else gradio asks the page, through any proxy, and gives up after three seconds
            app_kwargs={"middleware": trusted},
        )
    except OSError as error:
        raise MoLEError(f"the page cannot be served on {host}: {error}. Choose another --port or --host.") from None
    return page
