"""Our UNet's role with a clock in it, in the place of an archive's own; step_profile.py reads what it noted."""

import json
import time

from engine.roles import ours


class UNetRole(ours.UNetRole):
    """Appends a line to home/marks.jsonl for each forward: when it was admitted, begun and done."""

    def admit(self, item):
        self._admitted = time.perf_counter()
        return super().admit(item)

    def run(self, items):
        marks = [self._admitted, time.perf_counter()]
        replies = super().run(items)
        marks.append(time.perf_counter())
        with (self.settings.home / "marks.jsonl").open("a") as file:
            file.write(json.dumps(marks) + "\n")
        return replies
