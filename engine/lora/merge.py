"""What a LoRA patch does to a weight, by ComfyUI's rule: add up in float32, in order, and round once at the end.

Formulas: LoRA (arXiv 2106.09685), its Tucker form and LoHa (FedPara, 2108.06098), LoKr (LyCORIS, 2309.14859), DoRA
(2402.09353), GLoRA (2306.07967), OFT (2306.07280) and BOFT (2311.06243), both parametrised by Cayley. Where ComfyUI
departs from the papers, so do we, because a picture has to stay the same: DoRA's norm over output rows is the unpatched
weight's; OFT and BOFT take the strength twice; OFT leaves `rescale` out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Patch:
    """One LoRA's change to one weight.

    kind: "lora", "loha", "lokr", "glora", "oft", "boft", "diff" (added as it is), "no_diff" (no tensors, adds nothing:
        for `strength_model` alone) or "set" (replaces the weight).
    tensors: {ending in the file: tensor}, of any floating dtype, on the CPU.
    alpha: as in the file; None where it has none.
    """

    kind: str
    tensors: dict[str, Tensor]
    alpha: float | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Scaled:
    """A patch with its strengths: `strength_model` scales the weight, then `strength` times the patch is added."""

    patch: Patch
    strength: float
    strength_model: float = 1.0

    @property
    def changes_nothing(self) -> bool:
        return self.strength == 0 and self.strength_model == 1 and self.patch.kind != "set"


def merge(weight: Tensor, patches: Sequence[Scaled]) -> Tensor:
    """A new tensor: `weight` with all patches merged in, of its dtype, shape and device.

    Args:
        weight: fp32, fp16 or bf16; never written.
        patches: in the order in which they are added.

    Raises:
        RuntimeError: a patch does not fit the weight (`fits` tells beforehand).
    """
    merged = weight.to(torch.float32, copy=True)
    for scaled in patches:
        if scaled.strength_model != 1:
            merged *= scaled.strength_model
        _add(merged, scaled.patch, scaled.strength)
    return merged.to(weight.dtype)


def fits(patch: Patch, shape: torch.Size) -> str:
    """Why `patch` cannot be merged into a weight of this shape; empty when it can. Computes nothing."""
    if patch.kind == "no_diff":
        return ""
    tensors = {name: tensor.to("meta", torch.float32) for name, tensor in patch.tensors.items()}
    if any(0 in tensor.shape for tensor in tensors.values()):
        return "has rank 0"
    weight = torch.empty(shape, device="meta")
    try:
        if "dora_scale" in tensors and torch.broadcast_shapes(tensors.pop("dora_scale").shape, shape) != shape:
            raise ValueError("dora_scale is too large")
        if patch.kind in ("oft", "boft"):
            *factors, count, side, across = tensors["oft_blocks"].shape
            # The last of BOFT's factors pairs rows that lie farthest apart.
            widest = side * 2 ** (factors[0] - 1) if factors else 1
            if side != across or count * side != shape[0] or shape[0] % widest or (factors and side % 2):
                raise ValueError(f"it turns {count} blocks of {side} x {across}")
        else:
            _shaped(tensors["set_weight"] if patch.kind == "set" else _change(weight, patch, tensors, 1.0)[0], weight)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"does not fit a weight of shape {list(shape)}: {str(error).splitlines()[0]}"
    return ""


def _add(weight: Tensor, patch: Patch, strength: float) -> None:
    """Merges one patch into `weight` (float32), in place."""
    if patch.kind == "no_diff":
        return
    tensors = {name: tensor.to(weight.device, torch.float32) for name, tensor in patch.tensors.items()}
    if patch.kind == "set":
        weight.copy_(_shaped(tensors["set_weight"], weight))
        return
    dora_scale = tensors.pop("dora_scale", None)
    delta, scale = _change(weight, patch, tensors, strength)
    delta = _shaped(delta, weight)
    if dora_scale is None:
        # Scaled, then added: in one fused step the last bit would differ.
        weight += delta.mul_(strength * scale)
    else:
        _add_decomposed(weight, delta.mul_(scale), dora_scale, strength)


def _shaped(delta: Tensor, weight: Tensor) -> Tensor:
    if delta.ndim == 0 or delta.shape[0] != weight.shape[0] or delta.numel() != weight.numel():
        raise ValueError(f"the patch is {list(delta.shape)}")
    return delta.reshape(weight.shape)


def _add_decomposed(weight: Tensor, delta: Tensor, dora_scale: Tensor, strength: float) -> None:
    """DoRA: the patched weight's direction with a learned magnitude for each output row or each input column."""
    directed = weight + delta
    if dora_scale.shape[0] == weight.shape[0]:
        norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
    else:
        norm = directed.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (weight.ndim - 2))
    directed *= dora_scale / (norm + torch.finfo(torch.float32).eps)
    if strength == 1:
        weight.copy_(directed)
    else:
        weight += strength * directed.sub_(weight)


def _change(weight: Tensor, patch: Patch, tensors: dict[str, Tensor], strength: float) -> tuple[Tensor, float]:
    """The change before strength (which OFT and BOFT take here too), and the factor that alpha makes of it."""
    match patch.kind:
        case "oft":
            return _oft(weight, *_rotations(tensors["oft_blocks"], patch.alpha), strength), 1.0
        case "boft":
            turned = _boft(weight, *_rotations(tensors["oft_blocks"], patch.alpha), strength)
            return turned * tensors.get("rescale", 1.0) - weight, 1.0
        case "glora":
            return _glora(weight, tensors, patch.alpha)
    return _DELTAS[patch.kind](tensors, patch.alpha)


def _lora(t: dict[str, Tensor], alpha: float | None) -> tuple[Tensor, float]:
    up, down = t["lora_up"].flatten(1), t["lora_down"]
    rank = down.shape[0]
    if "lora_mid" in t:
        mid = t["lora_mid"]
        mixed = down.transpose(0, 1).flatten(1) @ mid.transpose(0, 1).flatten(1)
        down = mixed.reshape(down.shape[1], rank, *mid.shape[2:]).transpose(0, 1)
    return up @ down.flatten(1), _ratio(alpha, rank)


def _loha(t: dict[str, Tensor], alpha: float | None) -> tuple[Tensor, float]:
    first, second = (_product(t[f"hada_w{i}_a"], t[f"hada_w{i}_b"], t.get(f"hada_t{i}")) for i in (1, 2))
    return first * second, _ratio(alpha, t["hada_w1_b"].shape[0])


def _lokr(t: dict[str, Tensor], alpha: float | None) -> tuple[Tensor, float]:
    factors, rank = [], None
    for i, core in ((1, None), (2, t.get("lokr_t2"))):
        if f"lokr_w{i}" in t:
            factors.append(t[f"lokr_w{i}"])
        else:
            rank = t[f"lokr_w{i}_b"].shape[0]
            factors.append(_product(t[f"lokr_w{i}_a"], t[f"lokr_w{i}_b"], core))
    left, right = factors
    if right.ndim == 4:
        left = left[:, :, None, None]
    # A product with a core comes permuted, which kron refuses (and ComfyUI then leaves the patch out).
    return torch.kron(left, right.contiguous()), 1.0 if rank is None else _ratio(alpha, rank)


def _diff(t: dict[str, Tensor], _alpha: float | None) -> tuple[Tensor, float]:
    # Cloned because the change is scaled in place.
    return t["diff"].clone(), 1.0


def _glora(weight: Tensor, t: dict[str, Tensor], alpha: float | None) -> tuple[Tensor, float]:
    """W A + B, each of low rank. LyCORIS once kept the factors the other way round; shapes tell, or else squareness."""
    a1, a2, b1, b2 = (t[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if old and (not new or a2.shape[0] == weight.shape[0] == weight.shape[1]):
        return b2 @ b1 + (weight.flatten(1) @ a2) @ a1, _ratio(alpha, len(a1))
    if weight.ndim > 2:
        along = torch.einsum("o i ..., i j -> o j ...", torch.einsum("o i ..., i j -> o j ...", weight, a1), a2)
    else:
        along = weight @ a1 @ a2
    return along.flatten(1) + b1 @ b2, _ratio(alpha, len(a2))


def _rotations(blocks: Tensor, alpha: float | None) -> tuple[Tensor, Tensor]:
    """Orthogonal matrices of blocks [..., b, b], alpha a bound for the norm of their skew parts; and the identity."""
    identity = torch.eye(blocks.shape[-1], device=blocks.device)
    skew = blocks - blocks.transpose(-1, -2)
    if alpha:
        norm = skew.norm() + 1e-8
        skew = torch.where(norm > alpha, skew * alpha / norm, skew)
    return (identity + skew) @ torch.linalg.inv(identity - skew), identity


def _oft(weight: Tensor, rotations: Tensor, identity: Tensor, strength: float) -> Tensor:
    """What turning each block of output rows changes."""
    parts = weight.view(*rotations.shape[:2], *weight.shape[1:])
    turned = torch.einsum("k n m, k n ... -> k m ...", rotations * strength - strength * identity, parts)
    return turned.reshape(weight.shape)


def _boft(weight: Tensor, rotations: Tensor, identity: Tensor, strength: float) -> Tensor:
    """Output rows turned by butterfly factors, each pairing rows twice as far apart as the one before."""
    rows = torch.arange(len(weight), device=weight.device)
    for index, blocks in enumerate(rotations):
        if strength != 1:
            blocks = blocks * strength + (1 - strength) * identity
        order = rows.view(-1, 2, 2**index * len(identity) // 2).transpose(1, 2).flatten()
        paired = weight[order].unflatten(0, (-1, len(identity)))
        turned = torch.einsum("b i j, b j ... -> b i ...", blocks, paired).flatten(0, 1)
        weight = torch.empty_like(turned).index_copy_(0, order, turned)
    return weight


_DELTAS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "diff": _diff}


def _ratio(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a [p, r] b [r, q], or with a Tucker core [i, j, k, l] between a [i, p] and b [j, q]: [p, q, k, l]."""
    return a @ b if core is None else torch.einsum("i j k l, j r, i p -> p r k l", core, b, a)
