"""Work in processes of its own, for tests that kill it or let several work together.

`python -m tests.forked killed FOLDER CLIP`, `together FOLDER CLIP` and `benchmark FOLDER STUDY`. The models are
imported once, then processes are forked, before torch has started a thread.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command, launch_command_parser

from mole_diffusion.benchmark import BenchmarkConfig, run_benchmark
from mole_diffusion.benchmark.run import read_rows
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.training.gates import references, report
from tests.gate_training import CONCEPTS, config, mole_pipeline, train


def fork(job: Callable[[], None]) -> int:
    """Runs `job` in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(folder: Path, clip: Path) -> None:
    """One training, killed again and again and always started anew, and one left in peace."""

    def run(name: str, kill_at: int | None = None, started: int | None = None) -> None:
        replace, calls = os.replace, [0]

        def counting_replace(*paths: Any) -> None:
            calls[0] += 1
            if calls[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = counting_replace
        train(
            mole_pipeline(),
            config(steps=5, checkpoint_every=1, learning_rate=0.05, local_weight=1.0, reference_pictures=1),
            DifferentiableCLIP(clip),
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
    codes += [wait(child), wait(fork(lambda: run("killed")))]
    print(codes)


def together(folder: Path, clip: Path) -> None:
    """One training by one process, and by two with half of every batch each."""

    def run(name: str) -> None:
        settings = config(
            batch_size=4, steps=3, learning_rate=0.05, local_weight=1.0, reference_pictures=1, eta=1.0, gradient_steps=0
        )
        train(mole_pipeline(), settings, DifferentiableCLIP(clip), concepts=CONCEPTS, out=folder / name, pictures=False)

    def run_rank(rank: int, port: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run("two")
        import torch.distributed

        torch.distributed.destroy_process_group()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [fork(lambda rank=rank: run_rank(rank, port)) for rank in range(2)]
    codes = [wait(child) for child in children]
    print([*codes, wait(fork(lambda: run("one")))])


def benchmark(folder: Path, path: Path) -> None:
    """A benchmark by two processes that are killed and by two that `accelerate launch` starts; and by one in peace."""
    study, place = BenchmarkConfig.from_file(path), folder / "killed"

    def run_rank(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        run_benchmark(study, place)

    def found(pattern: str) -> bool:
        try:
            return any(place.glob(pattern))
        except FileNotFoundError:  # a training that ends takes its checkpoints away while we look
            return False

    def launch() -> None:
        command = [sys.executable, "-c", "from mole_diffusion.cli import main; main()", "benchmark", "run", str(path)]
        # With --multi_gpu accelerate starts several processes on a CPU too; without, only one.
        options = ["--multi_gpu", "--no_python", "--num_processes", "2", "--main_process_port", "0"]
        sys.argv = ["accelerate", *options, *command, "--device", "cpu", "--out", str(place)]
        launch_command(launch_command_parser().parse_args())

    workers = [fork(lambda rank=rank: run_rank(rank)) for rank in range(2)]
    # Both kinds of work are under way: a picture is there, and a checkpoint of gates or the gates.
    while not (found("rows/*/*/*.json") and found("gates/**/*.safetensors")):
        time.sleep(0.01)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    codes = [wait(worker) for worker in workers]
    there = len(read_rows(study, place))
    codes += [wait(fork(launch)), wait(fork(lambda: run_benchmark(study, folder / "whole")))]
    print(json.dumps([codes, there]))


if __name__ == "__main__":
    report.STEPS = references.STEPS = 2
    {"killed": killed, "together": together, "benchmark": benchmark}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
