"""The table as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .clocks import QUEUED, on_gpu
from .config import SIZES
from .count import BaseCount
from .failed import Failed
from .measure import SideCost, Speed
from .pipeline import STEPS
from .ratio import Ratio
from .train import WalkOperations

NAMES = {
    "bare": "bare base",
    "empty": "loaded, none in the call",
    "sum": "plain sum",
    "products": "its products alone",
    "joined": "one product fewer",
    "budget": "budget",
    "norm_router": "norm_router",
    "routed": "router and products alone",
    "gates": "gates per token",
    "gated": "gates and products alone",
    "masks": "masks",
    "fused": "sum, fused",
    "peft": "diffusers + peft",
    "merged": "merged beforehand",
}
COUNTED = ("operations", "bytes", "products", "operators")
HEAD = ["side", "LoRAs", "seconds", "processor time", "clock", "above the sum", *COUNTED, "MiB"]
GPU_HEAD = ["side", "LoRAs", "ms, done", "ms, GPU computes", "queued", "done", "above the sum", *COUNTED, "MiB"]


def speed_tables(speed: Speed) -> str:
    """The numbers alone, as Markdown tables."""
    config = speed.config
    size = SIZES[config.size]
    gpu = on_gpu(config.device)
    head = GPU_HEAD if gpu else [*HEAD[:6], "inside", *HEAD[6:]] if config.inside else HEAD
    used = "" if config.used is None else f", {config.used} of them in the call"
    lines = [
        f"{config.size}: {speed.parameters / 1e6:.0f} M parameters, {config.precision}, latents "
        f"{config.latent or size.latent}², batch {config.batch}; LoRAs of rank {config.rank} on {speed.sites} modules "
        f"({config.targets}){used}; {speed.device}{_compiled(speed)}; {config.rounds} rounds.",
        "",
        *(
            []
            if speed.not_compiled is None
            else [f"Not measured, for torch did not compile it: {speed.not_compiled}", ""]
        ),
        *_table(
            head,
            [
                *(_row(row, gpu, config.inside) for row in speed.rows),
                *(_failed(one, len(head)) for one in speed.failed),
            ],
        ),
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
        lines += ["", *_training(speed)]
    if speed.walk is not None:
        memory = "" if speed.walk.peak is None else f", {speed.walk.peak:.2f} GiB at the peak, weights and all"
        lines += [
            "",
            "A whole step of gate training by the preset `real`, four pictures of "
            f"{speed.walk.pixels} pixels one after another, with autoencoder and CLIP: "
            f"{speed.walk.seconds:.2f} seconds{memory}.",
        ]
    if speed.pipeline:
        lines += [
            "",
            f"Whole calls of the toybox's pipeline, {STEPS} steps, three of its LoRAs, over diffusers' own "
            "without LoRAs, on the same weights:",
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


def walk_table(counts: Mapping[str, Mapping[str, WalkOperations]]) -> str:
    """What a walk of gate training asks for, as Markdown.

    Args:
        counts: For each size, what `walk_operations` counted.
    """
    one = next(iter(next(iter(counts.values())).values()))
    head = [
        "Operations of a walk of gate training by the default settings, three LoRAs, in passes of the bare denoiser:",
        f"{one.before:g} without a gradient in the mean, and {one.losses} with. No way to compose takes a walk below",
        "*bare*, to which autoencoder and CLIP come.",
        "",
    ]
    rows = [
        [size, name, f"{one.forward:.3f}", f"{one.backward:.3f}", f"{one.walk:.2f}"]
        for size, sides in counts.items()
        for name, one in sides.items()
    ]
    return "\n".join([*head, *_table(["size", "side", "a pass", "a pass and its backward pass", "a walk"], rows)])


def count_table(counts: Sequence[BaseCount], loras: int, rank: int) -> str:
    """What real bases ask for, as Markdown.

    Args:
        counts: One for each base.
        loras: How many LoRAs were counted.
        rank: Their rank.
    """
    sides = list(counts[0].more)[1:]
    head = ["base", "picture", "denoiser, bfloat16", f"{loras} LoRAs of rank {rank}", "TFLOP a step"]
    head += [f"with {NAMES[side]}" for side in sides] + ["MiB at the peak", *(f"with {NAMES[side]}" for side in sides)]
    rows = [
        [
            one.name,
            f"{one.pixels}²",
            f"{one.parameters / 1e9:.2f} B, {one.weights:.1f} GiB",
            f"{one.loras:.0f} MiB",
            f"{one.operations / 1e12:.2f}",
            *(f"{one.more[side]:.3f}" for side in sides),
            f"{one.peak['bare']:.0f}",
            *(f"{one.peak[side]:.0f}" for side in sides),
        ]
        for one in counts
    ]
    return "\n".join(_table(head, rows))


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
        f"Made by `{command}`. One process, sides interleaved round by round in changing order, random weights,",
        "real shapes. Ratios are to the bare base in the same round: median [quartiles]. *Above the sum* is what a",
        "side takes more than the plain sum in the same round, over the bare base. *Operations* are those",
        "of all products and *bytes* what all operators read and write, both counted and over those of the bare",
        "base: what the arithmetic asks for if every operation took as long; products of LoRAs run faster than a",
        "base's convolutions, so a time can lie below. Only where LoRAs are merged, as `fuse_lora` does, are they",
        "those of the base. *Operators* are all that torch runs, views too, which bind small models. *MiB* is the",
        "peak of a call beyond weights and inputs.",
        *(
            _OF_LIMITS
            if any(row.side in ("products", "joined", "gated", "routed") for speed in speeds for row in speed.rows)
            else []
        ),
        *(_OF_INSIDE if any(speed.config.inside for speed in speeds) else []),
        *(_OF_GPUS if any(on_gpu(speed.config.device) for speed in speeds) else []),
    ]
    return "\n".join([*head, *(f"\n{table}" for table in (*map(speed_tables, speeds), *more)), ""])


_OF_LIMITS = [
    "",
    "*Its products alone* are those of the plain sum with nothing around them: nobody can choose LoRAs, weigh them or",
    "look on, and no sum of two products a module is faster. *One product fewer* has the rows of a Linear and of",
    "`down` in one matrix, which gives both at once. That is not how sums are computed, since every choice of LoRAs",
    "would need a copy of the base's weights, and calls of several threads with other choices could not share one.",
    "*Gates and products alone* and *router and products alone* are what gates, or the router, and LoRAs compute,",
    "likewise with nothing around them: what they read a second time and multiply is the least that weights for each",
    "token take.",
]
_OF_INSIDE = [
    "",
    "*Inside* is what a call of ours spends on LoRAs at the modules that have them, from what a module gave to the",
    "same with its LoRAs, over the median call of the bare base: for each module the median [quartiles] of all rounds,",
    "added up. It is a small time measured alone; *above the sum* is a difference of large ones, and scatters more.",
]
_OF_GPUS = [
    "",
    f"On a GPU, {QUEUED} calls follow one another before the clock is read, as in a denoising loop. *Done* is by the",
    "clock, until the GPU has finished; *queued* is processor time, until it was told everything: where the GPU",
    "computes for less than *done*, it waits for the processor, and what counts is how much there is to tell.",
]


def _compiled(speed: Speed) -> str:
    how = {"whole": ", compiled", "blocks": ", repeated blocks compiled", None: ""}
    return how[speed.config.compiled]


def _training(speed: Speed) -> list[str]:
    gpu = on_gpu(speed.config.device)
    head = ["training step", "seconds", "saved activations, MiB", *(["peak beyond weights, MiB"] if gpu else [])]
    rows = []
    for step in speed.training:
        peak = [] if step.peak is None else [f"{step.peak:.0f}"]
        rows.append([step.name, f"{step.seconds:.2f}", f"{step.saved:.0f}", *peak])
    return _table(head, rows)


def _failed(failed: Failed, columns: int) -> list[str]:
    named = dict[str, str](NAMES)
    error = failed.error.replace("|", "\\|")
    return [named.get(failed.side, failed.side), str(failed.loras), error, *["–"] * (columns - 3)]


def _row(row: SideCost, gpu: bool, looked: bool) -> list[str]:
    computing = "–" if row.busy is None else f"{1000 * row.busy:.2f}"
    inside = [] if not looked else ["–" if row.inside is None else _ratio(row.inside, ".4f")]
    times = [f"{1000 * row.seconds:.2f}", computing] if gpu else [f"{row.seconds:.3f}"]
    return [
        NAMES[row.side],
        str(row.loras),
        *times,
        _ratio(row.processor),
        _ratio(row.clock),
        "–" if row.above is None or row.side in ("bare", "sum") else _ratio(row.above, "+.3f"),
        *inside,
        f"{row.operations:.3f}",
        f"{row.bytes:.3f}",
        str(row.products),
        str(row.operators),
        "–" if row.memory is None else f"{row.memory:.0f}",
    ]


def _ratio(ratio: Ratio, form: str = ".3f") -> str:
    return f"{ratio.middle:{form}} [{ratio.low:{form}}, {ratio.high:{form}}]"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
