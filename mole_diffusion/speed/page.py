"""The table as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .config import SIZES
from .measure import SideCost, Speed
from .ratio import Ratio

NAMES = {
    "bare": "bare base",
    "empty": "loaded, none in the call",
    "sum": "plain sum",
    "budget": "budget",
    "norm_router": "norm_router",
    "gates": "gates per token",
    "masks": "masks",
    "fused": "sum, fused",
    "peft": "diffusers + peft",
    "merged": "merged beforehand",
}
COUNTED = ("operations", "bytes", "products", "operators")
HEAD = ["side", "LoRAs", "seconds", "processor time", "clock", *COUNTED, "MiB"]


def speed_tables(speed: Speed) -> str:
    """The numbers alone, as Markdown tables."""
    config = speed.config
    size = SIZES[config.size]
    used = "" if config.used is None else f", {config.used} of them in the call"
    lines = [
        f"{config.size}: {speed.parameters / 1e6:.0f} M parameters, {config.dtype or size.dtype}, latents "
        f"{config.latent or size.latent}², batch {config.batch}; LoRAs of rank {config.rank} on {speed.sites} modules "
        f"({config.targets}){used}; {speed.device}{', compiled' if config.compiled else ''}; {config.rounds} rounds.",
        "",
        *(
            []
            if speed.not_compiled is None
            else [f"Not measured, for torch did not compile it: {speed.not_compiled}", ""]
        ),
        *_table(HEAD, [_row(row) for row in speed.rows]),
        "",
        *_table(
            ["LoRAs", "load, s", "load with peft, s", "new choice, ms per 100 modules", "used before, ms"],
            [
                [
                    str(one.loras),
                    f"{one.load:.2f}",
                    "–" if one.load_peft is None else f"{one.load_peft:.2f}",
                    f"{one.choice_first:.2f}",
                    f"{one.choice_again:.3f}",
                ]
                for one in speed.settings
            ],
        ),
    ]
    if speed.training:
        lines += [
            "",
            *_table(
                ["training step", "seconds", "saved activations, MiB"],
                [[step.name, f"{step.seconds:.2f}", f"{step.saved:.0f}"] for step in speed.training],
            ),
        ]
    if speed.pipeline:
        lines += [
            "",
            "Whole calls of the toybox's pipeline, four steps, three of its LoRAs, over diffusers' own without LoRAs:",
            "",
            *_table(
                ["pipeline", "seconds a step", "processor time", "calls of Python a step", "operators a step"],
                [
                    [one.side, f"{one.seconds:.3f}", _ratio(one.processor), f"{one.calls:.0f}", f"{one.operators:.0f}"]
                    for one in speed.pipeline
                ],
            ),
        ]
    return "\n".join(lines)


def saved_table(kept: Mapping[str, Mapping[str, float]]) -> str:
    """What training gates keeps, as Markdown.

    Args:
        kept: For each size, what `saved_activations` counted.
    """
    names = list(next(iter(kept.values())))
    rows = [[size, *(f"{found[name]:.0f}" for name in names)] for size, found in kept.items()]
    head = [
        "What autograd keeps from the forward pass for the backward pass when gates of three LoRAs are trained,",
        "weights aside, in MiB, counted on tensors without values:",
        "",
    ]
    return "\n".join([*head, *_table(["size", *names], rows)])


def speed_page(speeds: Sequence[Speed], command: str, *more: str) -> str:
    """A page to publish.

    Args:
        speeds: One for each table.
        command: What repeats it.
        more: Other tables, below.
    """
    head = [
        "# What composing costs",
        "",
        f"Made by `{command}`. One process, sides interleaved round by round, random weights, real shapes.",
        "Ratios are to the bare base in the same round: median [quartiles]. *Operations* are those of all products and",
        "*bytes* what all operators read and write, both counted and over those of the bare base: what the arithmetic",
        "asks for if every operation took as long; products of LoRAs run faster than a base's convolutions, so a time",
        "can lie below. Only where LoRAs are merged, as `fuse_lora` does, are they those of the base. *Operators* are",
        "all that torch runs, views too, which bind small models. *MiB* is the peak of a call beyond weights and",
        "inputs.",
    ]
    return "\n".join([*head, *(f"\n{table}" for table in (*map(speed_tables, speeds), *more)), ""])


def _row(row: SideCost) -> list[str]:
    return [
        NAMES[row.side],
        str(row.loras),
        f"{row.seconds:.3f}",
        _ratio(row.processor),
        _ratio(row.clock),
        f"{row.operations:.3f}",
        f"{row.bytes:.3f}",
        str(row.products),
        str(row.operators),
        "–" if row.memory is None else f"{row.memory:.0f}",
    ]


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.middle:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
