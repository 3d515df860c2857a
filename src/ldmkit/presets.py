"""Named settings: the demo's, and the paper's published ones with their sources.

A preset is a partial config; what it does not name keeps the default, and what the user types wins.
"LDM" below is the code published with the paper (CompVis/latent-diffusion, a506df5).
"""

from typing import Any

Settings = dict[str, Any]

TINY_AE: Settings = {
    # The demo: 64 px pictures to 16 x 16 latents, minutes on two CPU cores.
    "steps": 700,
    "batch_size": 8,
    "lr": 1e-3,
    "betas": [0.9, 0.99],
    "warmup": 50,
    "cooldown": 350,
    "holdout": 0.05,
    "precision": "auto",
    "log_every": 25,
    "sample_every": 175,
    "save_every": 175,
    "preprocessing": {"size": 64, "flip": True},
    "autoencoder": {
        "channels": 32,
        "multipliers": [1, 2, 4],
        "residual_blocks": 1,
        "norm_groups": 8,
    },
    "loss": {"kl_weight": 0.02, "disc_start": 580, "disc_channels": 32, "disc_layers": 2},
}

KL_F4: Settings = {
    # LDM models/first_stage_models/kl-f4/config.yaml; learning rate 4.5e-6 x batch; README: 176991 steps
    "steps": 176_991,
    "batch_size": 10,
    "lr": 4.5e-5,
    "save_every": 5_000,
    "preprocessing": {"size": 256, "crop": "random"},
    "autoencoder": {"multipliers": [1, 2, 4], "latent_channels": 3},
    "loss": {"perceptual": "lpips-vgg"},
}

KL_F8: Settings = {
    # LDM models/first_stage_models/kl-f8/config.yaml; learning rate 4.5e-6 x batch; README: 246803 steps
    "steps": 246_803,
    "batch_size": 4,
    "lr": 1.8e-5,
    "save_every": 5_000,
    "preprocessing": {"size": 256, "crop": "random"},
    "autoencoder": {"multipliers": [1, 2, 4, 4], "latent_channels": 4},
    "loss": {"perceptual": "lpips-vgg"},
}

TINY_DIFFUSION: Settings = {
    # The demo: 16 x 16 latents, minutes on two CPU cores. v, and the schedule of the paper's
    # text-to-image model, because they learn layouts in so few steps (docs/log.md).
    "steps": 2600,
    "batch_size": 16,
    "lr": 1e-3,
    "warmup": 100,
    "cooldown": 900,
    "parameterization": "v",
    "schedule": {"beta_start": 0.00085, "beta_end": 0.012},
    "precision": "auto",
    "log_every": 50,
    "sample_every": 650,
    "save_every": 650,
    "unet": {
        "channels": 64,
        "multipliers": [1, 2, 2],
        "residual_blocks": 1,
        "attention_factors": [4],
        "head_channels": 32,
        "norm_groups": 16,
        "context_channels": 128,
    },
}

LDM_4_IMAGENET: Settings = {
    # LDM configs/latent-diffusion/cin256-v2.yaml; paper Tab. 15: batch 1200, 178k steps, lr 1e-4, 400M
    "steps": 178_000,
    "batch_size": 1200,
    "lr": 1e-4,
    "condition": "class",
    "save_every": 5_000,
    "unet": {
        "channels": 192,
        "multipliers": [1, 2, 3, 5],
        "residual_blocks": 2,
        "attention_factors": [8, 4, 2],
        "transformer_depth": 1,
        "context_channels": 512,
    },
    "schedule": {"timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195},
}

PRESETS: dict[str, dict[str, Settings]] = {
    "train-ae": {"tiny": TINY_AE, "kl-f4": KL_F4, "kl-f8": KL_F8},
    "train-diffusion": {"tiny": TINY_DIFFUSION, "ldm-4-imagenet": LDM_4_IMAGENET},
}
"""Command -> name -> settings."""
