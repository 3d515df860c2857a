"""Stage 1: images to latents and back, and the losses it is trained with."""
