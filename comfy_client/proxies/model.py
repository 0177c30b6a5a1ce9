"""MODEL: ComfyUI's own sampling around a UNet that runs on the server."""

import logging
import uuid
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from comfy import model_base, model_detection, supported_models
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

from comfy_client.content_hashes import ContentHashes
from comfy_client.proxies.free_u import take_free_u
from comfy_client.proxies.patcher import LoraStack, RemotePatcher
from comfy_client.proxies.refusals import refuse, refuse_block_patches
from comfy_client.proxies.remote import Remote
from comfy_client.proxies.step_cache import STEP_CACHE_KEY, StepCacheSettings
from luna_client.row_groups import in_groups, rows_in_a_body
from luna_protocol.messages import MAX_ROWS, StepCache, UNetForward

log = logging.getLogger(__name__)

_FAMILIES = {"sd15": supported_models.SD15, "sdxl": supported_models.SDXL}


def remote_model(remote: Remote) -> "RemoteModelPatcher":
    """A MODEL for a served UNet: sampling, schedules and guidance are ComfyUI's, each forward is remote."""
    shapes = remote.meta_tensors("unet")
    unet_config = model_detection.detect_unet_config(shapes, "")
    known = model_detection.model_config_from_unet_config(unet_config, shapes)
    # A family's members of other widths than those it was published in are served too, but ComfyUI does not list them.
    config = known or _FAMILIES[remote.model.family](unet_config)
    config.unet_config["disable_unet_model_creation"] = True
    config.set_inference_dtype(remote.dtype, None)
    markers = {name: torch.tensor(value) for name, value in remote.description.markers.items()}
    model = config.get_model(markers, "")
    model.diffusion_model = RemoteUNet(remote, shapes, model)
    model.lora_stack = model.diffusion_model.lora_stack
    model.memory_required = _no_memory
    model.state_dict_for_saving = _refuse_saving
    return RemoteModelPatcher.around(model)


class RemoteModelPatcher(RemotePatcher):
    """The patcher of a remote UNet, which also tells it where a sampling run begins."""

    def pre_run(self):
        super().pre_run()
        self.model.diffusion_model.begin_session()

    def cleanup(self):
        self.model.diffusion_model.end_session()
        super().cleanup()


class RemoteUNet(nn.Module):
    """ComfyUI's `diffusion_model` without parameters: each forward is a request.

    Attributes:
        dtype: what x, context and y come in.
        lora_stack: what the patcher wants applied to the next forward.
    """

    def __init__(self, remote: Remote, shapes: Mapping[str, Tensor], model: model_base.BaseModel) -> None:
        super().__init__()
        self.remote = remote
        self.dtype = remote.dtype
        self.lora_stack = LoraStack()
        self._shapes = shapes
        self._model_channels = model.model_config.unet_config["model_channels"]
        self._hashes = ContentHashes()
        # The model owns this UNet: a cycle would keep both until a full garbage collection.
        self._model = weakref.ref(model)
        self.begin_session()

    def begin_session(self) -> None:
        """A sampling run begins: step caches of earlier ones do not count, and another replica may be free."""
        self._session, self._step, self._seen = uuid.uuid4().hex, 0, set()
        self._settled = False
        self._most_rows = MAX_ROWS
        self._rows, self._hits, self._seconds_saved = 0, 0, 0.0

    def end_session(self) -> None:
        """The run is over: tell what the step cache did, nothing included."""
        if self._rows:
            log.info(
                "Luna step cache: %d of %d evaluations reused, %.1f s saved",
                self._hits,
                self._rows,
                self._seconds_saved,
            )
        self._rows = 0

    def _count(self, report: dict[str, Any] | None) -> None:
        if report:
            self._rows += len(report["hits"])
            self._hits += sum(report["hits"])
            self._seconds_saved += report["seconds_saved"]

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The remote keys on the meta device, so that LoRA loaders find what they patch.

        Raises:
            NotRemote: asked for this UNet alone, which only those do who want its weights.
        """
        if destination is None:
            refuse("Control-LoRA (ControlNetLoader with a control-lora file)", "copies the UNet's weights")
        destination |= {prefix + key: tensor for key, tensor in self._shapes.items()}
        return destination

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **extra):
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, y, control, options, **extra)

    def _forward(self, x, timesteps, context, y=None, control=None, transformer_options=None, **extra):
        free_u, options = take_free_u(transformer_options or {}, self._model_channels)
        refuse_block_patches(options)
        for name, value in extra.items():
            if value is not None:
                refuse(f"The conditioning {name!r}", "needs layers that no SD1.5 or SDXL UNet has")
        tensors = {"x": x, "timesteps": timesteps, "context": context} | _residuals(control)
        if y is not None:
            tensors["y"] = y
        conds = [str(cond) for cond in options.get("uuids", [0])]
        self._count_step(conds)
        names = [cond for cond in conds for _ in range(len(x) // len(conds))]
        lora_fields, lora_tensors = self.lora_stack.request_fields(), self.lora_stack.tensors()

        def ask(rows: list[int], group: str) -> Tensor:
            # Of all rows at once nothing is copied, as strides choose kernels.
            own = {name: tensor[rows] for name, tensor in tensors.items()} if group else tensors
            request = UNetForward(
                references={"context": self._hashes.of(own["context"])},
                step_cache=self._step_cache(options, group, names, rows),
                free_u=free_u,
                **lora_fields,
            )
            message, reply = self.remote.ask(request, own | lora_tensors, self._settled)
            self._settled = True
            self._count(message.get("step_cache"))
            return reply["out"]

        if not self.remote.replicas.server.shares_memory:
            self._most_rows = min(self._most_rows, rows_in_a_body(tensors))
        out, self._most_rows = in_groups(ask, len(x), len(conds), self._most_rows)
        return out.to(x.device)

    def _count_step(self, conds: list[str]) -> None:
        """A sampler's evaluation may come in several calls, one for some conds each. It is over, and the next begins,
        when a cond comes back."""
        if self._seen & set(conds):
            self._step += 1
            self._seen = set()
        self._seen |= set(conds)

    def _step_cache(
        self, options: Mapping[str, Any], group: str, names: list[str], rows: list[int]
    ) -> StepCache | None:
        """Where these rows stand in the run; None unless a Luna node switched the cache on."""
        settings: StepCacheSettings | None = options.get(STEP_CACHE_KEY)
        if settings is None:
            return None
        # A session numbers its latents by their places in a request, and each group of rows has others.
        session = f"{self._session} {group}".strip()
        return settings.request(session, self._step, [names[row] for row in rows], self._timestep_at)

    def _timestep_at(self, percent: float) -> float:
        sampling = self._model().model_sampling
        return float(sampling.timestep(torch.tensor(sampling.percent_to_sigma(percent))))


def _residuals(control: Mapping[str, list[Tensor | None]] | None) -> dict[str, Tensor]:
    """ControlNet's residuals, numbered in the order of use; ComfyUI keeps them the other way round."""
    return {
        f"control.{place}.{index}": residual
        for place, residuals in (control or {}).items()
        for index, residual in enumerate(reversed(residuals))
        if residual is not None
    }


def _no_memory(*_args: Any, **_options: Any) -> int:
    """The activations are on the server too: cond and uncond need not be split for want of memory here."""
    return 0


def _refuse_saving(*_args: Any, **_options: Any):
    refuse("ModelSave or CheckpointSave", "reads the weights")
