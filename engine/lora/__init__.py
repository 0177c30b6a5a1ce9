"""A request's LoRAs on a frozen model: read, matched, merged into overlays or run beside the weights."""
