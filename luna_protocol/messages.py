"""Requests and replies. Each is the JSON part of one blob; its docstring lists the tensors that travel beside it.

Shapes use B batch rows, C latent channels, H and W latent height and width, T tokens, D the encoder's width. Any
floating dtype may be sent; the worker computes in its own and answers in the dtype it computed in.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)

from luna_protocol import PROTOCOL_VERSION
from luna_protocol.errors import Impossible, Malformed, VersionMismatch

ContentHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Preset = Literal["quality", "balanced", "fast"]
MAX_LORAS = 4096  # loaders that weigh blocks give each layer a strength of its own
MAX_ROWS = 64


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Request(Message):
    """What every request has.

    `references` stands for tensors that are not sent: {tensor's name: content hash}. A worker that does not hold one of
    them answers `Missing`, and the client sends the same request again with those tensors in it.
    """

    version: int = PROTOCOL_VERSION
    references: dict[Name, ContentHash] = Field(default_factory=dict, max_length=256)


class LoraUse(Message):
    """One LoRA of a stack: a file on the server by `name`, or tensors of the client's own by `content`.

    name: path relative to a LoRA root, in any sub-folder, with or without ".safetensors".
    content: `set_hash` of a LoRA file's tensors under the names they have there. They travel beside any request that
    uses them as "lora.<content>.<name in the file>", and only when the worker answered `Missing` for that hash. Every
    spelling that a file may use can be sent; a client that holds ComfyUI's patches writes their keys without ".weight"
    and with the formats' own endings, diffusion_model.input_blocks.1.1.proj_in.lora_up.weight (table: docs/lora.md).
    strength_patch scales the patch; strength_model scales the weight before the patch is added (ComfyUI's rule).
    """

    name: Name | None = None
    content: ContentHash | None = None
    strength_patch: FiniteFloat = 1.0
    strength_model: FiniteFloat = 1.0

    @model_validator(mode="after")
    def _one_source(self) -> "LoraUse":
        if (self.name is None) == (self.content is None):
            raise ValueError("a LoRA is given either by name or by content")
        return self


LoraUses = Annotated[list[LoraUse], Field(default_factory=list, max_length=MAX_LORAS)]


class Patched(Request):
    """A request to a model whose weights LoRAs patch for this request alone.

    lora is merged into the weights in this order; hook_lora then into the merged and rounded weights (ComfyUI's hooks).
    """

    lora: LoraUses
    hook_lora: LoraUses


class LoraReport(Message):
    """What became of one LoRA: how many weights it patches, how many of its layers were left out because they cannot be
    applied (another shape, half a patch, not finite), and how many of its tensors belong to no layer of this model.

    Tensors for the checkpoint's other parts (a text encoder's, asked of the UNet) are not among the unmatched.
    skipped_layers ("layer: reason") and unmatched_names list the first of them, 256 in a whole reply.
    """

    name: str | None = None
    content: str | None = None
    matched: int
    skipped: int = 0
    skipped_layers: list[str] = []
    unmatched: int = 0
    unmatched_names: list[str] = []


class StepCache(Message):
    """Lets the server reuse work of a sampling run's earlier steps, and says where in the run this evaluation stands.

    session: one sampling run of one client; a new run takes a new name.
    step: counts the evaluations that the sampler asks for: 0, 1, 2 ...; a retry repeats its number. Only an evaluation
        whose number follows the last one, at a lower timestep, can be a hit.
    conds: one name per row, the conditioning it belongs to. The n-th rows of each name are of the same latent (cond
        and uncond, say) and hit or miss together.
    policy, parameters: how to decide and what to reuse, see docs/step_cache.md; first_block, the default, takes
        residual_threshold and max_consecutive_hits.
    preset: instead of these, what was tuned for this model and `sampler` (ComfyUI's name; None: what suits them all).
    start_timestep, end_timestep: reuse only from the one down to the other, both included; None has no bound. Clients
        map percents with their own model_sampling.
    """

    session: Name
    step: int = Field(ge=0)
    conds: list[Name] = Field(min_length=1, max_length=1024)
    policy: Name = "first_block"
    parameters: dict[Name, FiniteFloat] = Field(default_factory=dict, max_length=16)
    preset: Preset | None = None
    sampler: Name | None = None
    start_timestep: FiniteFloat | None = None
    end_timestep: FiniteFloat | None = None

    @model_validator(mode="after")
    def _coherent(self) -> "StepCache":
        if None not in (self.start_timestep, self.end_timestep) and self.start_timestep < self.end_timestep:
            raise ValueError("start_timestep must not be below end_timestep (start_percent below end_percent)")
        own = (self.policy, self.parameters, self.start_timestep, self.end_timestep)
        if self.preset and own != ("first_block", {}, None, None):
            raise ValueError("a preset brings its own policy, parameters and window; give the one or the others")
        return self


class StepCacheReport(Message):
    """What the step cache did: per row, and the seconds it saved against computing every row in full."""

    hits: list[bool]
    seconds_saved: float


class FreeU(Message):
    """FreeU (1) or FreeU V2 (2) as ComfyUI's nodes have it: b1 and s1 where 4 times the model's channels enter an
    output block, b2 and s2 where 2 times do."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1, 2]
    b1: float = Field(ge=0, le=10)
    b2: float = Field(ge=0, le=10)
    s1: float = Field(ge=0, le=10)
    s2: float = Field(ge=0, le=10)


class UNetForward(Patched):
    """One evaluation of the UNet, of at most `MAX_ROWS` rows.

    Tensors: x [B, C, H, W] in the UNet's own space; timesteps [B] (0..999, fractions allowed); context [B, T, D]; y
    [B, A] where the family has it (SDXL: pooled output and sizes, as ComfyUI computes it);
    control.{input,middle,output}.N [B, channels, h, w], ControlNet residuals in ComfyUI's order, entries that are None
    left out.

    free_u: applied in this order.
    """

    kind: Literal["unet_forward"] = "unet_forward"
    step_cache: StepCache | None = None
    free_u: tuple[FreeU, ...] = Field(default=(), max_length=8)


class UNetOutput(Message):
    """Tensors: out [B, C, H, W], the predicted noise (or v).

    lora reports on `lora` and then `hook_lora`, in order; unmerged says that the LoRAs ran beside the weights for want
    of memory, which deviates from merging them as docs/lora.md states.
    """

    kind: Literal["unet_output"] = "unet_output"
    lora: list[LoraReport] = []
    unmerged: bool = False
    step_cache: StepCacheReport | None = None


class ClipEncode(Patched):
    """Hidden states of one text encoder for token ids.

    Tensors: tokens [N, T] int64; and where textual inversion puts vectors in place of tokens, embeddings [M, D] and
    embedding_positions [M, 2] int64 (row, column).

    layer: "last" is the output after the final norm; "hidden" the output of layer `layer_index` (as in ComfyUI, -2 is
    the penultimate), normed when `final_norm`. projected: pooled output through the text projection, where there is
    one.
    """

    kind: Literal["clip_encode"] = "clip_encode"
    encoder: Literal["clip_l", "clip_g"]
    layer: Literal["last", "hidden"] = "last"
    layer_index: int | None = Field(default=None, ge=-64, le=63)
    final_norm: bool = True
    projected: bool = True


class ClipText(Patched):
    """Plain text to conditioning, for callers that do not tokenise: every encoder of the checkpoint, no weights syntax.

    clip_skip counts from the end as in ComfyUI: -1 the last layer, -2 the penultimate; None is the family's own choice.
    """

    kind: Literal["clip_text"] = "clip_text"
    texts: list[Annotated[str, StringConstraints(max_length=20_000)]] = Field(min_length=1, max_length=64)
    clip_skip: int | None = Field(default=None, ge=-24, le=-1)


class ClipOutput(Message):
    """Tensors: hidden [N, T, D] and pooled [N, P] float32 (for `ClipText`, T is 77 per section and encoders stand
    side by side). lora and unmerged: as in `UNetOutput`."""

    kind: Literal["clip_output"] = "clip_output"
    lora: list[LoraReport] = []
    unmerged: bool = False


class ModelCall(Patched):
    """A call of a method of the model's own class, on a server that runs the code of the user's ComfyUI.

    Tensors: those that the trees name (see `luna_protocol.tree`).

    method: of a diffusion model `_forward`, `forward` or `preprocess_...`, as its class has them; of text encoders
        `encode_token_weights` or `generate`; of a VAE `encode`, `decode`, `encode_tiled` or `decode_tiled`.
    arguments: a tree {"args": [..], "kwargs": {..}}.
    attributes: trees of plain values that stand in for attributes of the diffusion model during this call, by dotted
        name.
    clip_options: trees for the encoders' `set_clip_options`, in their order.

    A LoRA of the client's own that is named by `content` travels as ComfyUI's parsed patches: a uint8 tensor
    "lora.<content>.rows" with their JSON, and the tensors that it names as "lora.<content>.<name>".
    """

    kind: Literal["model_call"] = "model_call"
    method: Name
    arguments: JsonValue
    attributes: dict[Name, JsonValue] = Field(default_factory=dict, max_length=64)
    clip_options: list[JsonValue] = Field(default_factory=list, max_length=64)
    step_cache: StepCache | None = None


class Describe(Request):
    """Asks a loaded model for what a client has to know to stand in for it; the reply is a `TreeOutput`."""

    kind: Literal["describe"] = "describe"


class TreeOutput(Message):
    """A tree and its tensors. lora and step_cache: as in `UNetOutput`."""

    kind: Literal["tree_output"] = "tree_output"
    tree: JsonValue
    lora: list[LoraReport] = []
    unmerged: bool = False
    step_cache: StepCacheReport | None = None


class Tiling(Message):
    """Work tile by tile, blended over `overlap`; both in pixels."""

    tile_size: int = Field(default=512, ge=128, le=4096, multiple_of=8)
    overlap: int = Field(default=64, ge=0, le=1024, multiple_of=8)


class VaeEncode(Request):
    """Tensors: pixels [B, 3, 8h, 8w] in -1..1."""

    kind: Literal["vae_encode"] = "vae_encode"
    tiling: Tiling | None = None


class VaeDecode(Request):
    """Tensors: latent [B, C, h, w] as ComfyUI's LATENT holds it (not multiplied by the UNet's scaling factor)."""

    kind: Literal["vae_decode"] = "vae_decode"
    tiling: Tiling | None = None


class VaeOutput(Message):
    """Tensors: latent [B, C, h, w] (the mode of the posterior) for an encode, pixels [B, 3, 8h, 8w] about -1..1 for
    a decode."""

    kind: Literal["vae_output"] = "vae_output"


class Readiness(Request):
    """Asks any model whether it is loaded. A request without a body means the same: a probe can be a plain GET."""

    kind: Literal["readiness"] = "readiness"


class Ready(Message):
    """The reply of a model that is loaded; others answer with the reason why not."""

    kind: Literal["ready"] = "ready"


class RepositoryIndex(Request):
    """Asks what the store holds and what is loaded."""

    kind: Literal["repository_index"] = "repository_index"


class Worker(Message):
    """A served model in the engine of a device; `pid` is the engine's process.

    state: loading, ready, or failed (then `reason` says why). weights_bytes: what it holds, or will; budget_bytes: what
    all weights and caches may take of the device, None for no bound; resident: whether its weights are there now, or
    come when they are wanted. relays: TorchServe's workers that share it. door: where clients of this machine can reach
    it without TorchServe. comfyui: the version of the ComfyUI whose code it runs, None for our own backend. busy: it
    computes or has requests waiting; last_used: when it last began or ended to, in seconds since 1970.
    """

    pid: int
    state: Literal["loading", "ready", "failed"]
    device: str
    assigned_gpu: int | None = None
    dtype: str | None = None
    weights_bytes: int = 0
    budget_bytes: int | None = None
    resident: bool = True
    relays: int = 1
    door: str | None = None
    comfyui: str | None = None
    requests: int = 0
    busy: bool = False
    last_used: float = 0
    reason: str = ""


class ServedModel(Message):
    """An archive of the store, and its live workers: none when it is not loaded.

    name: NAME, or NAME/VERSION where the store has several versions.
    further: the files after the first of text encoders that come in several, whose `clip_type` is ComfyUI's name of
    their kind ("flux", "sd3", ...); dtype as it was packed.
    fingerprint changes whenever the checkpoint's file does; None where the file is missing. replacing: see
    `ReplaceModel`.
    """

    name: str
    role: Literal["unet", "clip", "vae", "repository"]
    family: str | None = None
    checkpoint: str | None = None
    further: list[str] = []
    clip_type: str | None = None
    dtype: str = "auto"
    fingerprint: ContentHash | None = None
    replacing: bool = False
    workers: list[Worker] = []


class Index(Message):
    """The reply to `RepositoryIndex`, also as plain JSON.

    loras, embeddings and servable are files below their roots. lora_fingerprints has one for each LoRA, which changes
    whenever its file does. servable are checkpoints that have no archive yet; scripts/add_checkpoint.py takes these
    names.
    """

    kind: Literal["index"] = "index"
    protocol_version: int = PROTOCOL_VERSION
    models: list[ServedModel]
    loras: list[str] = []
    lora_fingerprints: dict[str, ContentHash] = {}
    embeddings: list[str] = []
    servable: list[str] = []


class DescribeModel(Request):
    """Asks what a model of the store is made of; it need not be loaded."""

    kind: Literal["describe_model"] = "describe_model"
    model: Name


class ReplaceModel(Request):
    """Says that a registered model is about to give way to a new archive of its name, or, if `done`, that it has.

    In between its workers answer every request with `Loading`, so that none waits when the model is unregistered; for
    three minutes at most, should nobody say that it is done. The reply is a `Ready`.
    """

    kind: Literal["replace_model"] = "replace_model"
    model: Name
    done: bool = False


class ModelDescription(Message):
    """What a client has to know of weights that it does not hold.

    shapes is {component: {name in the original layout, without prefix: shape}} with the components "unet", "vae",
    "clip_l", "clip_g". markers are the file's tensors that say how the UNet was trained ("v_pred", "ztsnr", "edm_mean",
    "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"), 0 where the mere presence counts.
    """

    kind: Literal["model_description"] = "model_description"
    model: ServedModel
    shapes: dict[str, dict[str, list[int]]]
    markers: dict[str, float] = {}


class Missing(Message):
    """The worker does not hold these hashes; send the request again with the tensors themselves."""

    kind: Literal["missing"] = "missing"
    hashes: list[ContentHash]


AnyRequest = TypeVar("AnyRequest", bound=Request)

# Pydantic's names for "this cannot be read"; everything else it objects to was read and makes no sense.
_UNREADABLE = ("extra_forbidden", "missing", "literal_error", "json_invalid")


def parse_request(message: dict[str, Any], accepted: tuple[type[AnyRequest], ...]) -> AnyRequest:
    """The request that `message` spells.

    Raises:
        VersionMismatch: another protocol version.
        Malformed: unknown kind or field, missing field, wrong type.
        Impossible: a value out of its range, or not finite.
    """
    version = message.get("version", PROTOCOL_VERSION)
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"the client speaks protocol version {version!r}, this server {PROTOCOL_VERSION}",
            "update LunaServe on the older side",
        )
    by_kind = {kind.model_fields["kind"].default: kind for kind in accepted}
    kind = message.get("kind")
    if not isinstance(kind, str) or kind not in by_kind:
        raise Malformed(f"unknown kind {kind!r}", f"this model answers {', '.join(sorted(by_kind))}")
    return validate(by_kind[kind], message)


def validate(model: type[BaseModel], fields: dict[str, Any]) -> Any:
    """`model` built from `fields`, pydantic's first objections told as `Malformed` or `Impossible`."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[:3]
        told = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'message'}: {e['msg']} (got {str(e.get('input'))[:80]!r})" for e in first
        )
        unreadable = any(e["type"] in _UNREADABLE or e["type"].endswith(("_type", "_parsing")) for e in first)
        raise (Malformed if unreadable else Impossible)(told, f"see {model.__name__} in docs/protocol.md") from error
