"""What ComfyUI believes are its own MODEL, CLIP and VAE: ComfyUI's classes, with the weights and the arithmetic elsewhere."""
