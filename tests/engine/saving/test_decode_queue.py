"""The queue does what it accepts, in the order it promises, and says what it cannot do."""

import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.job_store import Limits
from engine.saving.picture_records import PictureRecords
from luna_protocol.errors import Impossible, Malformed, TooLarge, Unavailable
from luna_protocol.save_job import CancelJobs, Heatmap, PictureGroup, PurgeJobs, QueueStatus, RetryJobs
from tests.engine.saving.save_jobs import a_job, check_complete, decode, files_under, latents, wait_for


@pytest.fixture
def make_queue(tmp_path):
    """Makes queues on one spool and one output folder, each with a worker, and ends them."""
    made = []

    def make(decode=decode, start=True, limits=None, **options) -> tuple[DecodeQueue, DecodeWorker]:
        queue = DecodeQueue(tmp_path / "spool", tmp_path / "output", limits)
        records = PictureRecords(f"sqlite:///{tmp_path / 'pictures.sqlite3'}")
        worker = DecodeWorker(queue, decode, records=records, **options)
        made.append((queue, worker, records))
        if start:
            worker.start()
        return queue, worker

    yield make
    for queue, worker, records in made:
        worker.stop()
        queue.close()
        records.close()


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "output"


class Gate:
    """A decoder that waits until it is let go, and remembers in which order it was asked."""

    def __init__(self):
        self.open, self.entered, self.order = threading.Event(), threading.Event(), []

    def __call__(self, latent):
        self.entered.set()
        assert self.open.wait(30)
        self.order.append(round(float(latent[0, 0, 0, 0]), 3))
        return decode(latent)


def marked(job, mark: float):
    return {group.tensor: torch.full((1, 4, 2, 2), mark) for group in job.groups}


def test_five_groups_become_the_promised_files(make_queue, output):
    queue, _ = make_queue()
    job = a_job("png", "png16", "webp", "jpeg", "png", filename="%model_dir%/%model_name%_%width%x%height%")
    reply = queue.submit(job, latents(job, rows=2))
    assert reply.files[:3] == ["a/b_32x32_AFFIX0_00.png", "a/b_32x32_AFFIX0_01.png", "a/AFFIX1/b_32x32_AFFIX1_00.png"]
    assert reply.state == "queued" and reply.position == 0
    check_complete(output, wait_for(queue, job))
    assert files_under(output) == set(reply.files)


def test_the_picture_is_the_one_that_was_sent(make_queue, output):
    rows = []
    queue, _ = make_queue(lambda latent: rows.append(len(latent)) or decode(latent))
    job = a_job("png")
    tensors = latents(job, rows=3)
    reply = queue.submit(job, tensors)
    wait_for(queue, job)
    assert rows == [1, 1, 1], "a batch of large pictures would take the memory of all of them at once"
    for row, path in enumerate(reply.files):
        saved = torch.frombuffer(bytearray(Image.open(output / path).tobytes()), dtype=torch.uint8).reshape(32, 32, 3)
        assert torch.equal(saved, (decode(tensors["latent0"])[row] * 255).to(torch.uint8))


def test_images_and_heatmaps_are_saved_as_sent(make_queue, output):
    queue, _ = make_queue()
    group = PictureGroup(source="image", tensor="image", format="png")
    heatmaps = [
        Heatmap(tensor=f"{stage}.{polarity}", polarity=polarity, stage=stage, label="a cat")
        for stage in ("original", "modified")
        for polarity in ("positive", "negative")
    ]
    job = a_job(groups=[group], heatmaps=heatmaps, filename="x")
    tensors = {"image": torch.zeros(1, 16, 24, 4, dtype=torch.uint8)}
    tensors |= {part.tensor: torch.rand(8, 8) for part in heatmaps}
    reply = queue.submit(job, tensors)
    status = wait_for(queue, job)
    check_complete(output, status)
    assert [file.kind for file in status.files] == ["picture", "heatmaps"]
    saved = safetensors.torch.load_file(output / reply.files[1])
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {
        part.tensor: tensors[part.tensor].tolist() for part in heatmaps
    }


def test_a_job_sent_again_is_not_done_again(make_queue, output):
    queue, _ = make_queue()
    job = a_job("png")
    first = queue.submit(job, latents(job))
    wait_for(queue, job)
    again = queue.submit(job, latents(job))
    assert again.files == first.files and again.state == "done"
    assert len(files_under(output)) == 1
    with pytest.raises(Malformed, match="another job"):
        queue.submit(job, latents(job, seed=1))


def test_one_job_sent_by_many_at_once_is_one_job(make_queue, output):
    queues = [make_queue()[0], make_queue()[0]]
    job = a_job("png")
    replies = []
    threads = [
        threading.Thread(target=lambda queue=queue: replies.append(queue.submit(job, latents(job))))
        for queue in queues * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 8 and len({tuple(reply.files) for reply in replies}) == 1
    wait_for(queues[0], job)
    assert len(files_under(output)) == 1


def test_names_never_collide(make_queue, output):
    queue, worker = make_queue(start=False)
    (output / "X_affix0_00001.PNG").touch()
    (output / "x_AFFIX0.png").write_text("a picture that was there before")
    promised = [queue.submit(job, latents(job)).files[0] for job in (a_job(filename="x") for _ in range(5))]
    promised.append(queue.submit(job := a_job(filename="X"), latents(job)).files[0])
    assert promised[0] == "x_AFFIX0_00001.png", "Linux tells case apart, the names of jobs do not"
    assert len({name.casefold() for name in promised}) == 6
    worker.start()
    wait_for(queue, job)
    assert (output / "x_AFFIX0.png").read_text() == "a picture that was there before"


def test_a_name_taken_after_it_was_promised_is_left_alone(make_queue, output):
    gate = Gate()
    queue, _ = make_queue(gate)
    job = a_job("png", filename="x")
    promised = queue.submit(job, latents(job)).files[0]
    (output / promised).write_text("somebody else's")
    gate.open.set()
    status = wait_for(queue, job)
    check_complete(output, status)
    assert (output / promised).read_text() == "somebody else's"
    assert files_under(output) == {promised, status.files[0].path} and status.files[0].path != promised


def test_priority_first_then_clients_take_turns(make_queue):
    gate = Gate()
    queue, _ = make_queue(gate)
    queue.submit(blocker := a_job(client="z"), marked(blocker, 0.9))
    gate.entered.wait(30)
    for client, mark in [("a", 0.1), ("a", 0.2), ("a", 0.3), ("b", 0.4), ("b", 0.5), ("a", 0.6), ("c", 0.7)]:
        queue.submit(job := a_job(client=client, priority=int(mark == 0.6)), marked(job, mark))
    gate.open.set()
    wait_for(queue, job)
    while sum(queue.report(QueueStatus()).counts[state] for state in ("queued", "running")):
        time.sleep(0.02)
    # The urgent one of a; then b and c, who had no turn yet; then a and b alternate.
    assert gate.order == [0.9, 0.6, 0.4, 0.7, 0.1, 0.5, 0.2, 0.3]


def test_decoding_goes_on_while_the_former_is_written(make_queue, monkeypatch):
    both = threading.Barrier(2, timeout=20)
    from engine.saving import job_work

    write_part, calls = job_work.write_part, []

    def slow_write(*arguments):
        if not calls:
            calls.append(1)
            both.wait()
        return write_part(*arguments)

    def second_decode(latent):
        if float(latent.flatten()[0]) == 2:
            both.wait()
        return decode(latent).clamp(0, 1)

    monkeypatch.setattr(job_work, "write_part", slow_write)
    queue, _ = make_queue(second_decode)
    for mark in (1.0, 2.0):
        queue.submit(job := a_job(), marked(job, mark))
    wait_for(queue, job)


def test_no_further_job_is_decoded_while_many_bytes_are_not_written(make_queue, monkeypatch):
    from engine.saving import decode_worker, job_work

    write_part, open_, writing, decoded = job_work.write_part, threading.Event(), threading.Event(), []

    def slow_write(*arguments):
        writing.set()
        assert open_.wait(30)
        return write_part(*arguments)

    monkeypatch.setattr(job_work, "write_part", slow_write)
    monkeypatch.setattr(decode_worker, "_UNWRITTEN_BYTES", 1000)
    queue, _ = make_queue(lambda latent: decoded.append(1) or decode(latent))
    for _ in range(3):
        queue.submit(job := a_job(), latents(job))
    assert writing.wait(30)
    time.sleep(0.5)
    assert len(decoded) == 1
    open_.set()
    wait_for(queue, job)
    assert len(decoded) == 3


def test_a_full_queue_says_when_to_come_back(make_queue):
    queue, _ = make_queue(start=False, limits=Limits(jobs=2))
    for _ in range(2):
        queue.submit(job := a_job(), latents(job))
    with pytest.raises(Unavailable, match="2 of 2 jobs") as refused:
        queue.submit(other := a_job(), latents(other))
    assert refused.value.retry_after >= 1
    assert queue.submit(job, latents(job)).job_id == job.job_id, "what was accepted stays accepted"


def test_bytes_are_bounded_too(make_queue):
    queue, _ = make_queue(start=False, limits=Limits(bytes=3000))
    with pytest.raises(TooLarge):
        queue.submit(job := a_job(), latents(job, size=32))
    queue.submit(job := a_job(), latents(job))
    with pytest.raises(Unavailable, match="of 3000 bytes"):
        for _ in range(9):
            queue.submit(job := a_job(), latents(job))


def test_dead_jobs_do_not_keep_others_out_and_the_oldest_of_too_many_are_forgotten(make_queue, caplog):
    def broken(latent):
        raise ValueError("no picture")

    queue, _ = make_queue(broken, limits=Limits(bytes=4500, attempts=1))
    dead = [a_job() for _ in range(8)]
    for job in dead:
        queue.submit(job, latents(job))
        wait_for(queue, job, "dead")
    report = queue.report(QueueStatus(states=["dead"]))
    kept = [status.job_id for status in report.jobs]
    assert report.bytes == 0, "they do not count against the limit"
    assert 1 < len(kept) < 8 and kept == [job.job_id for job in reversed(dead)][: len(kept)]
    assert f"forgetting job {dead[0].job_id}" in caplog.text and "no picture" in caplog.text


def test_dead_jobs_are_bounded_in_number_too(make_queue):
    queue, _ = make_queue(lambda latent: 1 / 0, limits=Limits(jobs=3, attempts=1))
    for _ in range(5):
        queue.submit(job := a_job(), latents(job))
        wait_for(queue, job, "dead")
    assert queue.report(QueueStatus()).counts["dead"] == 3


def test_all_dead_jobs_are_tried_again_at_once(make_queue, output):
    failing = [1, 2, 3]
    queue, _ = make_queue(
        lambda latent: decode(latent) if not failing else failing.pop() / 0, limits=Limits(attempts=1)
    )
    jobs = [a_job() for _ in range(3)]
    for job in jobs:
        queue.submit(job, latents(job))
        wait_for(queue, job, "dead")
    assert queue.retry(RetryJobs()).changed == [job.job_id for job in jobs]
    for job in jobs:
        check_complete(output, wait_for(queue, job))
    assert queue.retry(RetryJobs()).changed == []


def test_failures_are_tried_again_and_then_dead_with_their_reason(make_queue, output):
    failing, tries = threading.Event(), []
    failing.set()

    def moody(latent):
        tries.append(time.monotonic())
        if failing.is_set():
            raise RuntimeError("the device is in a mood")
        return decode(latent)

    queue, _ = make_queue(moody, limits=Limits(attempts=3, backoff=0.2))
    reply = queue.submit(job := a_job(), latents(job))
    status = wait_for(queue, job, "dead")
    assert status.reason == "RuntimeError: the device is in a mood" and status.attempts == 3
    assert tries[1] - tries[0] >= 0.2 and tries[2] - tries[1] >= 0.4, "the second pause is twice the first"
    assert files_under(output) == set()
    failing.clear()
    assert queue.retry(RetryJobs(job_ids=[job.job_id, "never-seen"])).unchanged.keys() == {"never-seen"}
    check_complete(output, wait_for(queue, job))
    assert files_under(output) == set(reply.files)
    assert queue.retry(RetryJobs(job_ids=[job.job_id])).unchanged == {job.job_id: "the job is done"}


def test_a_decode_to_nan_is_dead_at_once_and_can_be_retried(make_queue, output):
    nan = [True]
    queue, _ = make_queue(lambda latent: decode(latent) * (float("nan") if nan.pop() else 1.0))
    queue.submit(job := a_job(), latents(job))
    status = wait_for(queue, job, "dead")
    assert "NaN" in status.reason and status.attempts == 1 and files_under(output) == set()
    nan.append(False)
    queue.retry(RetryJobs(job_ids=[job.job_id]))
    wait_for(queue, job)


def test_the_worker_survives_a_decoder_of_wrong_shape(make_queue):
    wrong = [True]
    queue, _ = make_queue(lambda latent: decode(latent)[:, :8] if wrong and wrong.pop() else decode(latent))
    queue.submit(bad := a_job(), latents(bad))
    queue.submit(good := a_job(), latents(good))
    assert "was due" in wait_for(queue, bad, "dead").reason
    wait_for(queue, good)


def test_the_worker_survives_a_decoder_of_wrong_count_and_a_broken_observer(make_queue, output):
    wrong = [True]

    def broken(name, seconds):
        raise RuntimeError(name)

    queue, _ = make_queue(lambda latent: decode(latent)[: 0 if wrong and wrong.pop() else None], observe=broken)
    queue.submit(bad := a_job(), latents(bad, rows=3))
    assert "0 pictures" in wait_for(queue, bad, "dead").reason and files_under(output) == set()
    queue.submit(good := a_job(), latents(good))
    check_complete(output, wait_for(queue, good))


def test_cancelled_jobs_leave_nothing(make_queue, output):
    gate = Gate()
    queue, _ = make_queue(gate)
    queue.submit(running := a_job(), latents(running))
    gate.entered.wait(30)
    queue.submit(waiting := a_job(), latents(waiting))
    changed = queue.cancel(CancelJobs(job_ids=[running.job_id, waiting.job_id]))
    assert set(changed.changed) == {running.job_id, waiting.job_id}
    gate.open.set()
    queue.submit(last := a_job(), latents(last))
    wait_for(queue, last)
    assert len(files_under(output)) == 1 and len(gate.order) == 2
    assert queue.cancel(CancelJobs(job_ids=[last.job_id])).unchanged == {last.job_id: "the job is done"}
    assert queue.report(QueueStatus()).counts["cancelled"] == 2


def test_purged_jobs_are_forgotten_and_their_pictures_stay(make_queue, output):
    queue, _ = make_queue()
    queue.submit(job := a_job(), latents(job))
    wait_for(queue, job)
    assert queue.purge(PurgeJobs(older_than=60)).changed == []
    assert queue.purge(PurgeJobs(job_ids=[job.job_id], states=["dead"])).unchanged == {job.job_id: "it is not dead"}
    assert queue.purge(PurgeJobs()).changed == [job.job_id]
    assert queue.report(QueueStatus()).jobs == [] and len(files_under(output)) == 1


def test_rejected_pictures_go_to_their_folder(make_queue, output):
    queue, _ = make_queue()
    job = a_job("png", "png", filename="x", quality_gate="variance")
    tensors = {"latent0": torch.full((1, 4, 8, 8), 0.5), "latent1": latents(job, size=8)["latent1"]}
    queue.submit(job, tensors)
    flat, lively = wait_for(queue, job).files
    assert (flat.path, flat.discarded, flat.quality) == ("_discarded/x_AFFIX0.png", True, 0.0)
    assert (lively.path, lively.discarded) == ("AFFIX1/x_AFFIX1.png", False) and lively.quality > 0.3
    assert files_under(output) == {flat.path, lively.path}


@pytest.mark.parametrize(
    ("fields", "tensors", "error", "told"),
    [
        ({"save_path": "../elsewhere"}, {}, Malformed, "leaves the output folder"),
        ({"save_path": "/etc"}, {}, Malformed, "absolute"),
        ({}, {"latent0": torch.zeros(1, 3, 4, 4)}, Malformed, r"\[B, 4, h, w\]"),
        ({}, {"latent0": torch.zeros(1, 4, 4, 4, dtype=torch.int8)}, Malformed, "int8"),
        ({}, {"latent0": torch.zeros(1, 4, 4, 4, dtype=torch.float8_e4m3fn)}, Malformed, "float8"),
        ({}, {"latent0": torch.zeros(64, 4, 300, 300)}, TooLarge, "pixels"),
        ({}, {"latent0": torch.full((1, 4, 4, 4), float("nan"))}, Impossible, "NaN"),
        ({}, {"latent0": torch.zeros(4097, 4, 1, 1)}, Impossible, "4097 pictures"),
        ({}, {"latent0": torch.zeros(0, 4, 4, 4)}, Impossible, "0 pictures"),
        ({}, {"other": torch.zeros(1, 4, 4, 4)}, Malformed, "other"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(make_queue, fields, tensors, error, told):
    queue, _ = make_queue(start=False)
    job = a_job("png", **fields)
    with pytest.raises(error, match=told):
        queue.submit(job, tensors or latents(job))
    assert queue.report(QueueStatus()).jobs == []


def test_a_worker_takes_only_jobs_of_its_model(make_queue):
    queue, _ = make_queue(model="sd15")
    queue.submit(other := a_job(), latents(other), "sdxl")
    queue.submit(own := a_job(), latents(own), "sd15")
    wait_for(queue, own)
    waiting = wait_for(queue, other, "queued")
    assert waiting.position == 0 and waiting.reason == "no VAE of sdxl is loaded here"
    assert not wait_for(queue, own).reason
    make_queue(model="sdxl")
    wait_for(queue, other)


def test_two_workers_share_one_spool(make_queue, output):
    done_by = ([], [])
    queues = [
        make_queue(lambda latent, who=who: (who.append(1), time.sleep(0.02), decode(latent))[2])[0] for who in done_by
    ]
    jobs = [a_job("png") for _ in range(40)]
    for n, job in enumerate(jobs):
        queues[n % 2].submit(job, latents(job))
    for job in jobs:
        check_complete(output, wait_for(queues[0], job))
    assert all(done_by) and sum(map(len, done_by)) == 40, "each did some, and none was done twice"
    assert len(files_under(output)) == 40


def test_a_decode_longer_than_the_lease_is_not_started_again(make_queue, output):
    gate = Gate()
    slow, _ = make_queue(gate, limits=Limits(lease=0.4))
    slow.submit(job := a_job("png"), latents(job))
    gate.entered.wait(30)
    other, _ = make_queue(gate, limits=Limits(lease=0.4))
    time.sleep(1.2)
    assert wait_for(other, job, "queued", "running").attempts == 1
    gate.open.set()
    check_complete(output, wait_for(slow, job))
    assert len(gate.order) == 1


def test_a_job_whose_worker_stands_still_is_taken_over_and_done_once(make_queue, output, monkeypatch):
    gate = Gate()
    stuck, stuck_worker = make_queue(gate, limits=Limits(lease=0.3))
    monkeypatch.setattr(stuck.store, "renew", lambda claims: None)
    stuck.submit(job := a_job("png", "webp"), latents(job))
    gate.entered.wait(30)
    healthy, _ = make_queue(limits=Limits(lease=600))
    status = wait_for(healthy, job)
    check_complete(output, status)
    gate.open.set()
    stuck_worker.stop()
    assert len(gate.order) == 2, "the slow worker went on to the end of its decode"
    check_complete(output, wait_for(healthy, job))
    assert files_under(output) == {file.path for file in status.files}


def test_the_spool_gives_its_space_back(make_queue, tmp_path):
    queue, _ = make_queue()
    for _ in range(6):
        queue.submit(job := a_job(), latents(job, size=256))
    assert (tmp_path / "spool" / "jobs.sqlite3-wal").stat().st_size > 6 << 20
    wait_for(queue, job, seconds=60)
    until = time.monotonic() + 10
    while (tmp_path / "spool" / "jobs.sqlite3").stat().st_size > 2 << 20:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_worker_goes_on_when_its_database_fails_for_a_while(make_queue, output, monkeypatch):
    queue, worker = make_queue(start=False)
    failing, claim = [1, 2], queue.store.claim

    def flaky(*arguments):
        if failing:
            failing.pop()
            raise RuntimeError("no database")
        return claim(*arguments)

    monkeypatch.setattr(queue.store, "claim", flaky)
    worker.start()
    queue.submit(job := a_job(), latents(job))
    check_complete(output, wait_for(queue, job))
    assert not failing


def test_a_failure_that_cannot_be_written_down_is_found_again(make_queue, output, monkeypatch):
    queue, _ = make_queue(lambda latent: decode(latent) if worked else worked.append(1) or 1 / 0)
    worked, failing, fail = [], [1], queue.store.fail

    def flaky(*arguments, **options):
        if failing:
            failing.pop()
            raise RuntimeError("no database")
        return fail(*arguments, **options)

    monkeypatch.setattr(queue.store, "fail", flaky)
    queue.submit(job := a_job(), latents(job))
    check_complete(output, wait_for(queue, job))
    assert not failing


def test_figures_and_status(make_queue):
    gate, told = Gate(), []
    queue, _ = make_queue(gate, observe=lambda name, seconds: told.append((name, seconds)))
    before = queue.report(QueueStatus())
    assert before.estimated_wait is None and before.counts["done"] == 0
    queue.submit(job := a_job(client="me"), latents(job))
    gate.entered.wait(30)
    queue.submit(second := a_job(client="you"), latents(second))
    report = queue.report(QueueStatus())
    assert (report.counts["running"], report.counts["queued"]) == (1, 1) and report.bytes > 0
    assert [status.job_id for status in report.jobs] == [second.job_id, job.job_id]
    assert report.jobs[0].position == 0
    gate.open.set()
    for each in (job, second):
        wait_for(queue, each)
    report = queue.report(QueueStatus(client="me", thumbnails=True))
    assert [status.job_id for status in report.jobs] == [job.job_id]
    assert report.jobs[0].files[0].thumbnail.startswith("/9j/"), "a JPEG in base64"
    assert report.throughput > 0 and report.estimated_wait == 0 and report.bytes == 0
    assert {name for name, _ in told} == {"queue_wait", "decode", "write", "total"}
    assert all(seconds >= 0 for _, seconds in told)
