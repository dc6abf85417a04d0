"""What a study asks of a benchmark: gates trained for it, masks, batches, and work shared without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mole_diffusion import MoLEStableDiffusionPipeline, toybox
from mole_diffusion.benchmark import BenchmarkConfig, run_benchmark
from mole_diffusion.benchmark.draw import gates_by_picture
from mole_diffusion.benchmark.gates import training_prompts
from mole_diffusion.benchmark.methods import TRAINED_METHODS
from mole_diffusion.benchmark.run import read_rows
from mole_diffusion.benchmark.share import share
from mole_diffusion.composition import COMPOSITIONS
from mole_diffusion.gating import MoLEModel
from tests.composing import NAMES, composing_pipeline

STUDY: dict[str, Any] = {
    "name": "study",
    "base": "toybox",
    "concepts": "toybox",
    "compositions": ["cat+boot", "mug"],
    "methods": ["normalized", "soup", {"mole": {"label": "layer", "training": {"gates": {"scope": "layer"}}}}],
    "train_prompts": ["a photo of {concepts} on slate"],
    "training": {"steps": 1, "batch_size": 1, "rollout_steps": 1, "warmup_steps": 0},
    "prompts": ["a photo of {concepts} on grass"],
    "seeds": 3,
    "batch": 2,
    "steps": 1,
    "clip": "toybox",
}
MASKS: dict[str, Any] = {"compositions": ["cat+boot+teapot"], "methods": ["linear"], "keep": ["all", 1], "seeds": 1}


def config(**changes: Any) -> BenchmarkConfig:
    return BenchmarkConfig.from_dict(STUDY | changes)


def written(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study. Gates cannot be trained for the second composition, which has one LoRA only."""
    folder = tmp_path_factory.mktemp("study")
    assert run_benchmark(config(), folder) == 6
    return folder


def test_gates_are_trained_as_each_method_says(done: Path) -> None:
    soup, layer = (MoLEModel.from_pretrained(done / "gates" / label / "cat+boot") for label in ("soup", "layer"))
    assert (soup.gate_config.input, soup.gate_config.scope) == ("none", "matrix")
    assert (layer.gate_config.input, layer.gate_config.scope) == ("hidden", "layer")
    record = json.loads((done / "gates" / "soup" / "cat+boot" / "training.json").read_text())
    assert record["config"]["steps"] == 1
    # CLIP reads descriptions, and every order of the concepts is trained on.
    assert record["prompts"] == {
        "a photo of a <v1> cat and a <v2> boot on slate": toybox.described_prompt(["cat", "boot"], "slate"),
        "a photo of a <v2> boot and a <v1> cat on slate": toybox.described_prompt(["boot", "cat"], "slate"),
    }
    assert record["concepts"]["cat"]["references"] == len(toybox.references("cat"))
    assert not list(done.rglob("*.work"))
    assert float(json.loads((done / "gates" / "soup" / "cat+boot" / "seconds.json").read_text())) > 0


def test_a_training_that_fails_says_so_in_its_rows_and_the_rest_goes_on(done: Path) -> None:
    rows = read_rows(config(), done)
    failed = {(row.composition, row.method) for row in rows if row.error is not None}
    assert failed == {("mug", "soup"), ("mug", "layer")}
    assert all("at least two must be loaded" in row.error for row in rows if row.error is not None)
    assert len(rows) == 18
    # The last rows come after a failed training, and are those of a pipeline that never saw one.
    assert [row.method for row in rows if row.error is None][-3:] == ["normalized"] * 3


def test_rows_tell_the_gates_that_were_used(done: Path) -> None:
    row = next(row for row in read_rows(config(), done) if row.method == "layer" and row.error is None)
    assert len(row.gates) == MoLEModel.from_pretrained(done / "gates" / "layer" / "cat+boot").num_gates
    for weights in row.gates.values():
        assert 0 < sum(weight for weight in weights if weight is not None) < 1  # the null expert has the rest
    assert any(None in weights for weights in row.gates.values())  # not every LoRA is in the text encoder


def test_gates_by_picture_are_those_of_each_picture() -> None:
    pipe: Any = composing_pipeline(*NAMES)
    gates = pipe.init_gates()
    with torch.no_grad():
        for parameter in gates.gate_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    def used(prompts: list[str], seeds: list[int]) -> list[dict[str, list[float | None]]]:
        with gates.record(accumulate=True) as record:
            pipe(
                prompts,
                num_inference_steps=2,
                guidance_scale=2.0,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            )
        return gates_by_picture(record, len(prompts))

    prompts = ["a photo of a cat", "a red boot in the grass"]
    together = used(prompts, [3, 4])
    for index, one in enumerate(together):
        alone = used([prompts[index]], [3 + index])[0]
        for place, weights in one.items():
            assert weights == pytest.approx(alone[place], abs=1e-5)
    assert any(together[0][place] != pytest.approx(together[1][place], abs=1e-4) for place in together[0])


def test_a_study_started_again_trains_and_draws_nothing(done: Path) -> None:
    before = written(done)
    assert run_benchmark(config(compositions=["cat+boot"]), done) == 0
    assert written(done) == before


def test_batches_come_out_the_same_when_a_part_is_missing(done: Path) -> None:
    place = Path("cat+boot") / "layer"
    picture = done / "pictures" / place / "p00-s0001.png"
    before, gone = picture.read_bytes(), done / "rows" / place / "p00-s0001.json"
    row = json.loads(gone.read_text())
    picture.unlink()
    gone.unlink()
    others = written(done)
    assert run_benchmark(config(compositions=["cat+boot"]), done) == 0
    assert picture.read_bytes() == before
    again = json.loads(gone.read_text())
    assert {**again, "seconds": 0} == {**row, "seconds": 0}
    assert others.items() <= written(done).items()


def test_a_picture_does_not_depend_on_those_beside_it(done: Path, tmp_path: Path) -> None:
    study = config(compositions=["cat+boot"], methods=["normalized"], batch=1)
    assert run_benchmark(study, tmp_path) == 0
    alone = read_rows(study, tmp_path)
    together = [row for row in read_rows(config(), done) if row.composition == "cat+boot"][:3]
    for one, other in zip(alone, together, strict=True):
        assert one.numbers["text_cosine"] == pytest.approx(other.numbers["text_cosine"], abs=2e-3)
        assert one.seed == other.seed


def test_methods_may_be_added_and_must_stay_what_they_were(done: Path) -> None:
    added = config(compositions=["cat+boot"], methods=["normalized", "switch"])
    folder = done.with_name("added")
    shutil.copytree(done, folder)
    assert run_benchmark(added, folder) == 0
    assert len(read_rows(added, folder)) == 6
    other = {"mole": {"label": "layer", "training": {"gates": {"scope": "block"}}}}
    with pytest.raises(ValueError, match="holds a benchmark with another 'methods'"):  # the former ones are still known
        run_benchmark(config(methods=[other]), folder)
    assert run_benchmark(config(compositions=["cat+boot"]), folder) == 0


@pytest.mark.parametrize("processes", [2, 3])
def test_shares_are_whole_trainings_and_leave_nothing_out(processes: int) -> None:
    study = config(compositions=["cat+boot", "mug+robot", "clock+boat"], prompts=["{concepts} on sand", "{concepts}"])
    shares = [share(study, rank, processes) for rank in range(processes)]
    cells = [cell.path for one in shares for batch in one for cell in batch]
    assert sorted(cells) == sorted(cell.path for cell in study.cells())
    owners: dict[tuple[str, str], set[int]] = {}
    for rank, one in enumerate(shares):
        assert one
        for batch in one:
            owners.setdefault((batch[0].composition, batch[0].method.label), set()).add(rank)
    assert all(len(ranks) == 1 for (_, label), ranks in owners.items() if label != "normalized")
    assert any(len(ranks) > 1 for (_, label), ranks in owners.items() if label == "normalized")


def test_masks_draw_and_judge_what_is_kept(tmp_path: Path) -> None:
    study = config(**MASKS)
    assert run_benchmark(study, tmp_path) == 0
    rows = read_rows(study, tmp_path)
    assert [row.kept for row in rows] == ["cat+boot+teapot", "cat", "boot", "teapot"]
    assert [list(row.image_by_concept) for row in rows][1:] == [["cat"], ["boot"], ["teapot"]]
    pipe = MoLEStableDiffusionPipeline.from_pretrained(toybox.base_dir())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_loras({name: toybox.lora_path(name) for name in ("cat", "boot", "teapot")})
    pipe.set_composition("linear")
    prompt = "a photo of a <v2> boot on grass"
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 5.0, "loras": ["boot"]}
    expected = pipe(prompt, generator=torch.manual_seed(0), **options).images[0]
    with Image.open(tmp_path / "pictures" / "cat+boot+teapot" / "linear" / "boot" / "p00-s0000.png") as drawn:
        assert drawn.tobytes() == expected.tobytes()


def test_choices_come_once_and_pairs_are_all_of_them() -> None:
    study = config(**MASKS | {"keep": ["all", 3, 2]})
    assert study.kept(["a", "b", "c"]) == [("a", "b", "c"), ("a", "b"), ("a", "c"), ("b", "c")]


def test_all_methods_include_soup_where_gates_are_trained() -> None:
    every = [*(name for name in COMPOSITIONS if name not in TRAINED_METHODS), *TRAINED_METHODS]
    assert [method.label for method in config(methods="all").methods] == every
    more = config(methods=["all", {"mole": {"label": "other", "training": {"steps": 3}}}])
    assert [method.label for method in more.methods] == [*every, "other"]
    free = config(methods="all", train_prompts=[])
    assert not {"mole", "soup", "masked_gates"} & {method.label for method in free.methods}
    given = config(methods="all", gates="toybox")
    assert {m.label for m in given.methods if m.training is not None} == {"soup", "masked_gates"}
    assert {m.label for m in config(methods="all").methods if m.training and m.training.gates.residual} == {
        "masked_gates"
    }


def test_settings_of_a_method_go_before_those_of_all() -> None:
    own = {"mole": {"training": {"gates": {"scope": "layer"}, "steps": 70}}}
    study = config(methods=[own], training={"gates": {"scope": "block", "gate_sum": 2.0}, "batch_size": 3})
    training = study.methods[0].training
    assert training is not None
    assert (training.gates.scope, training.gates.gate_sum) == ("layer", 2.0)
    assert (training.steps, training.batch_size) == (70, 3)


def test_many_concepts_are_trained_in_rotations() -> None:
    names = ["cat", "boot", "teapot", "mug"]
    prompts = training_prompts(config(), names)
    assert len(prompts) == 4
    assert prompts[1] == toybox.subject_prompt(["boot", "teapot", "mug", "cat"], "slate")
    assert len(training_prompts(config(), names[:3])) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_prompts": []}, "'soup' needs gates. Say what to train them on"),
        ({"train_prompts": ["a photo"]}, 'a prompt needs "{concepts}"'),
        ({"train_prompts": STUDY["prompts"]}, "has 'a photo of {concepts} on grass', which is measured too"),
        ({"training": {"stepz": 3}}, r"unknown settings \['stepz'\]"),
        ({"training": [3]}, "`training` must be a mapping"),
        ({"methods": [{"merge": {"training": {"steps": 3}}}]}, "`training` is a mapping of settings, of a method that"),
        ({"methods": [{"mole": {"label": "a/b"}}]}, "a label names a folder too, so it cannot be 'a/b'"),
        ({"methods": ["mole", {"mole": {"training": {"steps": 3}}}]}, "methods has 'mole' twice. Give one a label"),
        ({"keep": 0}, '`keep` is "all" or how many LoRAs to keep, alone or in a list, got 0'),
        ({"keep": []}, "`keep` is an empty list"),
        ({"keep": [2]}, "`keep` has 2, and mug has only 1 LoRAs"),
        ({"batch": 0}, "`batch` must be a number of at least 1, got 0"),
        ({"reference": "mole"}, "`reference` must be one of normalized, soup, layer, got 'mole'"),
    ],
)
def test_a_wrong_study_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        config(**changes)
