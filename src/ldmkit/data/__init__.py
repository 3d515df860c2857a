"""Pictures in, latents in and out, and the order in which training sees them."""
