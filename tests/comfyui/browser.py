"""A headless Chromium on ComfyUI's own page."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,860",
)


class Browser:
    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Open ComfyUI and wait until its app has started."""
        self.driver.get(url)
        self.until(lambda: self.script("return Boolean(window.comfyAPI?.app?.app?.extensionManager)"), "the app")

    def script(self, source: str, *arguments):
        return self.driver.execute_script(source, *arguments)

    def find(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def until(self, condition: Callable[[], object], what: str, seconds: float = 400):
        """The first true value of `condition`, asked again and again."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.2)
        raise TimeoutError(f"{what} did not come within {seconds:.0f} s")

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))


@contextmanager
def browser(chromium: str, chromedriver: str) -> Iterator[Browser]:
    """A fresh profile each time."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.page_load_strategy = "none"  # `Browser.open` waits for what it needs
        driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
        driver.set_script_timeout(300)
        try:
            yield Browser(driver)
        finally:
            driver.quit()
