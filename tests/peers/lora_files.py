"""The table of layouts and families in `docs/files.md`: what this package, diffusers and PEFT make of the same files.

Made files of tiny random models, two modules each, from known factors; with an alpha where such programs write one. A
file is `yes` where the denoiser's output is that of the merged weights, `wrong` where it is another, `nothing` where it
is the base's, `error` where loading raises.

Run from the repository: `python -m tests.peers.lora_files` writes the table into the page.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from mole_diffusion.lora import load_lora
from tests import ROOT
from tests.lora.test_families import FAMILIES, LAYOUTS, Parts, caller, cases, written
from tests.running import summed
from tests.tiny import dits, families, tiny_pipeline

PAGE = ROOT / "docs" / "files.md"
BEGIN, END = "<!-- table: python -m tests.peers.lora_files -->\n", "<!-- end of the table -->\n"
TITLES = {
    "stable_diffusion": "SD 1.x", "stable_diffusion_xl": "SDXL", "stable_diffusion_3": "SD 3.5", "flux": "FLUX.1",
    "flux2": "FLUX.2", "z_image": "Z-Image", "krea2": "Krea 2", "qwen_image": "Qwen-Image",
}  # fmt: skip
# Layouts with plain LoRA and alpha, then other kinds as they are usually written.
# Of FLUX.1's `linear1` diffusers' reader knows the size in the published model only.
FLUX = {
    "double_blocks.0.img_attn.qkv": tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"),
    "single_blocks.0.linear2": ("single_transformer_blocks.0.proj_out",),
}
NO_ALPHA = ("diffusers", "PEFT", "DiffSynth", "ComfyUI, ai-toolkit", "bare names of the authors")
ROWS: list[tuple[str, str, str]] = [(layout, "LoRA", layout) for layout in LAYOUTS]
ROWS += [
    ("LoHa, kohya", "LoHa", "kohya, musubi"),
    ("LoKr, LyCORIS", "LoKr", "LyCORIS"),
    ("LoKr, ai-toolkit", "LoKr", "ComfyUI, ai-toolkit"),
    ("DoRA, kohya", "DoRA", "kohya, musubi"),
    ("DoRA, OneTrainer", "DoRA", "OneTrainer"),
    ("full difference, kohya", "full", "kohya, musubi"),
]


def pipeline(family: str) -> Any:
    """A stock pipeline with a tiny model."""
    if family == "stable_diffusion":
        return tiny_pipeline()
    if family == "stable_diffusion_xl":
        return diffusers.StableDiffusionXLPipeline(**families.sdxl())
    if family == "stable_diffusion_3":
        return diffusers.StableDiffusion3Pipeline(**families.sd3())
    return dits.tiny_dit(family)


def made(family: str, kind: str, layout: str, component: str, model: Any) -> tuple[Parts, dict[str, Tensor]]:
    """A file, and the change of every weight that it tells of."""
    authors = LAYOUTS[layout][0]
    state: Parts = {}
    changes: dict[str, Tensor] = {}
    torch.manual_seed(1)
    for name, meant, parts, change in cases(model, family, kind, authors):
        if kind == "LoRA" and layout in NO_ALPHA:  # as such programs write them: alpha is in the header, or the rank
            change = change / float(parts.pop("alpha")) * 2
        state |= {key: tensor.contiguous() for key, tensor in written(layout, component, name, parts).items()}
        sizes = [model.get_submodule(module).weight.shape[0] for module in meant]
        changes |= dict(zip(meant, change.float().split(sizes), strict=True))
    return state, changes


@contextlib.contextmanager
def merged(model: Any, changes: dict[str, Tensor]) -> Iterator[None]:
    """The model with the changes in its own weights."""
    kept = {name: model.get_submodule(name).weight.detach().clone() for name in changes}
    with torch.no_grad():
        for name, change in changes.items():
            model.get_submodule(name).weight += change
        try:
            yield
        finally:
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(weight)


def ours(state: Parts, component: str, model: Any, run: Callable[[], Tensor]) -> Tensor:
    with summed({component: model}, load_lora(state, {component: model})):
        return run()


def of_diffusers(family: str, file: Path, component: str) -> Tensor:
    pipe = pipeline(family)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return caller(family, getattr(pipe, component))()


def of_peft(family: str, file: Path, state: Parts, component: str, modules: list[str]) -> Tensor:
    from peft import PeftModel

    alphas = {float(value) for key, value in state.items() if key.endswith(".alpha")}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alphas.pop() if alphas else 2, "target_modules": modules}
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    tensors = {key: value for key, value in state.items() if not key.endswith(".alpha")}
    save_file(tensors, file.parent / "adapter_model.safetensors")
    model = getattr(pipeline(family), component)
    PeftModel.from_pretrained(model, file.parent)  # hangs its layers into the model itself
    return caller(family, model.eval())()


def outcome(run: Callable[[], Tensor], base: Tensor, wanted: Tensor) -> str:
    try:
        output = run()
    except Exception:  # whatever a library falls over is an error of its reader
        return "error"
    if torch.allclose(output, wanted, atol=1e-4, rtol=1e-3):
        return "yes"
    return "nothing" if torch.allclose(output, base, atol=1e-6) else "wrong"


@torch.no_grad()
def table() -> str:
    """The table in Markdown, a cell for each layout and family: here / diffusers / PEFT."""
    cells: dict[tuple[str, str], str] = {}
    for family in FAMILIES:
        pipe = pipeline(family)
        component = "unet" if hasattr(pipe, "unet") else "transformer"
        model = getattr(pipe, component)
        run = caller(family, model)
        base = run()
        for title, kind, layout in ROWS:
            state, changes = made(family, kind, layout, component, model)
            with merged(model, changes):
                wanted = run()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "it.safetensors"
                save_file(state, file)
                found = [outcome(lambda: ours(state, component, model, run), base, wanted)]  # noqa: B023
                found.append(outcome(lambda: of_diffusers(family, file, component), base, wanted))  # noqa: B023
                if kind == "LoRA" and layout == "PEFT":
                    modules = list(changes)
                    found.append(outcome(lambda: of_peft(family, file, state, component, modules), base, wanted))  # noqa: B023
            cells[title, family] = " / ".join(found)
            print(f"{family}: {title}: {cells[title, family]}", flush=True)
    lines = ["| file | " + " | ".join(TITLES[family] for family in FAMILIES) + " |", "|---" * (1 + len(FAMILIES)) + "|"]
    lines += [f"| {title} | " + " | ".join(cells[title, family] for family in FAMILIES) + " |" for title, _, _ in ROWS]
    return "\n".join(lines) + "\n"


def main() -> None:
    FAMILIES["flux"] = FLUX
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
