"""`mole`, which is also `python -m mole_diffusion`."""

from __future__ import annotations

import sys

from .extras import MissingPackageError


def main() -> None:
    """Runs the command line, or says in one line what is not installed for it."""
    try:
        from .cli import main as run
    except MissingPackageError as error:
        sys.stderr.write(f"mole: {error}\n")
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
