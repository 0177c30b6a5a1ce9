"""A client for any Python program: connections, tokens, management, calls. Needs nothing of ComfyUI or TorchServe."""
