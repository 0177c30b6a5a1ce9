"""From latents to pictures in the output folder: jobs that are kept, done once, and never lost."""
