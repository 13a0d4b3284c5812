"""Snapshots of a server over HTTP."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from hybrimoe.errors import HybrimoeError, UsageError

__all__ = ["live_url", "poll_snapshots"]

_MAX_BYTES = 16 << 20
_TIMEOUT_S = 30.0


def live_url(text: str) -> str:
    """The address of a server's snapshots, from what a user types: `localhost:8080`, `http://host:8080/v1`.

    Raises UsageError.
    """
    url = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
    try:
        valid = url.scheme in ("http", "https") and url.hostname and (url.port is None or url.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise UsageError(f"'{text}' is no address of a server", "for example http://127.0.0.1:8080")
    path = url.path.rstrip("/").removesuffix("/v1").removesuffix("/live")
    return urllib.parse.urlunsplit((url.scheme, url.netloc, f"{path}/live", "", ""))


def poll_snapshots(url: str, period_s: float, api_key: str | None = None) -> Iterator[dict[str, Any]]:
    """Snapshots, one each `period_s`, without end. Raises HybrimoeError when the server cannot be asked (any more)."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    while True:
        start = time.monotonic()
        yield _ask(request, url)
        time.sleep(max(0.0, period_s - (time.monotonic() - start)))


def _ask(request: urllib.request.Request, url: str) -> dict[str, Any]:
    try:
        # A proxy of the environment must not see a loopback address.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            data = json.loads(response.read(_MAX_BYTES))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise HybrimoeError(f"{url} wants its API key", "give it with --api-key, or in LLAMA_API_KEY") from None
        raise HybrimoeError(f"{url} answers {error.code}", "is this a server of hybrimoe?") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise HybrimoeError(f"cannot reach {url}: {reason}", "start one with 'hybrimoe serve'") from None
    if not isinstance(data, dict) or "version" not in data:
        raise HybrimoeError(f"{url} gives no snapshots", "is this a server of hybrimoe?")
    return data
