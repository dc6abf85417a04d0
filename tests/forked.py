"""What the fork server does for tests: trainings and benchmarks that are killed, and those of several processes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
from accelerate.commands.launch import launch_command, launch_command_parser
from PIL import Image

from mole_diffusion.__main__ import main
from mole_diffusion.benchmark import BenchmarkConfig, run_benchmark
from mole_diffusion.benchmark.run import read_rows
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.training import LoRATrainingConfig, train_lora
from mole_diffusion.training.gates import references
from tests.fork_server import fork, wait
from tests.gate_training import CONCEPTS, config, mole_pipeline, train
from tests.tiny import tiny_pipeline


def die_at_file(number: int | None) -> None:
    """This process is killed before the file of this number, counted from 1, takes its name; `None`: it is not."""
    replace, calls = os.replace, [0]

    def counting_replace(*paths: Any) -> None:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = counting_replace


def killed(place: str, clip: str) -> list[int]:
    """One training, killed again and again and always started anew, and one left in peace; their exit codes."""
    folder, references.STEPS = Path(place), 2

    def run(name: str, kill_at: int | None = None, started: int | None = None) -> None:
        die_at_file(kill_at)
        train(
            mole_pipeline(),
            config(steps=5, checkpoint_every=1, learning_rate=0.05, local_weight=1.0, reference_pictures=1),
            DifferentiableCLIP(Path(clip)),
            concepts=CONCEPTS,
            work=folder / f"{name}.work",
            out=folder / name,
            pictures=False,
            on_step_end=lambda step, numbers: None if started is None else os.write(started, b"."),
        )

    codes = [wait(fork(lambda: run("peaceful")))]
    # Files take their names in this order: two reference pictures; then tensors and state of every checkpoint.
    # Killed before the second picture is there, before the first checkpoint, between tensors and state.
    for moment in (2, 2, 4, 6):
        codes.append(wait(fork(lambda moment=moment: run("killed", moment))))
    reader, writer = os.pipe()
    child = fork(lambda: run("killed", started=writer))
    os.read(reader, 1)
    os.kill(child, signal.SIGKILL)  # somewhere in a step
    return [*codes, wait(child), wait(fork(lambda: run("killed")))]


def killed_lora(place: str) -> list[int]:
    """The training of a LoRA, killed again and again and always started anew, and one left in peace; exit codes."""
    folder = Path(place)
    settings = LoRATrainingConfig(
        prompts=("a cat",), rank=2, steps=2, warmup_steps=0, batch_size=1, checkpoint_every=1, horizontal_flip=True
    )
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green")]

    def run(name: str, kill_at: int | None = None) -> None:
        die_at_file(kill_at)
        out, work = folder / f"{name}.safetensors", folder / f"{name}.work"
        train_lora(tiny_pipeline(), pictures, settings, out=out, work=work, progress=False)

    codes = [wait(fork(lambda: run("peaceful")))]
    # Files take their names in this order: tensors and state of every checkpoint, then the LoRA. Killed before the
    # first checkpoint, between its tensors and its state, between those of the second, and before the LoRA.
    for moment in (1, 2, 4, 3):
        codes.append(wait(fork(lambda moment=moment: run("killed", moment))))
    return [*codes, wait(fork(lambda: run("killed")))]


def together(place: str, clip: str) -> list[int]:
    """One training by two processes with half of every batch each, and by one; their exit codes."""
    folder, references.STEPS = Path(place), 2

    def run(name: str) -> None:
        settings = config(
            batch_size=4, steps=3, learning_rate=0.05, local_weight=1.0, reference_pictures=1, eta=1.0, gradient_steps=0
        )
        model = DifferentiableCLIP(Path(clip))
        work = folder / f"{name}.work"
        train(mole_pipeline(), settings, model, concepts=CONCEPTS, out=folder / name, work=work, pictures=False)

    def run_rank(rank: int, port: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run("two")
        torch.distributed.destroy_process_group()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [fork(lambda rank=rank: run_rank(rank, port)) for rank in range(2)]
    return [*(wait(child) for child in children), wait(fork(lambda: run("one")))]


def benchmark(place: str, path: str) -> list[Any]:
    """A benchmark by two processes that are killed and by two that `accelerate launch` starts; and by one in peace.

    Returns:
        Exit codes: of the killed, of the launched, of the one; and how many rows the killed left.
    """
    folder, out, study = Path(place), Path(place) / "killed", BenchmarkConfig.from_file(path)

    def run_rank(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        run_benchmark(study, out)

    def found(pattern: str) -> bool:
        try:
            return any(out.glob(pattern))
        except FileNotFoundError:  # a training that ends takes its checkpoints away while we look
            return False

    def command(environment: dict[str, str]) -> None:
        os.environ.clear()
        os.environ |= environment
        sys.argv = ["mole", "benchmark", "run", path, "--device", "cpu", "--out", str(out)]
        try:
            main()
        except SystemExit as done:
            if done.code:
                raise

    workers = [fork(lambda rank=rank: run_rank(rank)) for rank in range(2)]
    # Both kinds of work are under way: a picture is there, and a checkpoint of gates or the gates.
    while not (found("rows/*/*/*.json") and found("gates/**/*.safetensors")):
        time.sleep(0.01)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    codes = [wait(worker) for worker in workers]
    there = len(read_rows(study, out))
    workers = [fork(lambda given=given: command(given)) for given in launched(folder)]
    codes += [wait(worker) for worker in workers]
    return [*codes, wait(fork(lambda: run_benchmark(study, folder / "whole"))), there]


def launched(folder: Path) -> list[dict[str, str]]:
    """The environments that `accelerate launch` starts two processes in."""
    write = "import json, os; json.dump(dict(os.environ), open(os.environ['PLACE'] + os.environ['RANK'], 'w'))"

    def launch() -> None:
        os.environ["PLACE"] = str(folder / "environment-")
        # With --multi_gpu accelerate starts several processes on a CPU too; without, only one.
        options = ["--multi_gpu", "--no_python", "--num_processes", "2", "--main_process_port", "0"]
        launch_command(launch_command_parser().parse_args([*options, sys.executable, "-S", "-c", write]))

    assert wait(fork(launch)) == 0
    return [json.loads(path.read_text()) for path in sorted(folder.glob("environment-*"))]


def ranks(place: str, module: str, function: str) -> list[Any]:
    """What `function(rank)` of a test module returns in each of two processes of one group."""
    folder = Path(place)
    measure: Callable[[int], Any] = getattr(importlib.import_module(module), function)

    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
        (folder / f"{rank}.json").write_text(json.dumps(measure(rank)))
        torch.distributed.destroy_process_group()

    children = [fork(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [wait(child) for child in children] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
