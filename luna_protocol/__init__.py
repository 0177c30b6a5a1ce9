"""The one language that LunaServe's server and its clients speak; it imports neither side."""

PROTOCOL_VERSION = 1
