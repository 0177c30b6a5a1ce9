from comfy_client.account import Activity, sums
from luna_protocol.messages import Index, ServedModel, Worker

METRICS = """\
# HELP step_cache_hits Torchserve prometheus counter metric
# TYPE step_cache_hits counter
step_cache_hits{ModelName="a.unet",Hostname="h"} 3.0
step_cache_hits{ModelName="b.unet",Hostname="h"} 4.0
ts_queue_latency_microseconds{model_name="a.unet",hostname="h"} 17.5
Requests2XX{Level="Host",Hostname="h"} 9.0
merge_seconds_bucket{ModelName="a.unet",le="0.005"} 1.0
merge_seconds_sum{ModelName="a.unet"} 0.5
decode_queue_depth 2
"""


def test_our_metrics_are_summed_over_models_and_torchserves_left_out():
    assert sums(METRICS) == {"step_cache_hits": 7.0, "merge_seconds_sum": 0.5, "decode_queue_depth": 2.0}


def _index(requests: int, busy: bool = False, pid: int = 7) -> Index:
    worker = Worker(pid=pid, state="ready", device="cpu", requests=requests, busy=busy)
    return Index(models=[ServedModel(name="a.unet", role="unet", workers=[worker])])


def _looks(*looks: tuple[float, Index]) -> dict:
    activity = Activity()
    for now, index in looks:
        [model] = activity.look(index, now)
    return model["workers"][0]


def test_steps_that_take_longer_than_the_time_between_two_looks_are_counted():
    worker = _looks((0, _index(4)), (2, _index(4, True)), (4, _index(5, True)), (6, _index(5, True)))
    assert worker["requests_per_second"] == 1 / 6 and worker["busy"]


def test_a_worker_between_two_quick_steps_is_busy():
    assert _looks((0, _index(4)), (2, _index(90)))["busy"]


def test_a_worker_is_idle_soon_after_its_last_request():
    worker = _looks((0, _index(4)), (2, _index(90)), (4, _index(90)), (6, _index(90)))
    assert not worker["busy"] and worker["requests_per_second"] == 86 / 6
    assert _looks((0, _index(4)), (2, _index(90)), (13, _index(90)))["requests_per_second"] == 0


def test_a_second_look_at_once_does_not_hide_what_is_done():
    worker = _looks((0, _index(4)), (2, _index(8)), (2.01, _index(8)))
    assert worker["busy"] and round(worker["requests_per_second"], 2) == 1.99


def test_the_repository_is_not_busy_with_our_own_asking():
    worker = Worker(pid=7, state="ready", device="cpu", requests=3, busy=True)
    [model] = Activity().look(Index(models=[ServedModel(name="repository", role="repository", workers=[worker])]), 0)
    assert not model["workers"][0]["busy"] and model["workers"][0]["requests"] == 3


def test_a_worker_that_was_started_anew_counts_from_its_own_beginning():
    assert _looks((0, _index(400)), (2, _index(1, pid=8)), (4, _index(3, pid=8)))["requests_per_second"] == 1
