"""TorchServe's floor: a handler that gives back the body it was sent."""


def handle(data, context):
    return [bytes(row.get("body") or b"") for row in data] if data else None
