from comfy_client.account import sums

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
