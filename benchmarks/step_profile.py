"""Where the time of one served step goes, as a table and, with --svg FILE, as the picture in docs/performance.md.

A miniature's step (cond and uncond, 128 px) by the engine's door and shared memory. Client and engine read the same
clock, so that the two ways between them are what lies between their marks.
"""

import itertools
import json
import statistics
import time

import torch

from benchmarks._bench import arguments, conclude, pack_unet, scratch_home, serving, show
from benchmarks.overhead import MINIATURE
from benchmarks.transport import ALONE, COMMON, HERE
from luna_protocol.blob import content_hash
from luna_protocol.messages import UNetForward
from tests import checkpoints

PARTS = {
    "client: write the request": "#4878a8",
    "door, engine: read": "#b0b0b0",
    "engine: check, join": "#e0a030",
    "forward": "#6a9a58",
    "engine: write the reply, door": "#b0b0b0",
    "client: read the reply": "#4878a8",
}


def main() -> None:
    options = arguments(__doc__, svg=True)
    torch.set_num_threads(1)
    with scratch_home() as home:
        file = checkpoints.write(home / "models" / "checkpoints" / "miniature.safetensors", MINIATURE)
        handler = {"role": "unet", "family": "sd15", "home": str(home), "checkpoint": file.name, "dtype": "fp32"}
        handler["checkpoint_roots"] = [str(file.parent)]
        model = pack_unet(home, "timed.unet", HERE / "timed_unet.py", COMMON | ALONE | {"handler": handler})
        with serving(home, [model]) as (_, server):
            ours = steps(server, model, 50 if options.quick else 300)
        theirs = [json.loads(line) for line in (home / "marks.jsonl").read_text().splitlines()[-len(ours) :]]
    marks = [
        (start, sent, *engine, answered, done)
        for (start, sent, answered, done), engine in zip(ours, theirs, strict=True)
    ]
    parts = [[after - before for before, after in itertools.pairwise(each)] for each in marks]
    milliseconds = {
        name: statistics.median(column) * 1e3 for name, column in zip(PARTS, zip(*parts, strict=True), strict=True)
    }
    total = statistics.median(each[-1] - each[0] for each in marks) * 1e3
    show(f"One step: {total:.2f} ms", ["", "ms (median)"], [[name, each] for name, each in milliseconds.items()])
    if options.svg:
        options.svg.write_text(picture(milliseconds), encoding="utf-8")
    conclude({"total_ms": total, "parts_ms": milliseconds})


def steps(server, model: str, count: int) -> list[tuple[float, ...]]:
    """The client's marks of each step: begun, request handed over, answer there, done."""
    context = torch.randn(2, 77, MINIATURE.unet.context)
    tensors = {"x": torch.randn(2, 4, 16, 16), "timesteps": torch.full((2,), 500.0), "context": context}
    request = UNetForward(references={"context": content_hash(context)})
    predict, marks = server._predict, []

    def marked(*arguments):
        marks.append(time.perf_counter())
        answer = predict(*arguments)
        marks.append(time.perf_counter())
        return answer

    server._predict = marked
    result = []
    for number in range(count + 20):
        marks.clear()
        begun = time.perf_counter()
        server.call(model, request, tensors)
        if number >= 20:
            result.append((begun, *marks, time.perf_counter()))
    return result


def picture(milliseconds: dict[str, float]) -> str:
    """A bar of one step, its parts to scale, and their names with their times beneath."""
    width, total = 900, sum(milliseconds.values())
    lines, x = [], 20.0
    for row, (name, each) in enumerate(milliseconds.items()):
        length = width * each / total
        lines.append(f'<rect x="{x:.1f}" y="20" width="{max(length, 0.5):.1f}" height="40" fill="{PARTS[name]}"/>')
        y = 84 + 22 * row
        lines.append(f'<rect x="20" y="{y}" width="14" height="14" fill="{PARTS[name]}"/>')
        lines.append(f'<text x="42" y="{y + 12}">{name}: {each:.2f} ms, {each / total:.0%}</text>')
        x += length
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 {100 + 22 * len(milliseconds)}" '
        f'font-family="sans-serif" font-size="14">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
