"""Workers agree over files on who takes a device's memory, however many start at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from handlers.worker_state import KEEPER, WorkerState, live_workers
from luna_protocol.errors import Broken, OutOfMemory
from luna_protocol.messages import Worker
from tests.handlers.engine.saving.small_disk import filled, small_disk

MB = 10**6
CLAIM = """
import os, sys
from pathlib import Path
from handlers.worker_state import WorkerState
from luna_protocol.errors import OutOfMemory
from luna_protocol.messages import Worker
state = WorkerState(Path(sys.argv[1]), sys.argv[2], Worker(pid=os.getpid(), state="loading", device="cpu"))
try:
    state.claim(40_000_000, 100_000_000, seconds=float(sys.argv[3]))
    print("took", flush=True)
except OutOfMemory as error:
    print(error, flush=True)
sys.stdin.read()
"""


def start(run: Path, model: str, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", CLAIM, str(run), model, str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def own(run: Path, **fields) -> WorkerState:
    return WorkerState(run, "own", Worker(pid=os.getpid(), state="loading", device="cpu", **fields))


@pytest.mark.slow
def test_of_three_that_start_together_two_get_in_and_the_third_when_one_ends(tmp_path):
    (tmp_path / KEEPER).touch()
    processes = [start(tmp_path, f"model{i}", 60) for i in range(3)]
    try:
        deadline = time.monotonic() + 60
        while True:
            states = {model: workers[0].state for model, workers in live_workers(tmp_path).items()}
            if sorted(states.values()) == ["loading", "loading", "waiting"]:
                break
            assert time.monotonic() < deadline, states
            time.sleep(0.1)
        first = next(i for i in range(3) if states[f"model{i}"] == "loading")
        last = next(i for i in range(3) if states[f"model{i}"] == "waiting")
        end(processes[first])
        assert processes[last].stdout.readline() == "took\n"
    finally:
        for process in processes:
            end(process)


def test_a_refusal_names_what_is_there_and_what_would_help(tmp_path):
    state = own(tmp_path)
    with pytest.raises(OutOfMemory, match=r"own needs 0\.20 GB on cpu, whose budget of 0\.10 GB.*nothing.*unload"):
        state.claim(200 * MB, 100 * MB, seconds=0)


def test_devices_have_budgets_of_their_own(tmp_path):
    first = own(tmp_path, assigned_gpu=0, weights_bytes=90 * MB)
    record = json.loads(first.path.read_text())
    record["worker"]["pid"], record["started"] = os.getppid(), psutil.Process(os.getppid()).create_time()
    (first.folder / "other.json").write_text(json.dumps(record))
    own(tmp_path, assigned_gpu=1).claim(50 * MB, 100 * MB, seconds=0)
    assert live_workers(tmp_path)["own"][0].state == "loading"
    with pytest.raises(OutOfMemory, match=r"holds own 90\.0 MB"):
        own(tmp_path, assigned_gpu=0).claim(50 * MB, 100 * MB, seconds=0)


def test_what_was_held_back_is_written_a_moment_later(tmp_path):
    state = own(tmp_path)
    for number in range(5):
        state.update(requests=number)
    assert json.loads(state.path.read_text())["worker"]["requests"] == 0
    time.sleep(1.3)
    assert json.loads(state.path.read_text())["worker"]["requests"] == 4


def dies(run: Path) -> None:
    """A worker of the model "own" that is killed while it loads."""
    record = json.loads(own(run).path.read_text())
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record["worker"]["pid"], record["started"] = process.pid, psutil.Process(process.pid).create_time()
    (run / "workers" / f"{process.pid}.json").write_text(json.dumps(record))
    end(process)


def test_a_model_that_killed_three_workers_is_not_loaded_a_fourth_time_but_a_fifth(tmp_path):
    for _ in range(2):
        dies(tmp_path)
    own(tmp_path).check_deaths()
    dies(tmp_path)
    with pytest.raises(Broken, match="own was not loaded: 3 workers in a row died"):
        own(tmp_path).check_deaths()
    own(tmp_path).check_deaths()


def test_a_worker_that_loads_clears_the_deaths_before_it(tmp_path):
    for _ in range(2):
        dies(tmp_path)
    own(tmp_path).loaded(1)
    dies(tmp_path)
    own(tmp_path).check_deaths()
    assert list(live_workers(tmp_path)) == ["own"]


def test_a_full_disk_stops_no_request_and_lets_nobody_load_unseen(tmp_path):
    with small_disk(tmp_path / "run", megabytes=1) as run:
        state = own(run)
        state.loaded(40 * MB)
        with filled(run):
            time.sleep(1.1)
            state.update(busy=True)
            state.update(now=True, requests=7)
            with pytest.raises(OSError, match="No space left"):
                state.claim(50 * MB, 100 * MB)
        state.update(now=True, busy=False)
        assert live_workers(run)["own"][0].requests == 7
