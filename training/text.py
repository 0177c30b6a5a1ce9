"""The miniature's text encoder: CLIP-L's layout, 64 wide, taught to read captions before the UNet paints them."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from engine import tokenizer
from training import progress, shapes

WIDTH = 64
STEPS = 800
BATCH = 48
RATE = 1e-3
# What a caption says, each with the answers there are; "" for what it leaves open or does not mention.
QUESTIONS = {
    "background": (*shapes.BACKGROUNDS,),
    "shape": shapes.SHAPES,
    "colour": (*shapes.COLOURS,),
    "second shape": ("", *shapes.SHAPES),
    "second colour": ("", *shapes.COLOURS),
    "size": ("", "small", "large"),
    "position": ("", *shapes.POSITIONS),
}


def build() -> CLIPTextModel:
    """An untrained text encoder. Words outside the captions' vocabulary are zero vectors: they say nothing."""
    config = CLIPTextConfig(
        vocab_size=tokenizer.END + 1,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=1,
        max_position_embeddings=tokenizer.SECTION,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.START,
        eos_token_id=tokenizer.END,
    )
    model = CLIPTextModel(config)
    table = model.get_input_embeddings().weight.data
    rng = np.random.default_rng(0)
    known = tokenize([shapes.random_scene(rng).caption for _ in range(2000)]).unique()
    kept = table[known].clone()
    table.zero_()
    table[known] = kept
    return model


def tokenize(captions: list[str]) -> torch.Tensor:
    """CLIP's token ids, int64 [len(captions), 77]."""
    return tokenizer.sections(captions, pad=tokenizer.END)[:, 0]


def _answers(scene: shapes.Scene) -> list[int]:
    first, second = scene.things[0], scene.things[1] if len(scene.things) > 1 else None
    said = {
        "background": scene.background,
        "shape": first.shape,
        "colour": first.colour,
        "second shape": second.shape if second else "",
        "second colour": second.colour if second else "",
        "size": next((size for size in ("small", "large") if size in scene.caption), ""),
        "position": next((position for position in shapes.POSITIONS if position in scene.caption), ""),
    }
    return [answers.index(said[question]) for question, answers in QUESTIONS.items()]


def train(path: Path, seed: int = 0, steps: int = STEPS) -> CLIPTextModel:
    """Trains or resumes the text encoder kept at `path`.

    A linear map of every padding token's output must answer all `QUESTIONS`. So each of those
    tokens carries the whole caption in a form the UNet's cross-attention can use from its first step; trained jointly
    from nothing, the two spend most of a small budget on finding each other.
    """
    torch.manual_seed(seed)
    model = build()
    heads = torch.nn.Linear(WIDTH, sum(map(len, QUESTIONS.values())))
    optimizer = torch.optim.Adam([*model.parameters(), *heads.parameters()], lr=RATE)
    first = progress.restore(path, {"text": model, "heads": heads}, optimizer)
    rng = np.random.default_rng([seed, first])
    began = time.perf_counter()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (1 - step / steps)
        scenes = [shapes.random_scene(rng) for _ in range(BATCH)]
        ids = tokenize([scene.caption for scene in scenes])
        answers = torch.tensor([_answers(scene) for scene in scenes])
        padding = ids == tokenizer.END
        logits = heads(model(ids).last_hidden_state[padding])
        wanted = answers.repeat_interleave(padding.sum(1), dim=0)
        parts = logits.split([len(choices) for choices in QUESTIONS.values()], dim=1)
        loss = sum(F.cross_entropy(part, column) for part, column in zip(parts, wanted.T, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            progress.save(path, step + 1, {"text": model, "heads": heads}, optimizer)
            right = torch.stack([part.argmax(1) == column for part, column in zip(parts, wanted.T, strict=True)])
            print(
                f"text {step + 1}: loss {loss.item():.3f}, answers right {right.float().mean():.3f}, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return model.eval().requires_grad_(False)
