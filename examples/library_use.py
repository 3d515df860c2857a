"""ldmkit from Python: every command is a function, and models are plain torch modules.

python examples/library_use.py DATA OUT
"""

import sys
from pathlib import Path

import torch

import ldmkit
from ldmkit.autoencoder_configs import AutoencoderConfig, DiscriminatorConfig, PreprocessingConfig
from ldmkit.diffusion_configs import UNetConfig

STEPS = 2  # enough to see the parts fit; thousands for pictures


def main(data: Path, out: Path) -> None:
    """Train both stages for a moment, then use the models by hand."""
    autoencoder_file = ldmkit.train_ae(
        ldmkit.TrainAEConfig(
            data=str(data),
            out=out / "ae",
            steps=STEPS,
            batch_size=4,
            preprocessing=PreprocessingConfig(size=32),
            autoencoder=AutoencoderConfig(
                channels=16, multipliers=(1, 2), residual_blocks=1, norm_groups=4
            ),
            disc=DiscriminatorConfig(weight=0.0),
        )
    )
    latents = ldmkit.encode(
        ldmkit.EncodeConfig(data=str(data), ae=autoencoder_file, out=out / "latents")
    )
    assert latents is not None  # None only when the latents are streamed
    diffusion_file = ldmkit.train_diffusion(
        ldmkit.TrainDiffusionConfig(
            latents=latents,
            out=out / "ldm",
            steps=STEPS,
            batch_size=4,
            unet=UNetConfig(channels=32, multipliers=(1, 2), attention_factors=(2,), norm_groups=8),
        )
    )

    autoencoder = ldmkit.load_autoencoder(autoencoder_file)
    diffusion = ldmkit.load_diffusion(diffusion_file)
    noisy = torch.randn(1, 4, 16, 16) * 10.0
    with torch.inference_mode():
        nothing = {"class": torch.tensor([[-1]])} if diffusion.config.conditions else {}
        clean = diffusion.denoise(noisy, torch.tensor([10.0]), diffusion.condition(nothing))
        image = autoencoder.decode(diffusion.unwhiten(clean))
    print(f"one denoising step gave an image of {tuple(image.shape)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
