"""LoRAs as a model can use them: read from a file under a LoRA root or sent by a client, parsed, checked, kept."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from handlers.engine.checkpoints import read_header
from handlers.engine.lora.merge import Patch, fits
from handlers.engine.lora.names import Targets
from handlers.engine.roots import find
from luna_protocol.blob import set_hash
from luna_protocol.errors import Impossible, LunaError, Malformed, NotFound, TooLarge

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
            *("alpha", "dora_scale", "oft_blocks", "rescale", "diff", "diff_b", "set_weight"),
            *(f"hada_w{i}_{side}" for i in "12" for side in "ab"),
            *("hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_t2"),
            *(f"lokr_w{i}_{side}" for i in "12" for side in "ab"),
        )
    },
    ".w_norm": "diff",
    ".b_norm": "diff_b",
}
# {kind: (roles of which one set must be there, roles that may be)}
_KINDS = {
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


@dataclass(frozen=True)
class Source:
    """A LoRA's identity: a file in one state of it, or a client's tensors by their hash."""

    label: str
    path: Path | None = None
    stamp: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Lora:
    """A parsed LoRA: {our parameter: patch}, and the names of tensors that fit nothing in this model."""

    patches: dict[str, Patch]
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
            Malformed: the file is a pickle, is cut off, or holds incomplete or doubled patches.
            Impossible: a patch of rank 0, of a wrong shape, not finite; or none that fits this model.
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
            Malformed: their hash is not `content`; or as `get`.
            Impossible: as `get`.
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
            # Copied: a request's tensors may lie in memory that is its client's.
            self._keep(source, self._parse(content, tensors, lambda name: tensors[name].clone()))

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
                return self._parse(source.label, names, lambda name: file.get_tensor(name).clone())
        except (SafetensorError, OSError) as error:
            raise Malformed(f"{source.label} cannot be read: {error}", "is the file complete?") from error

    def _parse(self, label: str, names: Iterable[str], read: Callable[[str], Tensor]) -> Lora:
        found, strangers = self._sort(names)
        patches: dict[str, Patch] = {}
        for module, roles in found.items():
            try:
                for parameter, patch in self._patches(module, {role: read(name) for role, name in roles.items()}):
                    if parameter in patches:
                        raise Malformed(f"{parameter} is patched twice", "a LoRA names each weight once")
                    patches[parameter] = patch
            except LunaError as error:
                raise type(error)(f"{label}, {module}: {error.message}", error.hint) from None
        unmatched = [name for name in strangers if not name.startswith(self._targets.elsewhere)]
        if not patches and unmatched:
            raise Impossible(
                f"{label} fits nothing in this model: {', '.join(unmatched[:3])} ({len(unmatched)} tensors in all)",
                "is it for another family, or of a format that docs/lora.md does not list?",
            )
        return Lora(patches, tuple(unmatched))

    def _sort(self, names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
        """{module: {role: tensor's name}} of what is ours, and the other names."""
        found: dict[str, dict[str, str]] = {}
        strangers = []
        for name in names:
            ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
            module = name[: -len(ending)] if ending else ""
            if module not in self._targets.parameters:
                strangers.append(name)
            elif (other := found.setdefault(module, {}).setdefault(_ENDINGS[ending], name)) != name:
                raise Malformed(f"{other} and {name} are the same tensor twice", "a LoRA names each weight once")
        for module in [module for module, roles in found.items() if roles.keys() <= {"alpha", "dora_scale", "rescale"}]:
            strangers += found.pop(module).values()
        return found, strangers

    def _patches(self, module: str, tensors: dict[str, Tensor]) -> Iterable[tuple[str, Patch]]:
        """(our parameter, patch) for the tensors of one module: its weight's, and its bias's where it has one."""
        weight = self._targets.parameters[module]
        alpha = tensors.pop("alpha", None)
        if alpha is not None and (alpha.numel() != 1 or not bool(torch.isfinite(alpha).all())):
            raise Impossible(f"alpha is {alpha.flatten()[:3].tolist()}", "alpha is one finite number")
        for role, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise Malformed(f"{role} is {str(tensor.dtype)[6:]}", "patches are floating numbers")
            if not bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.half()).all()):
                raise Impossible(f"{role} has values that are not finite", "the training of this LoRA went wrong")
        bias = tensors.pop("diff_b", None)
        if bias is not None:
            yield self._checked(weight.removesuffix("weight") + "bias", Patch("diff", {"diff": bias}))
        if tensors:
            kind = _kind(tensors)
            yield self._checked(weight, Patch(kind, tensors, None if alpha is None else float(alpha)))

    def _checked(self, parameter: str, patch: Patch) -> tuple[str, Patch]:
        if parameter not in self._shapes:
            raise Impossible(f"{parameter} is patched, but this model has none", "is it for another family?")
        if reason := fits(patch, self._shapes[parameter]):
            raise Impossible(f"the {patch.kind} patch {reason}", "is it for another model?")
        return parameter, patch


def _kind(tensors: Mapping[str, Tensor]) -> str:
    roles = set(tensors)
    for kind, (complete, optional) in _KINDS.items():
        if any(required <= roles <= required | optional for required in complete):
            return "boft" if kind == "oft" and tensors["oft_blocks"].ndim == 4 else kind
    raise Malformed(
        f"{', '.join(sorted(roles))} make no patch", "a tensor is missing, or two formats are mixed: docs/lora.md"
    )
