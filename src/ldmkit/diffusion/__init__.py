"""The mathematics of diffusion: schedules, parameterizations, guidance, losses, samplers. No networks, no files."""
