"""What a save job may say."""

import pytest

from luna_protocol.errors import Impossible, Malformed
from luna_protocol.messages import parse_request
from luna_protocol.save_job import CancelJobs, PurgeJobs, QueueStatus, SaveJob

JOB = {
    "kind": "decode_and_save",
    "job_id": "0123456789abcdef",
    "groups": [{"source": "latent", "tensor": "a"}],
    "created": 1.5,
}


def parsed(**fields) -> SaveJob:
    return parse_request(JOB | fields, (SaveJob,))


def test_a_job_says_little_and_means_the_defaults():
    job = parsed()
    assert (job.png_compression, job.lossy_quality, job.lossless_webp, job.embed_workflow) == (4, 90, False, True)
    assert (job.groups[0].format, job.groups[0].subdir) == ("webp", True)
    assert job.filename == "%time:YYYY_mm_dd.HH.MM.SS%_%model_name%"
    assert SaveJob.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize(
    "fields",
    [
        {"png_compression": 10},
        {"lossy_quality": 69},
        {"lossy_quality": 101},
        {"filename_index": 10_001},
        {"min_quality": 1.1},
        {"min_quality": float("nan")},
        {"priority": 101},
        {"created": -1},
        {"created": float("inf")},
        {"job_id": "short"},
        {"job_id": "UPPERCASE"},
        {"job_id": "../../etc/passwd"},
        {"client": ""},
        {"client": "nul \0"},
        {"filename": "x" * 513},
        {"groups": []},
        {"groups": [{"source": "latent", "tensor": f"t{n}"} for n in range(11)]},
        {"groups": [{"source": "latent", "tensor": "a"}, {"source": "image", "tensor": "a"}]},
        {"groups": [{"source": "latent", "tensor": "a", "affix": "x" * 65}]},
        {"extra_pnginfo": {"key\nwith newline": 1}},
        {"extra_pnginfo": {" spaced": 1}},
        {"extra_pnginfo": {"k" * 80: 1}},
        {"extra_pnginfo": {"": 1}},
        {"metadata": {str(n): n for n in range(257)}},
    ],
)
def test_values_out_of_range_are_impossible(fields):
    with pytest.raises(Impossible):
        parsed(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"unknown": 1},
        {"groups": [{"source": "video", "tensor": "a"}]},
        {"groups": [{"source": "latent", "tensor": "a", "format": "gif"}]},
        {"groups": "a"},
        {"save_mode": "cloud"},
        {"created": None},
        {"metadata": [1]},
    ],
)
def test_what_is_not_a_job_is_malformed(fields):
    with pytest.raises(Malformed):
        parsed(**fields)


def test_the_other_requests():
    assert parse_request({"kind": "queue_status"}, (QueueStatus,)).limit == 50
    assert parse_request({"kind": "purge"}, (PurgeJobs,)).states == ["done", "cancelled"]
    with pytest.raises(Impossible):
        parse_request({"kind": "cancel", "job_ids": []}, (CancelJobs,))
    with pytest.raises(Malformed):
        parse_request({"kind": "purge", "states": ["running"]}, (PurgeJobs,))
