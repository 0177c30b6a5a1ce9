"""What a user is told beside a node's outcome."""

import logging

from server import PromptServer

log = logging.getLogger(__name__)


def warn(message: str) -> None:
    """A warning in ComfyUI's log and on its screen; web/luna.js shows it."""
    log.warning(message)
    PromptServer.instance.send_sync("luna.warning", {"message": message})
