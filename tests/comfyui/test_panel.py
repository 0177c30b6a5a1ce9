"""The sidebar panel in a real browser: live figures, and a model unloaded and loaded from it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfy_client.server import Server
from serving.torchserve import TorchServe
from tests.comfyui.browser import Browser, browser
from tests.comfyui.comfyui import ComfyUI

pytestmark = pytest.mark.slow


@pytest.fixture
def page(comfyui: ComfyUI) -> Iterator[Browser]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver are not on the PATH")
    comfyui.post("/settings", {"Comfy.TutorialCompleted": True})  # or its template browser covers the page
    with browser(chromium, chromedriver) as opened:
        opened.open(comfyui.url)
        opened.until(lambda: opened.find("[class*=luna-tab-button]"), "the panel's icon")[0].click()
        yield opened


def test_the_panel_shows_unloads_and_loads(page: Browser, torchserve: TorchServe) -> None:
    server = Server(torchserve.inference, torchserve.management, torchserve.key_file)
    state = page.until(lambda: page.find(".luna-state.luna-up"), "the server's state")[0]
    assert torchserve.inference in state.text
    name = "sd15_inpaint.unet"
    assert "cpu float32" in _card(page, name) and "MB" in _card(page, name)
    screenshots = Path(os.environ["LUNA_SCREENSHOTS"]) if "LUNA_SCREENSHOTS" in os.environ else None
    if screenshots:
        page.screenshot(screenshots / "panel.png")

    _press(page, name, "unload")
    page.until(lambda: "not loaded" in _card(page, name), "the unloaded model")
    assert name not in server.models()
    if screenshots:
        page.screenshot(screenshots / "panel_unloaded.png")

    _press(page, name, "load")
    page.until(lambda: "cpu float32" in _card(page, name), "the loaded model")
    assert name in server.models()


def test_no_token_reaches_the_browser(page: Browser, torchserve: TorchServe) -> None:
    page.until(lambda: page.find(".luna-model"), "the models")
    told = page.script("return fetch('/luna/status').then((answer) => answer.text())")
    key = torchserve.key_file.read_text().split('"key": "')[1].split('"')[0]
    assert key not in told and key not in page.driver.page_source


def _card(page: Browser, name: str) -> str:
    """What a model's card says, "" while there is none."""
    # One script, as the panel draws its cards anew every other second.
    cards = page.script("return [...document.querySelectorAll('.luna-model')].map((card) => card.innerText)")
    return next((card for card in cards if card.startswith(name)), "")


def _press(page: Browser, name: str, label: str) -> None:
    page.script(f"document.querySelector('button[title=\"{label} {name}\"]').click()")
