"""The `hybrimoe` program. Imports next to nothing, so that Ctrl-C ends it properly from its first moment on."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in typing, whose import would take longer than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program with `arguments`, by default those of the command line. Returns the exit code."""
    try:
        from hybrimoe.cli.app import run_app

        return run_app(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return 130  # errors.EXIT_INTERRUPTED; what was interrupted may be its import


if __name__ == "__main__":
    sys.exit(main())
