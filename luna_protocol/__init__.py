"""The one language that LunaServe's server and its clients speak; it imports neither side."""

PROTOCOL_VERSION = 2
# Content types of HTTP bodies: tensors with their message, and a message alone or where to find a blob.
BLOB, JSON = "application/octet-stream", "application/json"
MAX_BODY_BYTES = 202_375_168  # max_request_size and max_response_size of config.properties
