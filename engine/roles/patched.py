"""What the roles share whose weights LoRAs patch: uploads, stacks, the choice between merging and not, reports."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import islice

from torch import Tensor, nn

from engine.lora.files import LoraFiles
from engine.lora.names import Targets
from engine.lora.overlays import Match, Overlays
from engine.role import Item, Reply, Role
from luna_protocol.errors import Impossible, Malformed
from luna_protocol.messages import LoraReport, Patched

UPLOAD = "lora."
MAX_NAMES = 256  # in one reply
_COUNTERS = {
    "LoraMerges": "merges",
    "LoraOverlayHits": "hits",
    "LoraEvictions": "evictions",
    "LoraUnmergedForwards": "unmerged_forwards",
    "LoraMergeSeconds": "merge_seconds",
}


class PatchedRole(Role):
    """A Role whose subclasses call `take_loras` when they load, and answer `run_patched` instead of `run`."""

    def run_patched(self, items: list[Item]) -> list[Reply]:
        """Replies to requests of one group, while the model has their LoRAs."""
        raise NotImplementedError

    def rows(self, item: Item) -> int | None:
        """How many rows this request has in a batch, one request's after the other's; None if they may not run beside
        rows with other LoRAs."""
        return None

    def take_loras(self, model: nn.Module, targets: Targets) -> None:
        """Prepares for patching `model`, whose parameters `targets` names."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        files = LoraFiles(self.settings.roots.loras, targets, shapes, self.settings.lora_cache_mb << 20)
        overlay_mb = self.settings.lora_overlay_mb
        self.overlays = Overlays(model, files, None if overlay_mb is None else overlay_mb << 20)

    def caches_bytes(self) -> int:
        return self.overlays.counters.nbytes

    def drop_caches(self) -> None:
        self.overlays.clear()

    def missing(self, item: Item[Patched]) -> list[str]:
        uploads = _uploads(item.tensors)
        used = {use.content for use in (*item.request.lora, *item.request.hook_lora)}
        for content, tensors in uploads.items():
            if content not in used:
                raise Malformed(f"tensors came for the LoRA {content!r}, which no entry of the stack names")
            self.overlays.receive(content, tensors)
        item.stack = self.overlays.stack(item.request.lora, item.request.hook_lora)
        return self.overlays.missing(item.stack)

    def run(self, items: list[Item[Patched]]) -> list[Reply]:
        before = replace(self.overlays.counters)
        replies = self._run(items)
        counters = self.overlays.counters
        risen = {metric: getattr(counters, name) - getattr(before, name) for metric, name in _COUNTERS.items()}
        replies[0].counters |= {metric: amount for metric, amount in risen.items() if amount}
        if risen["LoraMerges"] or risen["LoraEvictions"]:
            replies[0].sizes["LoraOverlayBytes"] = counters.nbytes
        return replies

    def _run(self, items: list[Item[Patched]]) -> list[Reply]:
        """Row-wise beside the weights where one overlay for each stack would not fit in memory and every request can do
        without merging; else stack by stack, by the same rule for each stack alone."""
        stacks = list(dict.fromkeys(item.stack for item in items))
        beside = self._beside(items, stacks)
        if len(stacks) > 1 and not beside:
            return self._stack_by_stack(items, stacks)
        if beside:
            patched = self.overlays.unmerged([(item.stack, self.rows(item)) for item in items])
        else:
            patched = self.overlays.merged(stacks[0])
        with patched as matches:
            replies = self.run_patched(items)
        for item, reply, match in zip(items, replies, matches if beside else [matches] * len(items), strict=True):
            reply.message.unmerged = beside
            reply.message.lora = _reports(item.request, match)
        return replies

    def _stack_by_stack(self, items: list[Item[Patched]], stacks: list) -> list[Reply]:
        replies: dict[int, Reply] = {}
        for stack in stacks:
            members = [index for index, item in enumerate(items) if item.stack == stack]
            replies |= zip(members, self._run([items[index] for index in members]), strict=True)
        return [replies[index] for index in range(len(items))]

    def _beside(self, items: list[Item], stacks: list) -> bool:
        return (
            any(stack.uses for stack in stacks)
            and not self.overlays.fit(stacks)
            and all(self.rows(item) is not None for item in items)
            and all(map(self.overlays.mergeless, stacks))
        )


def refuse_unknown(item: Item, known: Collection[str]) -> None:
    """Checks that no tensors besides the `known` ones came, LoRAs' left aside.

    Raises:
        Impossible: naming those that did.
    """
    if unknown := sorted(item.tensors.keys() - known):
        raise Impossible(
            f"unknown tensors came: {', '.join(unknown)}", f"this model takes {', '.join(known) or 'none with this'}"
        )


def _uploads(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{content hash: tensors under their names in the file}, taken out of a request's tensors."""
    uploads: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith(UPLOAD)]:
        content, _, own = name.removeprefix(UPLOAD).partition(".")
        uploads.setdefault(content, {})[own] = tensors.pop(name)
    return uploads


def _reports(request: Patched, matches: Sequence[Match]) -> list[LoraReport]:
    reports, room = [], MAX_NAMES
    for use, match in zip((*request.lora, *request.hook_lora), matches, strict=True):
        skipped = [f"{layer}: {reason}" for layer, reason in islice(match.skipped.items(), room)]
        unmatched = list(match.unmatched[: room - len(skipped)])
        room -= len(skipped) + len(unmatched)
        reports.append(
            LoraReport(
                name=use.name,
                content=use.content,
                matched=match.patched,
                skipped=len(match.skipped),
                skipped_layers=skipped,
                unmatched=len(match.unmatched),
                unmatched_names=unmatched,
            )
        )
    return reports
