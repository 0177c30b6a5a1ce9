"""The VAE: diffusers' `AutoencoderKL` or `AutoencoderTiny` (TAESD layout), frozen, whole pictures or tile by tile."""

from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoints import Part
from engine.diffusers_modules import AutoencoderKL, AutoencoderTiny, convert_ldm_vae_checkpoint
from engine.tiles import tiled
from engine.weights import adopt, read_tensors
from luna_protocol.errors import Impossible, Malformed
from luna_protocol.messages import Tiling

SCALE = 8


class VAE:
    """A frozen VAE that compresses 8 x 8 pixels to one latent position.

    Attributes:
        model: diffusers' module, never written.
        latent_channels: C of its latents.
        scale, shift: for the TAESD layout, decode(latent) is the network at (latent - shift) * scale.
    """

    def __init__(self, model: AutoencoderKL | AutoencoderTiny, scale: float = 1.0, shift: float = 0.0):
        self.model = model
        self.latent_channels: int = model.config.latent_channels
        self.scale = scale
        self.shift = shift

    @classmethod
    def load(cls, path: Path, part: Part, dtype: torch.dtype, device: torch.device) -> "VAE":
        """Reads the VAE of a checkpoint straight to `device` as `dtype`.

        Raises:
            Malformed: the file's tensors do not make a VAE that is known.
        """
        return cls.build(read_tensors(path, part, "vae", dtype, device))

    @classmethod
    def build(cls, tensors: dict[str, Tensor]) -> "VAE":
        """A VAE of {name in the original layout: tensor}; raises as `load`."""
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if "taesd_decoder.1.weight" in shapes:
            scale, shift = (
                float(tensors.pop(key, default)) for key, default in (("vae_scale", 1.0), ("vae_shift", 0.0))
            )
            return cls(_tiny(tensors, shapes), scale, shift)
        config = _kl_config(shapes)
        with torch.device("meta"):
            model = AutoencoderKL(**config)
        converted = convert_ldm_vae_checkpoint(tensors, config)
        # It puts None for a bias that is missing.
        return cls(adopt(model, {name: tensor for name, tensor in converted.items() if tensor is not None}, "VAE"))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def check_pixels(self, pixels: Tensor) -> None:
        """Raises `Impossible` unless pixels are [B, 3, H, W] with sides that are multiples of 8."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or any(side < SCALE or side % SCALE for side in pixels.shape[2:]):
            raise Impossible(f"pixels have shape {list(pixels.shape)}", "send [B, 3, H, W] with H and W multiples of 8")
        if not len(pixels):
            raise Impossible("pixels have no rows", "send at least one picture")

    def check_latent(self, latent: Tensor) -> None:
        """Raises `Impossible` unless latent is [B, C, h, w] with this VAE's C."""
        if latent.ndim != 4 or latent.shape[1] != self.latent_channels or 0 in latent.shape:
            raise Impossible(
                f"latent has shape {list(latent.shape)}", f"this VAE takes [B, {self.latent_channels}, h, w]"
            )

    def encode(self, pixels: Tensor, tiling: Tiling | None = None) -> Tensor:
        """Latent [B, C, H/8, W/8] (the posterior's mode) of pixels [B, 3, H, W] in -1..1."""
        if tiling is None:
            return self._encode(pixels)
        return tiled(pixels, self._encode, tiling.tile_size, tiling.overlap, (1, SCALE))

    def decode(self, latent: Tensor, tiling: Tiling | None = None) -> Tensor:
        """Pixels [B, 3, 8h, 8w], about -1..1, not clamped, of latent [B, C, h, w]."""
        if tiling is None:
            return self._decode(latent)
        return tiled(latent, self._decode, tiling.tile_size // SCALE, tiling.overlap // SCALE, (SCALE, 1))

    def _encode(self, pixels: Tensor) -> Tensor:
        if isinstance(self.model, AutoencoderTiny):
            return self.model.encode(pixels).latents / self.scale + self.shift
        return self.model.encode(pixels).latent_dist.mode()

    def _decode(self, latent: Tensor) -> Tensor:
        if isinstance(self.model, AutoencoderTiny):
            return self.model.decode((latent - self.shift) * self.scale).sample
        return self.model.decode(latent).sample


def _kl_config(shapes: dict[str, tuple[int, ...]]) -> dict:
    levels, layers = 0, 0
    while f"encoder.down.{levels}.block.0.conv1.weight" in shapes:
        levels += 1
    while f"encoder.down.0.block.{layers}.conv1.weight" in shapes:
        layers += 1
    if levels != 4 or not {"encoder.conv_out.weight", "decoder.conv_out.weight"} <= shapes.keys():
        raise Malformed(
            f"the VAE's encoder has {levels} levels",
            "a complete VAE with 4 levels (8 x 8 pixels a latent) can be served",
        )
    quant = "quant_conv.weight" in shapes
    return {
        "in_channels": 3,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
    }


def _tiny(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> AutoencoderTiny:
    """TAESD's layout: one flat list of layers a side, the decoder's counted from 1 because its clamp is layer 0."""
    width = shapes["taesd_decoder.1.weight"][0]
    with torch.device("meta"):
        model = AutoencoderTiny(
            encoder_block_out_channels=(width,) * 4,
            decoder_block_out_channels=(width,) * 4,
            latent_channels=shapes["taesd_decoder.1.weight"][1],
        )
    renamed = {}
    for key, tensor in tensors.items():
        side, number, rest = [*key.split(".", 2), "", ""][:3]
        if number.isdecimal():
            layer = int(number) - (side == "taesd_decoder")
            renamed[f"{side.removeprefix('taesd_')}.layers.{layer}.{rest}"] = tensor
    return adopt(model, renamed, "VAE")
