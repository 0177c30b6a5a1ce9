"""Trains the miniature checkpoint from nothing and writes it in the original SD1.x layout, fp16.

    python training/train.py [--output FILE] [--work FOLDER]

Interrupted, it goes on where it stood. About three hours on one core.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.sampling import LATENT_SCALE
from training import autoencoder, diffusion, text
from training.painter import CHECKPOINT, ROOT


def original_layout(vae, reader, unet) -> dict[str, torch.Tensor]:
    """The tensors of trained modules, fp16, under the keys of a single-file SD1.x checkpoint with a TAESD inside."""
    tensors = {}
    for name, tensor in vae.state_dict().items():
        side, _, rest = name.partition(".layers.")
        layer, _, parameter = rest.partition(".")
        # TAESD counts the decoder's first, weightless layer, which clamps.
        tensors[f"first_stage_model.taesd_{side}.{int(layer) + (side == 'decoder')}.{parameter}"] = tensor
    tensors["first_stage_model.vae_scale"] = torch.tensor(LATENT_SCALE["sd15"])
    tensors["first_stage_model.vae_shift"] = torch.tensor(0.0)
    for name, tensor in reader.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    weights = unet.state_dict()
    for name, original in diffusion.LAYOUT.original_names(weights).items():
        tensors[f"model.diffusion_model.{original}"] = weights[name]
    return {name: tensor.half().contiguous() for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=CHECKPOINT, help="the checkpoint to write (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "run" / "training", help="keeps what an interrupted run needs"
    )
    parser.add_argument("--threads", type=int, default=1, help="cores to use (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    vae = autoencoder.train(arguments.work / "vae.safetensors")
    reader = text.train(arguments.work / "text.safetensors")
    unet = diffusion.train(arguments.work / "unet.safetensors", reader)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(original_layout(vae, reader, unet), arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
