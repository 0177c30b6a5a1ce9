"""What a client sends to have pictures decoded and saved, and what it may ask about them afterwards."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, StringConstraints, model_validator

from luna_protocol.messages import Message, Name, Request

# Lower case only: ids that differ in case alone must not meet in one file name on Windows or macOS.
JobId = Annotated[str, StringConstraints(pattern=r"^[0-9a-z][0-9a-z_-]{7,63}$")]
Client = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]{1,64}$")]
MAX_TEMPLATE, MAX_AFFIX = 512, 64
Template = Annotated[str, StringConstraints(max_length=MAX_TEMPLATE)]
PictureFormat = Literal["png", "png16", "webp", "jpeg"]
JobState = Literal["queued", "running", "done", "dead", "cancelled"]
# PNG's rule for the keyword of a text chunk, less Latin-1, which EXIF has not: no space at either end, at most 79.
Keyword = Annotated[str, StringConstraints(pattern=r"^[!-~](?:[ -~]{0,77}[!-~])?$")]


class PictureGroup(Message):
    """One batch of pictures of a job.

    Args:
        source: "latent", then the tensor is [B, C, h, w] in ComfyUI's LATENT space; or "image", then it is
            [B, H, W, 3 or 4], floating 0..1 or uint8.
        tensor: its name in the blob.
        affix: goes into the file's name and, with `subdir`, names a folder of its own; may hold template variables.
        format: png16 is a PNG of 16 bits a channel.
    """

    source: Literal["latent", "image"]
    tensor: Name
    affix: Annotated[str, StringConstraints(max_length=MAX_AFFIX)] = ""
    format: PictureFormat = "webp"
    subdir: bool = True


class Heatmap(Message):
    """A DAAM attention heatmap, [h, w] or [B, h, w]: of `label`'s words in the prompt or the negative prompt, before
    (original) or after (modified) the prompt was changed."""

    tensor: Name
    polarity: Literal["positive", "negative"]
    stage: Literal["original", "modified"]
    label: Annotated[str, StringConstraints(max_length=128)] = ""


class SaveJob(Request):
    """Decode (where they are latents) and save up to ten batches of pictures; answered at once by `SaveAccepted`.

    Tensors: one per group and per heatmap, named there.

    Args:
        job_id: made by the client. Sent again, the same job is not done again, its reply is the same.
        client: whose job it is; clients of one priority take turns.
        priority: higher goes first.
        save_path: folder under the output root; may hold template variables.
        filename: %model_name% %model_path% %model_dir% %index% %time:YYYY_mm_dd.HH.MM.SS% %seed% %width% %height%
            %batch%, and those of ComfyUI's Save Image: %date:yyyy-MM-dd% %year% %month% %day% %hour% %minute% %second%
            %batch_num%. Others stay as they are.
        save_mode: "database_store" also writes a row per picture.
        min_quality: 0..1; pictures that score lower in `quality_gate` go to a `_discarded` folder.
        png_compression: 0 (stored) to 9 (smallest).
        lossy_quality: of jpeg and of webp when not `lossless_webp`.
        embed_workflow: write `prompt` and `extra_pnginfo` into the picture, as ComfyUI's SaveImage does.
        embed_metadata: False leaves pictures without any metadata.
        filename_index: what %index% shows.
        metadata: of the generation (model, positive, seed, steps ...): fills template variables and database fields.
        created: seconds since 1970; %time% shows it in the server's time zone.
    """

    kind: Literal["decode_and_save"] = "decode_and_save"
    job_id: JobId
    client: Client = "anonymous"
    priority: int = Field(default=0, ge=-100, le=100)
    groups: list[PictureGroup] = Field(min_length=1, max_length=10)
    heatmaps: list[Heatmap] = Field(default=[], max_length=64)
    save_path: Template = ""
    filename: Template = "%time:YYYY_mm_dd.HH.MM.SS%_%model_name%"
    save_mode: Literal["daemon", "database_store"] = "daemon"
    quality_gate: Literal["disabled", "variance", "edge_density", "both"] = "disabled"
    min_quality: float = Field(default=0.3, ge=0, le=1, allow_inf_nan=False)
    png_compression: int = Field(default=4, ge=0, le=9)
    lossy_quality: int = Field(default=90, ge=70, le=100)
    lossless_webp: bool = False
    embed_workflow: bool = True
    embed_metadata: bool = True
    filename_index: int = Field(default=0, ge=0, le=10_000)
    custom_metadata: Annotated[str, StringConstraints(max_length=100_000)] = ""
    metadata: dict[Name, JsonValue] = Field(default={}, max_length=256)
    prompt: JsonValue = None
    extra_pnginfo: dict[Keyword, JsonValue] = Field(default={}, max_length=64)
    created: float = Field(ge=0, le=32_000_000_000, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_tensor_each(self) -> "SaveJob":
        names = [part.tensor for part in (*self.groups, *self.heatmaps)]
        if len(set(names)) < len(names):
            raise ValueError(f"a tensor is named twice among {names}")
        return self


class SaveAccepted(Message):
    """The job is on disk and will be done, whatever dies (HTTP status 202).

    files: paths under the output root, in the order of groups and batch rows. position: jobs before this one, 0 is
    next.
    warnings: what will be saved otherwise than asked, such as a workflow that JPEG's 64 KB cannot hold, or a batch row
    with NaN, which makes no picture.
    """

    kind: Literal["save_accepted"] = "save_accepted"
    job_id: JobId
    state: JobState
    position: int
    files: list[str]
    warnings: list[str] = Field(default=[])


class QueueStatus(Request):
    """Asks for the queue's figures and for jobs: those named, or the newest of all, of `client` and in `states` where
    these are given."""

    kind: Literal["queue_status"] = "queue_status"
    job_ids: list[JobId] = Field(default=[], max_length=256)
    client: Client | None = None
    states: list[JobState] = Field(default=[], max_length=5)
    limit: int = Field(default=50, ge=0, le=1000)
    thumbnails: bool = False


class SavedFile(Message):
    """A file of a job: a picture, or the safetensors file of its heatmaps.

    path: under the output root. sha256 and bytes are known once the file is complete. quality: the gate's score, 0..1.
    thumbnail: a JPEG of at most 256 pixels a side, base64.
    """

    path: str
    kind: Literal["picture", "heatmaps"] = "picture"
    width: int = 0
    height: int = 0
    sha256: str | None = None
    bytes: int | None = None
    discarded: bool = False
    quality: float | None = None
    thumbnail: str | None = None


class JobStatus(Message):
    """reason: of the last failure, or why a job that is done has latents where pictures were due. retry_in: seconds
    until the next try. Times are seconds since 1970."""

    job_id: JobId
    client: Client
    priority: int
    state: JobState
    position: int | None = None
    attempts: int
    reason: str = ""
    retry_in: float | None = None
    submitted: float
    finished: float | None = None
    files: list[SavedFile]


class QueueReport(Message):
    """The reply to `QueueStatus`: jobs per state, bytes of the tensors of those that are queued or running, finished
    jobs a minute (over the last ten minutes), seconds a job sent now would wait (None while none has been finished)."""

    kind: Literal["queue_report"] = "queue_report"
    counts: dict[JobState, int]
    bytes: int
    throughput: float
    estimated_wait: float | None
    jobs: list[JobStatus]


class CancelJobs(Request):
    """Cancels jobs that are not yet being put in place; their files never appear."""

    kind: Literal["cancel"] = "cancel"
    job_ids: list[JobId] = Field(min_length=1, max_length=256)


class RetryJobs(Request):
    """Puts dead jobs back into the queue with a fresh count of attempts: those named, or all."""

    kind: Literal["retry"] = "retry"
    job_ids: list[JobId] = Field(default=[], max_length=256)


class PurgeJobs(Request):
    """Forgets finished jobs: those named, or all of `states` that are older than `older_than` seconds. Pictures
    stay."""

    kind: Literal["purge"] = "purge"
    job_ids: list[JobId] = Field(default=[], max_length=256)
    states: list[Literal["done", "dead", "cancelled"]] = Field(default=["done", "cancelled"])
    older_than: float = Field(default=0, ge=0, allow_inf_nan=False)


class JobsChanged(Message):
    """The reply to `CancelJobs`, `RetryJobs` and `PurgeJobs`; unchanged: why, by job id."""

    kind: Literal["jobs_changed"] = "jobs_changed"
    changed: list[JobId]
    unchanged: dict[JobId, str] = Field(default={})
