"""ldmkit: train latent diffusion models on your own pictures."""

__version__ = "0.1.0"
