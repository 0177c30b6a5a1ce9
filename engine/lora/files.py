"""LoRAs as a model can use them: read from a file under a LoRA root or sent by a client, parsed, checked, kept."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoints import read_header
from engine.lora.merge import Patch, fits
from engine.lora.names import Targets
from engine.roots import find
from luna_protocol.blob import set_hash
from luna_protocol.errors import Malformed, NotFound, TooLarge

SUFFIX = ".safetensors"
MAX_BYTES = 8 << 30

# {ending of a tensor's name: its role}. Peft and diffusers call up B and down A.
_ENDINGS = {
    **{
        ending: "lora_up"
        for ending in (
            ".lora_up.weight",
            ".lora_B.weight",
            ".lora_B.default.weight",
            ".lora_B",
            ".lora.up.weight",
            "_lora.up.weight",
            ".lora_linear_layer.up.weight",
        )
    },
    **{
        ending: "lora_down"
        for ending in (
            ".lora_down.weight",
            ".lora_A.weight",
            ".lora_A.default.weight",
            ".lora_A",
            ".lora.down.weight",
            "_lora.down.weight",
            ".lora_linear_layer.down.weight",
        )
    },
    ".lora_mid.weight": "lora_mid",
    **{f".{role}.weight": role for role in ("a1", "a2", "b1", "b2")},
    **{
        f".{role}": role
        for role in (
            *("alpha", "dora_scale", "oft_blocks", "rescale", "diff", "diff_b", "no_diff", "set_weight"),
            *(f"hada_w{i}_{side}" for i in "12" for side in "ab"),
            *("hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_t2"),
            *(f"lokr_w{i}_{side}" for i in "12" for side in "ab"),
        )
    },
    ".w_norm": "diff",
    ".b_norm": "diff_b",
}
# {kind: (roles of which one set must be there, roles that may be)}; a layer that has several kinds takes the last.
_KINDS = {
    "no_diff": ([{"no_diff"}], set()),
    "lora": ([{"lora_up", "lora_down"}], {"lora_mid", "dora_scale"}),
    "loha": ([{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}], {"hada_t1", "hada_t2", "dora_scale"}),
    "lokr": (
        [
            {"lokr_w1", "lokr_w2"},
            {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
            {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
            {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
        ],
        {"lokr_t2", "dora_scale"},
    ),
    "glora": ([{"a1", "a2", "b1", "b2"}], {"dora_scale"}),
    "oft": ([{"oft_blocks"}], {"rescale"}),
    "diff": ([{"diff"}], set()),
    "set": ([{"set_weight"}], set()),
}
_NO_PATCH_ALONE = {"alpha", "dora_scale", "rescale"}


@dataclass(frozen=True)
class Source:
    """A LoRA's identity: a file in one state of it, or a client's tensors by their hash."""

    label: str
    path: Path | None = None
    stamp: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Lora:
    """A parsed LoRA: {our parameter: patch}, {layer in the file: why it is left out}, and the names of tensors that
    belong to no layer of this model."""

    patches: dict[str, Patch]
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(patch.nbytes for patch in self.patches.values())


class LoraFiles:
    """Parsed LoRAs for one model; beyond `capacity` bytes, `trim` drops the least recently used.

    A file is read again when its size or time of change differs. Not thread-safe: the overlays' lock guards it.
    """

    def __init__(self, roots: tuple[Path, ...], targets: Targets, shapes: Mapping[str, torch.Size], capacity: int):
        self._roots = roots
        self._targets = targets
        self._shapes = shapes
        self._capacity = capacity
        self._loras: OrderedDict[Source, Lora] = OrderedDict()

    def source(self, name: str) -> Source:
        """The file that a request calls `name`: a path below a root, with or without ".safetensors".

        Raises:
            Malformed: the name leads out of the root.
            NotFound: no root has it.
        """
        try:
            path = find(self._roots, name, "LoRA")
        except NotFound:
            if name.endswith(SUFFIX):
                raise
            path = find(self._roots, name + SUFFIX, "LoRA")
        status = path.stat()
        return Source(path.name, path, (status.st_mtime_ns, status.st_size))

    def get(self, source: Source) -> Lora | None:
        """The parsed LoRA, read from its file where need be; None for a client's tensors that are not held.

        Raises:
            Malformed: the file is a pickle, or is cut off.
            TooLarge: it has more than `MAX_BYTES`.
        """
        if source not in self._loras:
            if source.path is None:
                return None
            self._keep(source, self._read(source))
        self._loras.move_to_end(source)
        return self._loras[source]

    def receive(self, content: str, tensors: Mapping[str, Tensor]) -> None:
        """Takes a client's tensors, named as in a LoRA file.

        Raises:
            Malformed: their hash is not `content`.
        """
        # Copied first: they may lie in memory that is the client's again after its reply.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        actual = set_hash(tensors)
        if actual != content:
            raise Malformed(
                f"LoRA tensors came as {content}, their content has the hash {actual}",
                "see set_hash in luna_protocol/blob.py",
            )
        source = Source(content)
        if source not in self._loras:
            self._keep(source, self._parse(tensors, tensors.__getitem__))

    def trim(self, spare: Collection[Source] = ()) -> None:
        """Drops the least recently used beyond the capacity, but none of `spare`, which a request still needs."""
        held = sum(lora.nbytes for lora in self._loras.values())
        for source in [source for source in self._loras if source not in spare]:
            if held <= self._capacity:
                break
            held -= self._loras.pop(source).nbytes

    def _keep(self, source: Source, lora: Lora) -> None:
        for old in [other for other in self._loras if other.path and other.path == source.path]:
            del self._loras[old]
        self._loras[source] = lora

    def _read(self, source: Source) -> Lora:
        if source.stamp[1] > MAX_BYTES:
            raise TooLarge(f"{source.label} has {source.stamp[1]} bytes", f"a LoRA may have up to {MAX_BYTES}")
        names = read_header(source.path)
        try:
            with safe_open(source.path, "pt") as file:
                # Copied out of the mapping: the file may be overwritten while its patches are in use.
                return self._parse(names, lambda name: file.get_tensor(name).clone())
        except (SafetensorError, OSError) as error:
            raise Malformed(f"{source.label} cannot be read: {error}", "is the file complete?") from error

    def _parse(self, names: Iterable[str], read: Callable[[str], Tensor]) -> Lora:
        """As in ComfyUI, layers that cannot be applied are left out, and unknown tensors ignored: both are reported."""
        layers, skipped, unmatched = self._sort(names)
        patches: dict[str, Patch] = {}
        for layer, roles in layers.items():
            tensors = {role: read(name) for role, name in roles.items()}
            weight = self._targets.parameters[layer]
            bias = {"diff": tensors.pop("diff_b")} if "diff_b" in tensors else {}
            for parameter, own in ((weight, tensors), (weight.removesuffix("weight") + "bias", bias)):
                if own.keys() <= _NO_PATCH_ALONE:
                    continue
                try:
                    patch, unused = self._patch(parameter, own)
                    if parameter in patches:
                        raise ValueError(f"{parameter} is patched twice")
                except ValueError as error:
                    skipped[layer] = str(error)
                else:
                    patches[parameter] = patch
                    unmatched += [roles[role] for role in unused]
        return Lora(patches, skipped, tuple(name for name in unmatched if not name.startswith(self._targets.elsewhere)))

    def _sort(self, names: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
        """{layer: {role: tensor's name}} of what is ours, {layer: why not} of those with doubles, and other names."""
        layers: dict[str, dict[str, str]] = {}
        doubled: dict[str, str] = {}
        strangers = []
        for name in names:
            ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
            layer = name[: -len(ending)] if ending else ""
            if layer not in self._targets.parameters:
                strangers.append(name)
            elif (other := layers.setdefault(layer, {}).setdefault(_ENDINGS[ending], name)) != name:
                doubled[layer] = f"{other} and {name} are the same tensor twice"
        for layer in doubled:
            del layers[layer]
        for layer in [layer for layer, roles in layers.items() if roles.keys() <= _NO_PATCH_ALONE]:
            strangers += layers.pop(layer).values()
        return layers, doubled, strangers

    def _patch(self, parameter: str, tensors: dict[str, Tensor]) -> tuple[Patch, set[str]]:
        """The patch that these {role: tensor} make, and the roles that it does not use.

        Raises:
            ValueError: why there is none that can be applied.
        """
        if parameter not in self._shapes:
            raise ValueError(f"{parameter} is patched, but this model has none")
        alpha = tensors.pop("alpha", None)
        if alpha is not None and (alpha.numel() != 1 or not bool(torch.isfinite(alpha).all())):
            raise ValueError(f"alpha is {alpha.flatten()[:3].tolist()}, not one finite number")
        kind, used = _kind(tensors)
        unused = tensors.keys() - used
        tensors = {role: tensors[role] for role in used}
        for role, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{role} is {str(tensor.dtype)[6:]}, not floating numbers")
            if not bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.half()).all()):
                raise ValueError(f"{role} has values that are not finite")
        patch = Patch(kind, {} if kind == "no_diff" else tensors, None if alpha is None else float(alpha))
        if reason := fits(patch, self._shapes[parameter]):
            raise ValueError(f"the {patch.kind} patch {reason}")
        return patch, unused


def _kind(tensors: Mapping[str, Tensor]) -> tuple[str, set[str]]:
    """The patch's kind, and which of the roles make it."""
    roles = tensors.keys()
    for kind, (complete, optional) in reversed(_KINDS.items()):
        for required in complete:
            if required <= roles:
                is_boft = kind == "oft" and tensors["oft_blocks"].ndim == 4
                return "boft" if is_boft else kind, required | (optional & roles)
    raise ValueError(f"{', '.join(sorted(roles))} make no patch: a tensor is missing")
