"""The sidebar panel in a real browser: live figures, and a model unloaded and loaded from it."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from comfy_client.saving import Batch, job_of
from engine.saving.decode_queue import DecodeQueue
from luna_protocol.save_job import CancelJobs, QueueStatus
from serving.torchserve import TorchServe
from tests.comfyui.browser import Browser, browser
from tests.comfyui.comfyui import ComfyUI, Graph, RunFailed
from tests.comfyui.workflows import empty, encode, remote, sample
from tests.conftest import connect
from tests.engine.saving.save_jobs import a_job

pytestmark = pytest.mark.slow

_LAYOUT = """
const jobs = document.querySelector(".luna-jobs"), name = jobs.querySelector(".luna-short");
return {
  name: name.offsetHeight, font: parseFloat(getComputedStyle(name).fontSize), title: name.title,
  jobs: jobs.clientHeight, "all jobs": jobs.scrollHeight, top: jobs.scrollTop,
};
"""


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
    server = connect(torchserve)
    name = "sd15.vae"
    server.load(name)
    server.wait_ready([name])
    state = page.until(lambda: page.find(".luna-state.luna-up"), "the server's state")[0]
    assert torchserve.inference in state.text
    page.until(lambda: "cpu float32" in _card(page, name) and "MB" in _card(page, name), "the loaded model")
    _screenshot(page, "panel")

    _press(page, name, "unload")
    page.until(lambda: "not loaded" in _card(page, name), "the unloaded model")
    assert name not in server.models()
    _screenshot(page, "panel_unloaded")

    _press(page, name, "load")
    page.until(lambda: "cpu float32" in _card(page, name), "the loaded model")
    assert name in server.models()


def test_a_run_shows_as_busy_workers_and_requests(page: Browser, comfyui: ComfyUI) -> None:
    g = Graph()
    model, clip, _ = remote(g, "sd15.safetensors")
    g.save(sample(g, model, encode(g, clip), empty(g), steps=500), "never")
    prompt = comfyui.start(g)
    comfyui.wait_for_step()
    time.sleep(4)  # two looks of the panel
    states = []
    for _ in range(5):
        time.sleep(1)
        states.append(page.find(".luna-state")[0].text)
    unet = _card(page, "sd15.unet")
    _screenshot(page, "panel_busy")
    comfyui.post("/interrupt")
    with pytest.raises(RunFailed, match="interrupted"):
        comfyui.wait(prompt)
    assert all(re.search(r", [1-9] busy", state) and "0.0 requests/s" not in state for state in states), states
    assert re.search(r", busy(, \d+\.\d requests/s)?$", unet), unet
    page.until(lambda: ", 0 busy" in page.find(".luna-state")[0].text, "the end of the work", 30)
    assert "idle" in _card(page, "sd15.unet")


def test_jobs_and_long_names_leave_room_for_the_rest(page: Browser, torchserve: TorchServe) -> None:
    server = connect(torchserve)
    server.load("sd15.vae")
    server.wait_ready(["sd15.vae"])
    for number in range(19):
        batch = Batch(1, "1", "png", False, latent=torch.zeros(1, 4, 8, 8))
        job, tensors, _ = job_of([batch], {}, save_path="folder" * 15, filename=f"{number}" + "long name" * 20)
        server.call("sd15.vae", job, tensors)
    page.until(lambda: len(page.find(".luna-job img")) > 5, "the pictures")
    page.script("document.querySelector('.luna-counters').scrollIntoView(false)")
    _screenshot(page, "panel_jobs")
    shown = page.script(_LAYOUT)
    assert shown["name"] < 2 * shown["font"] and "long name" in shown["title"]
    assert shown["jobs"] < min(shown["all jobs"], 300)

    page.script("document.querySelector('.luna-jobs').scrollTop = 100")
    time.sleep(3)  # the panel has drawn its jobs anew
    assert page.script(_LAYOUT)["top"] == 100


def test_dead_jobs_are_retried_and_purged_one_by_one_and_all_together(page: Browser, torchserve: TorchServe) -> None:
    home = torchserve.store.parent
    queue = DecodeQueue(home / "spool", home / "output")
    jobs = [a_job() for _ in range(4)]
    for job in jobs:
        queue.submit(job, {"latent0": torch.zeros(1, 4, 4, 4)}, model="not loaded")
        queue.store.fail(queue.store.claim("me", "not loaded"), "the picture is NaN", forever=True)

    def states() -> list[str]:
        known = {job.job_id: job.state for job in queue.report(QueueStatus(limit=1000)).jobs}
        return [known.get(job.job_id, "forgotten") for job in jobs]

    def press(title: str) -> None:
        page.until(lambda: page.find(f'button[title="{title}"]'), title)
        page.script(f"document.querySelector('button[title=\"{title}\"]').click()")

    press(f"retry {jobs[0].job_id}")
    press(f"purge {jobs[1].job_id}")
    page.until(lambda: states() == ["queued", "forgotten", "dead", "dead"], "one retried, one purged")
    press("retry all dead jobs")
    page.until(lambda: states() == ["queued", "forgotten", "queued", "queued"], "all retried")
    queue.store.fail(queue.store.claim("me", "not loaded"), "again", forever=True)
    press("forget all dead jobs, and their latents")
    page.until(lambda: states().count("forgotten") == 2, "the dead one purged")
    queue.cancel(CancelJobs(job_ids=[job.job_id for job in jobs]))
    queue.close()


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


def _screenshot(page: Browser, name: str) -> None:
    if folder := os.environ.get("LUNA_SCREENSHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")
