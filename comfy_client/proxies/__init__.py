"""What ComfyUI believes are its own MODEL, CLIP and VAE: its classes, with weights and arithmetic elsewhere."""
