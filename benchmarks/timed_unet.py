"""Our UNet handler with a clock in it; step_profile.py packs it into an archive and reads what it noted."""

import json
import time

from handlers.unet_forward import UNetHandler


class TimedUNet(UNetHandler):
    """Appends a line to home/marks.jsonl for each call: when it began, was decoded, was run, and was encoded."""

    def handle(self, data, context):
        self.marks = [time.perf_counter()]
        replies = super().handle(data, context)
        self.marks.append(time.perf_counter())
        with (self.settings.home / "marks.jsonl").open("a") as file:
            file.write(json.dumps(self.marks) + "\n")
        return replies

    def run(self, items):
        self.marks.append(time.perf_counter())
        replies = super().run(items)
        self.marks.append(time.perf_counter())
        return replies
