"""Runs diffusers' own fast tests for Stable Diffusion and LoRA twice: with its pipelines, and with ours in their place.

It needs a checkout of diffusers, of which nothing is copied here, at the tag of the installed version::

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers ../diffusers
    python tests/peers/run_diffusers_tests.py --checkout ../diffusers

and `pip install -e ".[dev]" parameterized`. With a network the tests fetch two tiny models from the Hub; with
`--offline` stand-ins of the same shape take their place, and the tests that compare with recorded pixels fail for
both.

It prints how many passed, failed and were skipped, and which tests fail with our pipelines and pass with diffusers'.
The exit code is 0 if there are none, 1 if there are some, and 2 if the tests could not be run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

TESTS = (
    "tests/pipelines/stable_diffusion/test_stable_diffusion.py",
    "tests/pipelines/stable_diffusion/test_stable_diffusion_img2img.py",
    "tests/pipelines/stable_diffusion/test_stable_diffusion_inpaint.py",
    "tests/lora/test_lora_layers_sd.py",
)
HERE = Path(__file__).resolve().parent
OUTCOMES = ("passed", "failed", "skipped")


class Refusal(Exception):
    """The tests cannot be run, and the message says what to do."""


def check(checkout: Path, *, other_version: bool) -> None:
    """Raises Refusal unless `checkout` is one of diffusers, of the installed version unless `other_version`."""
    missing = [name for name in ("setup.py", *TESTS) if not (checkout / name).is_file()]
    installed = importlib.metadata.version("diffusers")
    get = f"Get one: git clone --depth 1 --branch v{installed} https://github.com/huggingface/diffusers"
    if missing:
        raise Refusal(f"{checkout} is no checkout of diffusers: it has no {missing[0]}. {get}")
    found = re.search(r'^\s*version="([^"]+)"', (checkout / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    version = found[1] if found else "unknown"
    if version != installed and not other_version:
        raise Refusal(
            f"{checkout} is diffusers {version}, and {installed} is installed. {get}; or pass --other-version to run "
            "its tests all the same."
        )
    for package in ("pytest", "peft", "parameterized"):
        if importlib.util.find_spec(package) is None:
            raise Refusal(f"the tests need {package}, which is not installed: pip install {package}")
    print(f"diffusers {installed}, tests of {version}")


def run(checkout: Path, pipelines: str, tests: list[str], report: Path, environment: dict[str, str]) -> dict[str, str]:
    """Runs the tests with `"stock"` or `"our"` pipelines. Returns test to outcome, one of `OUTCOMES`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "our_pipelines", "-p", "no:cacheprovider"]
    command += ["--tb=short", f"--junitxml={report}", "-o", "junit_family=xunit1", *tests]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        command, cwd=checkout, env={**os.environ, **environment, "PYTHONPATH": path, "MOLE_PEER_PIPELINES": pipelines}
    )
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = f"{case.get('file')}::{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}"
        if outcomes.get(name) != "failed":  # an error in tearing down is a second entry
            outcomes[name] = outcome
    if not outcomes:
        raise Refusal(f"no test ran with the {pipelines} pipelines; what pytest says of it stands above.")
    return outcomes


def table(stock: dict[str, str], ours: dict[str, str]) -> str:
    """Passed, failed and skipped per file, as Markdown."""
    lines = ["| tests | diffusers' pipelines: passed, failed, skipped | ours |", "|---|---|---|"]
    for file in [*sorted({name.partition("::")[0] for name in stock | ours}), ""]:
        cells = []
        for outcomes in (stock, ours):
            count = Counter(outcome for name, outcome in outcomes.items() if name.startswith(file))
            cells.append(", ".join(str(count[outcome]) for outcome in OUTCOMES))
        lines.append(f"| {file.removeprefix('tests/') or 'all'} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkout", type=Path, required=True, help="folder of a checkout of diffusers")
    parser.add_argument("--other-version", action="store_true", help="the checkout may be of another version")
    parser.add_argument("--offline", action="store_true", help="stand-ins for the two tiny models of the Hub")
    parser.add_argument("tests", nargs="*", default=list(TESTS), help="files or single tests, instead of all")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    try:
        check(checkout, other_version=arguments.other_version)
        with tempfile.TemporaryDirectory() as folder:
            # The plugin fills this cache: it has imported what takes long to import anyway.
            hub = {"HF_HUB_CACHE": f"{folder}/hub", "HF_HUB_OFFLINE": "1", "MOLE_PEER_STAND_INS": "1"}
            environment = hub if arguments.offline else {}
            stock, ours = (
                run(checkout, pipelines, arguments.tests, Path(folder) / f"{pipelines}.xml", environment)
                for pipelines in ("stock", "our")
            )
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    print(table(stock, ours))
    worse = [name for name, outcome in ours.items() if outcome == "failed" and stock.get(name) != "failed"]
    worse += [f"{name} (did not run)" for name in stock if name not in ours]
    print("\nFail with our pipelines only:" if worse else "\nNothing fails with our pipelines only.")
    print("\n".join(f"  {name}" for name in sorted(worse)))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
