"""The nodes, one file per family of them; importing this also adds the panel's routes to ComfyUI's own server."""

from comfy_client import panel
from comfy_client.nodes import choices, encode, gateway, lora_stack, router, saver, status, step_cache, vae

panel.register_routes(before_lists=choices.refresh)

_FAMILIES = (router, gateway, step_cache, lora_stack, encode, vae, saver, status)
NODE_CLASS_MAPPINGS = {name: node for family in _FAMILIES for name, node in family.NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: node.TITLE for name, node in NODE_CLASS_MAPPINGS.items()}
