"""Print docs/presets.md, made from the presets themselves (`make docs`)."""

from ldmkit.configs import PresetsConfig
from ldmkit.recipes.presets import presets

HEAD = """# Presets

Made from the presets by `make docs`; `ldmkit presets` prints the same. f is the down-sampling factor, z
the number of latent channels. Parameters are those of the autoencoder, without the discriminator; a test
holds them to the same networks built by diffusers.

What is published: the nine models of the code that came with the paper, whose configurations give
widths, attention, latents, codebooks, discriminator and learning rate (4.5e-6 x batch), and whose README
gives the steps. The rows of the paper's Table 8 that were not released have their own latents and
codebooks, and the training of their neighbours. The published VQ models were trained with the commitment
weight on the other term (`--autoencoder.codebook.legacy-commitment`); here it stands where the papers
have it.

`lpips-vgg` needs torchvision's VGG16 (downloaded by torchvision, or `--perceptual-weights FILE`); with
`--loss.perceptual vgg16` every preset trains without a download.

| preset | parameters | f | z | codes | source |
|---|---:|---:|---:|---:|---|"""


def main() -> None:
    """Print the page."""
    print(HEAD)
    for preset in presets(PresetsConfig(command="train-ae"))["presets"]:
        codes = f"{preset['codes']:,}" if preset["codes"] else ""
        print(
            f"| `{preset['name']}` | {preset['parameters']:,} | {preset['factor']} "
            f"| {preset['latent_channels']} | {codes} | {preset['source']} |"
        )


if __name__ == "__main__":
    main()
