#!/usr/bin/env python3
"""Takes the pictures of the server's page and of `hybrimoe top` that the README shows.

Starts a server, asks it a question in a headless Chromium, and takes web.png while it answers and top.png from the
snapshot of that moment. Needs chromium, chromedriver and the package selenium.

    python tools/live_pictures.py -o docs/images --serve-options "-c 2048 --device CPU --expert-cache 6"
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

QUESTION = "Tell me a long story about a river and the people who live beside it."
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
TOP_COLUMNS, TOP_ROWS = 100, 40


def start_server(model: str, options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A loaded server on a free port, and its address."""
    command = [sys.executable, "-m", "hybrimoe.cli.main", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"answers at (http://\S+)", line):
            return process, found[1]
    raise SystemExit("".join(lines[-5:]))


def open_browser(profile: str, size: str) -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    for flag in (*FLAGS, f"--window-size={size}", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def picture_of_page(browser: Any, url: str, seconds: float, target: Path) -> None:
    """The page while it answers, `seconds` after the question."""
    browser.get(url + "/")
    time.sleep(2)
    browser.find_element("id", "text").send_keys(QUESTION + "\n")
    time.sleep(seconds)
    browser.save_screenshot(str(target))


def picture_of_top(browser: Any, snapshot: dict[str, Any], target: Path) -> None:
    """The terminal's page of a snapshot, drawn by the browser from rich's SVG."""
    from rich.console import Console

    from hybrimoe.live.view import dashboard

    console = Console(
        record=True, width=TOP_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        highlight=False, emoji=False, markup=False,
    )  # fmt: skip
    console.print(dashboard(snapshot, TOP_COLUMNS, TOP_ROWS, colour=True))
    # Without a font of its own the picture would want one from the network.
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="hybrimoe top"), flags=re.DOTALL)
    svg = svg.replace("Fira Code", "DejaVu Sans Mono")
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None
    width, height = (round(float(n)) for n in box.groups())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "top.html"
        page.write_text(f"<!doctype html><body style='margin:0;width:{width}px;height:{height}px'>{svg}</body>")
        browser.set_window_size(width, height + 200)
        browser.get(page.as_uri())
        time.sleep(0.5)
        browser.find_element("tag name", "svg").screenshot(str(target))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="a GGUF file or a known model's name [default: demo]")
    parser.add_argument("-o", "--output", type=Path, default=Path(), metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=12.0, metavar="S", help="from question to picture")
    parser.add_argument("--size", default="1360,980", metavar="W,H", help="of the browser's window")
    parser.add_argument("--serve-options", default="-c 2048", metavar="OPTIONS", help="for hybrimoe serve, in one word")
    args = parser.parse_args()
    process, url = start_server(args.model, shlex.split(args.serve_options))
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            browser = open_browser(profile, args.size)
            try:
                picture_of_page(browser, url, args.seconds, args.output / "web.png")
                with urllib.request.urlopen(f"{url}/live") as response:
                    snapshot = json.loads(response.read())
                picture_of_top(browser, snapshot, args.output / "top.png")
            finally:
                browser.quit()
    finally:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    for name in ("web.png", "top.png"):
        print(args.output / name, (args.output / name).stat().st_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
