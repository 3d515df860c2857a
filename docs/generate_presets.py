"""Print docs/presets.md, made from the presets themselves (`make docs`)."""

from ldmkit.configs import PresetsConfig
from ldmkit.recipes.presets import presets

HEAD = """# Presets

Made from the presets by `make docs`; `ldmkit presets` prints the same.

## Autoencoders

f is the down-sampling factor, z
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

DIFFUSION = """
## Diffusion models

The models of the paper's Tables 12 and 15 and of its code, Stable Diffusion 1, and three sizes of our own. The
number of parameters is that of the U-Net for the latents and channels named here; at training time the
data say both. Where a count is published, a test holds ours to it within 0.5 %, with what the source
counts beside the U-Net. Schedule, learning rate, batch and steps are the published ones; where the paper
and the code disagree, the network is the code's and the training the paper's, and the source says so.

A preset names what the U-Net attends to and what comes beside the latents, and asks for that condition
(docs/conditions.md), with the published text and box transformers. Where a model was published without training
for guidance (layouts, semantic maps, super-resolution, inpainting, ImageNet on f8 latents) no condition is
dropped.

| preset | U-Net | latents | beside | attends to | published | of it elsewhere | source |
|---|---:|---|---:|---|---:|---|---|"""


def main() -> None:
    """Print the page."""
    print(HEAD)
    for preset in presets(PresetsConfig(command="train-ae"))["presets"]:
        codes = f"{preset['codes']:,}" if preset["codes"] else ""
        print(
            f"| `{preset['name']}` | {preset['parameters']:,} | {preset['factor']} "
            f"| {preset['latent_channels']} | {codes} | {preset['source']} |"
        )
    print(DIFFUSION)
    for preset in presets(PresetsConfig(command="train-diffusion"))["presets"]:
        published = f"{preset['published'] / 1e6:,.0f}M" if preset["published"] else ""
        elsewhere = f"{preset['beside']:,}: {preset['counted']}" if preset["beside"] else ""
        print(
            f"| `{preset['name']}` | {preset['parameters']:,} | {'x'.join(map(str, preset['latents']))} "
            f"| {preset['concatenated'] or ''} | {preset['tokens']} | {published} | {elsewhere} "
            f"| {preset['source']} |"
        )


if __name__ == "__main__":
    main()
