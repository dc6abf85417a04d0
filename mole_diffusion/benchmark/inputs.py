"""What the rows of a benchmark depend on, by content: files count by their bytes, not by their paths."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from mole_diffusion.benchmark.concepts import ConceptFiles, lora_file, reference_files
from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.gates import gates_folder
from mole_diffusion.errors import MoLEError
from mole_diffusion.files import sha256

SHA256, LORAS, METHODS = "sha256", "LoRA files", "methods"
_BY_HASH = ("base", "clip", "gates", "image_encoder")
_NOT_IN_ROWS = ("name", "compositions", "concepts", "keep", "reference", "paper", *_BY_HASH)
"""What rows do not depend on, what they are named after, and what counts by its bytes instead."""
_MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model", ".pt")


def made_of(config: BenchmarkConfig) -> dict[str, Any]:
    """Everything that the rows of a benchmark depend on, without a path: files stand there by their SHA-256.

    A hash is `None` where nothing lies here yet: a model that comes from the Hub, gates that are missing.

    Raises:
        MoLEError: A LoRA or the pictures of a concept are not there.
    """
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_IN_ROWS}
    hashes = {
        "base": _source_hash(config.base, "base_dir", "model_index.json"),
        "CLIP": _source_hash(config.clip, "clip_dir", "open_clip_config.json"),
        "image encoder": None
        if config.image_encoder is None
        else _source_hash(config.image_encoder, "", "config.json"),
    }
    return settings | {
        METHODS: {method.label: dataclasses.asdict(method) for method in config.methods},
        LORAS: {name: _concept(config, name) for name in config.used},
        SHA256: hashes | _gates(config),
    }


def shown(source: str) -> str:
    """The name of a base or a CLIP without the folder it lies in, for reports that others read."""
    return without_paths(str(Path(source).absolute())) if Path(source).exists() else without_paths(source)


def without_paths(text: str) -> str:
    """A text with only the last part of every absolute path in it, which may hold the name of a user."""
    return re.sub(
        r"""(?<![\w/.:~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:'"`<>|,;()]+[/\\])*([^\s/\\:'"`<>|,;()]*)""", r"\1", text
    )


def _concept(config: BenchmarkConfig, name: str) -> dict[str, Any]:
    concept = config.concepts[name]
    return {
        "phrase": concept.phrase,
        "description": concept.description,
        "sha256": sha256(lora_file(name, concept)),
        "references sha256": _references_hash(name, concept),
    }


def _references_hash(name: str, concept: ConceptFiles) -> str:
    digest = hashlib.sha256()
    if concept.references == "toybox":
        from mole_diffusion import toybox

        for picture in toybox.references(name):
            digest.update(picture.tobytes())
    for file in reference_files(name, concept):
        digest.update(sha256(file).encode())
    return digest.hexdigest()


def _gates(config: BenchmarkConfig) -> dict[str, str | None]:
    """The hash of gates that are read; gates that are trained follow from the other inputs."""
    found: dict[str, str | None] = {}
    for method in config.methods:
        if method.training is None and "gates" in method.build().needs:
            for names in config.compositions:
                composition = "+".join(names)
                try:
                    folder = gates_folder(config, Path(), composition, method)
                except ValueError:  # the toybox ships none for this composition, and the rows will say so
                    continue
                found[f"gates of {composition}"] = folder_hash(folder) if folder.is_dir() else None
    return found


def _source_hash(source: str, of_toybox: str, file: str) -> str | None:
    """Of a model: a folder or file here, the toybox's, one of the Hub that was loaded before, or a name for weights."""
    if source == "toybox":
        from mole_diffusion import toybox

        return folder_hash(getattr(toybox, of_toybox)())
    path = Path(source.removeprefix("local-dir:"))
    if path.is_dir():
        return folder_hash(path)
    if path.is_file():
        return sha256(path)
    _, _, weights = source.partition(":")
    if weights:
        return sha256(weights) if Path(weights).is_file() else source
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, file) if source.count("/") == 1 else None
    return folder_hash(Path(cached).parent) if isinstance(cached, str) else None


def folder_hash(folder: Path) -> str:
    """SHA-256 over the files of a model's folder: names and bytes, of a pipeline's those of its parts."""
    index, parts = folder / "model_index.json", [folder]
    if index.is_file():
        try:
            parts = [folder / name for name, value in json.loads(index.read_bytes()).items() if isinstance(value, list)]
        except (ValueError, AttributeError) as error:
            raise MoLEError(f"{index} is damaged: {error}. Get the model again.") from None
    files = [file for part in parts if part.is_dir() for file in part.rglob("*")]
    names = {
        file.relative_to(folder).as_posix(): file
        for file in [*files, *([index] if index.is_file() else [])]
        if file.is_file() and file.suffix in _MODEL_FILES and not file.name.startswith(".")
    }
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{sha256(names[name])}\0".encode())
    return digest.hexdigest()
