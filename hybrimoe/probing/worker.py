"""The probe's own process: a request on stdin, one JSON object a line on stdout."""

from __future__ import annotations

import json
import sys

from hybrimoe.errors import HybrimoeError
from hybrimoe.probing.measure import Request, measure


def main() -> int:
    def say(**message: object) -> None:
        print(json.dumps(message), flush=True)

    request = Request.from_dict(json.load(sys.stdin))
    try:
        from hybrimoe.llama_log import llama_log
        from hybrimoe.native.backend_modules import backend_module_paths, load_backend_modules

        llama_log()
        load_backend_modules(backend_module_paths())
        say(result=measure(request, lambda step, share: say(step=step, share=share)))
    except HybrimoeError as error:
        say(error=error.message, hint=error.hint)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
