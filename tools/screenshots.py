#!/usr/bin/env python3
"""Takes pictures of a report or of a web page with a headless Chromium.

`screenshots.py report.html` writes report.png beside it; an http:// or https:// address needs -o. The browser gets a
profile folder of its own and no access to the user's. With --tall the picture is as high as the page.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybrimoe.errors import HybrimoeError, UsageError, as_script

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 120
MOST_PIXELS_HIGH = 16_000
_PROBE = """
<script>addEventListener("load", () => setTimeout(() => {
document.body.setAttribute("data-hm-height", document.documentElement.scrollHeight) }, %d))</script>
"""


def find_browser(given: str | None = None) -> Path:
    """The browser: `given`, HYBRIMOE_CHROMIUM, or the first one on PATH. Raises HybrimoeError."""
    for name in filter(None, (given, os.environ.get("HYBRIMOE_CHROMIUM"), *BROWSERS)):
        found = shutil.which(name)
        if found:
            return Path(found)
        if name == given:
            raise UsageError(f"--browser: there is no program '{given}'", "give the path of a Chromium")
    raise HybrimoeError("no Chromium was found", "install one (apt-get install chromium), or name one with --browser")


def address_of(page: str) -> str:
    """A file's address; an http address as it is. Raises UsageError."""
    if re.match(r"https?://", page):
        return page
    path = Path(page)
    if not path.is_file():
        raise UsageError(f"there is no file '{page}'", "give an HTML file, or an address with http://")
    return path.resolve().as_uri()


def run_browser(browser: Path, arguments: Sequence[str]) -> str:
    """Runs the browser once, in a profile folder of its own; returns its stdout. Raises HybrimoeError."""
    with tempfile.TemporaryDirectory(prefix="hybrimoe-chromium-", ignore_cleanup_errors=True) as folder:
        command = [
            str(browser),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={folder}",
            *arguments,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise HybrimoeError(f"the browser did not finish within {TIMEOUT_S} s", "is the page still busy?") from None
        except OSError as error:
            raise HybrimoeError(f"cannot start {browser}: {error.strerror}") from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        raise HybrimoeError(f"the browser ended with status {done.returncode}: {last[0]}")
    return done.stdout


def page_height(browser: Path, page: str, width: int, wait_ms: int) -> int:
    """Height of a local page in pixels, measured in a copy of it that writes its height into its own body."""
    source = Path(page)
    if not source.is_file():
        raise UsageError("--tall needs a file, not an address", "give --height")
    text = source.read_text(encoding="utf-8") + _PROBE % (wait_ms // 2)
    with tempfile.TemporaryDirectory(prefix="hybrimoe-page-") as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(text, encoding="utf-8")
        arguments = [f"--window-size={width},900", f"--virtual-time-budget={wait_ms}", "--dump-dom", copy.as_uri()]
        document = run_browser(browser, arguments)
    found = re.search(r'data-hm-height="(\d+)"', document)
    if found is None:
        raise HybrimoeError("the page's height could not be measured", "give --height")
    return min(int(found[1]), MOST_PIXELS_HIGH)


def screenshot(browser: Path, page: str, output: Path, width: int, height: int, wait_ms: int) -> None:
    """Writes a PNG whole or not at all. `wait_ms` is the page's own time before the picture is taken."""
    temporary = output.with_name(f".{output.stem}.{os.getpid()}.tmp.png")
    try:
        run_browser(
            browser,
            [
                f"--window-size={width},{height}",
                f"--virtual-time-budget={wait_ms}",
                f"--screenshot={temporary}",
                address_of(page),
            ],
        )
        if not temporary.is_file():
            raise HybrimoeError(f"the browser wrote no picture of {page}", f"may it write into '{output.parent}'?")
        temporary.replace(output)
    except OSError as error:
        raise HybrimoeError(f"cannot write '{output}': {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="+", help="an HTML file or an address")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="default: beside the HTML file")
    parser.add_argument("--width", type=int, default=1200, metavar="N", help="pixels (default: %(default)s)")
    parser.add_argument("--height", type=int, default=900, metavar="N", help="pixels (default: %(default)s)")
    parser.add_argument("--tall", action="store_true", help="as high as the page")
    parser.add_argument("--wait", type=float, default=4.0, metavar="S", help="let the page run so long (default: 4)")
    parser.add_argument("--browser", metavar="FILE", help="default: HYBRIMOE_CHROMIUM or the first Chromium on PATH")
    options = parser.parse_args(argv)
    if min(options.width, options.height) < 100 or max(options.width, options.height) > MOST_PIXELS_HIGH:
        parser.error(f"a picture has 100 to {MOST_PIXELS_HIGH} pixels on each side")
    if options.output and len(options.page) > 1:
        parser.error("-o is for a single page")
    return options


def run(options: argparse.Namespace) -> None:
    browser = find_browser(options.browser)
    for page in options.page:
        address = address_of(page)
        if options.output is None and not address.startswith("file:"):
            raise UsageError("a picture of an address needs a name", "give -o FILE.png")
        output = options.output or Path(page).with_suffix(".png")
        wait_ms = int(1000 * options.wait)
        height = page_height(browser, page, options.width, wait_ms) if options.tall else options.height
        screenshot(browser, page, output, options.width, height, wait_ms)
        print(output)


@as_script
def main(argv: Sequence[str] | None = None) -> int:
    run(parse(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
