"""What TorchServe hands over, and how an answer becomes its own."""

import logging
from typing import Any

from luna_protocol.answer import Answer


def body_of(row: dict[str, Any]) -> Any:
    """The body of one row of a batch: bytes, or the values of its JSON."""
    return row["body"] if "body" in row else row.get("data") or b""


def respond(answer: Answer, context, index: int) -> bytes | bytearray:
    """Sets what is to be said of row `index` of a batch, and returns its body."""
    context.set_response_content_type(index, answer.content_type)
    if answer.status != 200:
        context.set_response_status(answer.status, answer.reason, index)
    if answer.retry_after is not None:
        context.set_response_header(index, "Retry-After", str(max(1, round(answer.retry_after))))
    return answer.body


def quiet_logs() -> None:
    """Has the root logger pass warnings only: TorchServe's worker logs every request to it, and each line goes through
    the JVM. Metrics go the same way, by loggers of their own."""
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("ts", "handlers", "engine"):
        logging.getLogger(name).setLevel(logging.INFO)
