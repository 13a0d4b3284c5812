"""The page in a real browser: skipped where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
_MISSING = "no chromium with chromedriver (apt install chromium chromium-driver), or no selenium"
if os.environ.get("HYBRIMOE_REQUIRE_BROWSER") and not (CHROMIUM and DRIVER):
    raise RuntimeError(_MISSING)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=_MISSING)]
selenium = pytest.importorskip("selenium", reason=_MISSING)

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1360,900",
)  # fmt: skip
_PATIENCE_S = 60


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def wait(browser: Any, condition: str) -> Any:
    """Waits until the JavaScript expression is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, _PATIENCE_S).until(lambda d: d.execute_script(f"return {condition}"))


def text_of(browser: Any, selector: str) -> str:
    return str(browser.execute_script(f"return document.querySelector({selector!r}).textContent"))


def test_a_question_is_answered_and_the_view_moves(browser: Any, server: Any) -> None:
    browser.get(server.url + "/")
    wait(browser, "document.getElementById('phase').dataset.phase === 'idle'")
    assert "8 experts" in text_of(browser, "#shape")
    field = browser.find_element("id", "text")
    field.send_keys("<b>hello</b>\n")
    wait(browser, "document.querySelector('.message.assistant small') !== null || document.querySelector('.error')")
    assert browser.execute_script("return document.querySelector('.error')") is None
    assert text_of(browser, ".message.user") == "<b>hello</b>", "text, not HTML"
    assert "t/s" in text_of(browser, ".message.assistant small")
    wait(browser, "document.getElementById('split-text').textContent.includes('CPU 100 %')")
    painted = (
        "(() => { const c = document.getElementById('heat');"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " const colours = Array.from({length: d.length / 4}, (_, i) => d.slice(4 * i, 4 * i + 3).join());"
        " return new Set(colours).size > 3; })()"
    )
    wait(browser, painted)
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, "neither errors nor anything that the policy forbids"


def test_an_answer_can_be_stopped_and_the_chat_cleared(browser: Any, server: Any) -> None:
    browser.get(server.url + "/")
    wait(browser, "document.getElementById('phase').dataset.phase === 'idle'")
    before = server.ask("/live")[1]["requests"]
    browser.find_element("id", "text").send_keys("hello\n")
    browser.execute_script("document.getElementById('stop').click()")
    wait(browser, "document.getElementById('stop').hidden")
    n_before = before["done"] + before["cancelled"]
    server.wait_until(lambda s: s["requests"]["done"] + s["requests"]["cancelled"] > n_before)
    browser.find_element("id", "clear").click()
    assert browser.execute_script("return document.querySelectorAll('.message').length") == 0


def test_a_key_is_asked_for(browser: Any, serve: Any, tiny_model: Any, tmp_path: Path) -> None:
    server = serve(str(tiny_model("mixtral")), LLAMA_API_KEY="sesame").wait_until_ready()
    browser.get(server.url + "/")
    wait(browser, "!document.getElementById('key-form').hidden")
    browser.find_element("id", "key").send_keys("sesame\n")
    wait(browser, "document.getElementById('phase').dataset.phase === 'idle'")
    assert "sesame" not in browser.page_source


def test_a_narrow_window_needs_no_sideways_scrolling(browser: Any, server: Any) -> None:
    browser.set_window_size(400, 800)
    try:
        browser.get(server.url + "/")
        wait(browser, "document.getElementById('phase').dataset.phase === 'idle'")
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        browser.set_window_size(1360, 900)
