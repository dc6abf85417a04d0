"""What changes the meaning of a file's factors beside the factors: PEFT's configs and entries of the header.

This is the one place that reads them, for loading and inspecting alike: a setting that is not read here and makes
the same factors act otherwise would give a wrong picture, and no error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mole_diffusion.errors import MoLEError, printable
from mole_diffusion.families import COMPONENTS
from mole_diffusion.families.names import TEXT_MODEL
from mole_diffusion.lora.errors import LoRAError, refusal
from mole_diffusion.lora.layouts.peft import is_whole
from mole_diffusion.lora.patterns import PatternError, Patterns
from mole_diffusion.lora.pieces import Piece
from mole_diffusion.lora.sources import Config, LoRAFile
from mole_diffusion.reading import parse_json

DIFFUSERS_METADATA = "lora_adapter_metadata"
QUANTISED = "_quantization_metadata"

_EXTRACT = "Merge it into its base and extract a plain LoRA from the difference by SVD, or train a plain one."
# Ways to start a training that leave the base as it is. All others move a part of the base into the factors, which
# on the whole base would count twice, or quantise it; ones that PEFT will know tomorrow may do either.
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_MOVING_STARTS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
_CONVERT_START = (
    "Where it was trained, convert it with PEFT: `model.save_pretrained(folder, "
    "path_initial_model_for_weight_conversion=initial)`, `initial` being the adapter saved before training. "
    "Or merge it into its base and extract a plain LoRA by SVD."
)
# Adapters of PEFT that are read, and what they call alpha.
_ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
# Settings of PEFT that make the factors something else than a change of weight that is read here.
_OTHER_KINDS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA (block-diagonal factors)",
    "alora_invocation_tokens": "Activated LoRA, which acts on some tokens only",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA, which changes the base",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication, which changes the base",
    "trainable_token_indices": "trainable tokens, embeddings trained beside the LoRA",
    "target_parameters": "LoRA of bare parameters",
}


@dataclass(frozen=True, eq=False)
class AdapterSettings:
    """How strongly the pieces of one component act, as a config says.

    Attributes:
        rank: The config's `r`; None where it has none.
        alpha: The config's `lora_alpha`; None where it has none.
        ranks: The config's `rank_pattern`.
        alphas: The config's `alpha_pattern`.
        rslora: Whether the scaling is `alpha / sqrt(r)`.
        dora: Whether every module has a magnitude.
    """

    rank: Any
    alpha: Any
    ranks: Patterns
    alphas: Patterns
    rslora: bool
    dora: bool


def read_adapter_settings(file: LoRAFile, layout: str) -> dict[str | None, AdapterSettings]:
    """Settings that travel with a file, by component; the key None is for whatever the file holds.

    They come from PEFT's `adapter_config.json`, or from the JSON text that diffusers writes into the safetensors
    header, whose names are `unet.r`, `unet.lora_alpha`, `text_encoder.r` and so on.

    Raises:
        LoRAError: They cannot be read, or make the file something else than plain LoRA on the whole base.
    """
    if file.metadata.get(QUANTISED):
        raise refusal(
            file.source,
            f"header entry {QUANTISED!r} says that its values are quantised, with scales of their own",
            "Save it in floating point, such as bfloat16, with the program that wrote it.",
        )
    # Where a config lies beside a file that PEFT did not name, only factors without a component can be its.
    configs: dict[str | None, Config] = {None: file.peft_config}
    if not file.peft_config or (file.config_may_be_others and layout != "peft"):
        configs = _diffusers_configs(file)
    return {component: _settings(file, config) for component, config in configs.items()}


def strength(
    file: LoRAFile, layout: str, piece: Piece, alpha: float | None, settings: AdapterSettings | None
) -> tuple[float | None, float]:
    """Alpha and scaling of a piece: `alpha / r`, `alpha / sqrt(r)` where the config says rsLoRA, 1.0 without an alpha.

    Args:
        file: The file that the piece comes from, for messages.
        layout: The layout of the file, for messages.
        piece: The piece.
        alpha: The alpha of the piece itself, which goes before the config's; None where it has none. It counts for
            nothing where no factor has a rank (LoKr of whole matrices); PEFT's config counts there too.
        settings: The settings of the piece's component.

    Raises:
        LoRAError: The config's rank is not the piece's, so that it belongs to another file, or a number is none.
    """

    def refuse(problem: str, remedy: str) -> LoRAError:
        components = [piece.component] if piece.component else []
        return refusal(file.source, problem, remedy, layout=layout, components=components, keys=[piece.key])

    stated: Any = alpha
    r = piece.r
    if settings is not None:
        if settings.dora and not piece.magnitude and piece.form and not piece.whole:
            raise refuse("its config says DoRA, and a module has no magnitudes", "Save the adapter again.")
        names = _spellings(piece.module)
        try:
            expected = settings.ranks.find(names, settings.rank)
            stated = settings.alphas.find(names, settings.alpha) if alpha is None else alpha
        except PatternError as error:
            raise refuse(f"a pattern in its config {error}", "Write names of modules instead.") from None
        if expected is not None and r is not None and expected != r:
            raise refuse(
                f"its config says rank {printable(repr(expected), 40)}, the factors have rank {r}",
                "Put the config that was saved with these weights beside them.",
            )
        if r is None and alpha is None and isinstance(expected, int) and expected > 0:
            r = expected
    if stated is None or piece.form is None or "diff" in piece.whole:
        return None, 1.0
    number = _finite(stated)
    if number is None:
        raise refuse(f"alpha {printable(repr(stated), 40)} is not a finite number", "Correct the config.")
    if r is None:
        return number, 1.0
    return number, number / (math.sqrt(r) if settings is not None and settings.rslora else r)


def _spellings(module: str) -> Sequence[str]:
    """The names that a config may have for a module: transformers once had a `text_model.` that it dropped."""
    return (module, module.removeprefix(TEXT_MODEL), TEXT_MODEL + module.removeprefix(TEXT_MODEL))


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _settings(file: LoRAFile, config: Config) -> AdapterSettings:
    kind = _refuse_other_kinds(file, config)
    patterns = {}
    for name in ("rank_pattern", "alpha_pattern"):
        try:
            patterns[name] = Patterns(config.get(name) or {})
        except PatternError as error:
            raise refusal(file.source, f"{name} in its config {error}", "Write names of modules instead.") from None
    rslora, dora = _switch(file, config, "use_rslora"), _switch(file, config, "use_dora")
    alpha = config.get(_ALPHAS[kind])
    return AdapterSettings(config.get("r"), alpha, patterns["rank_pattern"], patterns["alpha_pattern"], rslora, dora)


def _refuse_other_kinds(file: LoRAFile, config: Config) -> str:
    """PEFT's name of the adapter, if it is one that is read."""
    kind = str(config.get("peft_type") or "LORA").upper()
    if kind not in _ALPHAS:
        read = f"Of PEFT's adapters {', '.join(_ALPHAS)} are read."
        raise refusal(file.source, f"its config says {printable(kind, 60)}", f"{read} {_EXTRACT}")
    for name, what in _OTHER_KINDS.items():
        if config.get(name):
            raise refusal(file.source, f"its config says {what}", f"That is not read. {_EXTRACT}")
    trained = {
        "modules_to_save, whole modules trained beside the LoRA": (config.get("modules_to_save"), ".weight"),
        "that biases were trained": (config.get("bias") not in (None, False, "none"), ".bias"),
    }
    for what, (said, ending) in trained.items():
        if said and not any(is_whole(key) and key.endswith(ending) for key in file.entries):
            raise refusal(
                file.source,
                f"its config says {what}, and the file has none in PEFT's layout",
                "Save the adapter again with PEFT's `save_pretrained`. If the base has none there, take the setting "
                "out of the config.",
            )
    # The last is how a kernel was factored, which the shapes tell too.
    known = {*_OTHER_KINDS, "use_rslora", "use_dora", "use_effective_conv2d"}
    # PEFT names a variant of LoRA so; one that is newer than this reader is none that it reads.
    if other := next((name for name in config if name.startswith("use_") and name not in known and config[name]), None):
        raise refusal(file.source, f"its config says {printable(other, 60)}, which is not known here", _EXTRACT)
    start = config.get("init_lora_weights")
    if start is None or isinstance(start, bool) or str(start).lower() in _HARMLESS_STARTS:
        return kind
    named = next((name for word, name in _MOVING_STARTS.items() if str(start).lower().startswith(word)), None)
    said = f"init_lora_weights={printable(repr(start), 60)}"
    if named is None:
        raise refusal(file.source, f"its config says {said}, which is not known here", _EXTRACT)
    remedy = _EXTRACT if named == "LoftQ" else _CONVERT_START
    raise refusal(
        file.source,
        f"its config says {said}: {named} moves a part of the base into the factors, so that on the whole base it "
        "would count twice",
        remedy,
    )


def _switch(file: LoRAFile, config: Config, name: str) -> bool:
    value = config.get(name)
    if value not in (None, True, False) or isinstance(value, float):
        raise refusal(
            file.source,
            f"{name} in its config is {printable(repr(value), 60)}, not true or false",
            "Correct the config.",
        )
    return bool(value)


def _diffusers_configs(file: LoRAFile) -> dict[str | None, Config]:
    """The header's JSON text, taken apart by component."""
    text = file.metadata.get(DIFFUSERS_METADATA)
    if not text:
        return {}
    try:
        settings = parse_json(text)
    except MoLEError as error:
        settings, why = None, f" ({error})"
    else:
        why = ""
    if not isinstance(settings, dict):
        raise refusal(
            file.source, f"header entry {DIFFUSERS_METADATA!r} is not a JSON object{why}", "Save the LoRA again."
        )
    configs: dict[str | None, dict[str, Any]] = {}
    for name, value in settings.items():
        owner, dot, setting = name.partition(".")
        component = owner if dot and owner in COMPONENTS else None
        configs.setdefault(component, {})[setting if component else name] = value
    return dict(configs)
