"""Pictures as files: their names, formats and metadata; the same whether the server saves them or ComfyUI does."""
