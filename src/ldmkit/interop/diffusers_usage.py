"""The program `use.py` in an exported folder that no pipeline of diffusers fits.

It is written out for the model at hand, so that it reads as if somebody had written it by hand.
"""

from typing import Literal, NamedTuple

HEAD = '''"""Draws pictures from the model in this folder with diffusers alone: `python use.py --help`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import {names}
{imports}
HERE = Path(__file__).resolve().parent
LATENTS = {latents}  # channels, height, width


def load(kind, name):
    return kind.from_pretrained(HERE / name, low_cpu_mem_usage=False).eval()


@torch.no_grad()
def draw(noise, {parameters}):
    """{what}"""
    unet, autoencoder = load({unet}, "unet"), load({autoencoder}, "{folder}")
    scheduler = {scheduler}.from_pretrained(HERE / "scheduler")
{condition}    {set_steps}
    x = noise
    for t in scheduler.timesteps:
{predict}
        x = scheduler.step(prediction, t, x).prev_sample
{unscale}
    return autoencoder.decode(x).sample

'''
MAIN = """
if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--num", type=int, default=4)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--steps", type=int, default=50)
{options}    options.add_argument("--out", type=Path, default=Path("."))
    given = options.parse_args()
    noise = torch.randn(given.num, *LATENTS, generator=torch.Generator().manual_seed(given.seed))
{call}
    given.out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate((pictures / 2 + 0.5).clamp(0, 1)):
{save}
"""
ATTENDED = {
    "imports": "from safetensors.torch import load_file\n",
    "condition": """\
    table = load_file(HERE / "class_embedding.safetensors")["weight"]  # its last row: no class
    told = table[torch.where(labels < 0, len(table) - 1, labels)][:, None]
    nothing = table[-1:].expand(len(noise), -1)[:, None]
""",
    "predict": """\
        prediction = unet(x, t, told).sample
        if guidance != 1.0:
            free = unet(x, t, nothing).sample
            prediction = free + guidance * (prediction - free)""",
}
ADDED = {
    "imports": "",
    "condition": """\
    nothing = torch.full_like(labels, unet.config.num_class_embeds - 1)  # the last row: no class
    told = torch.where(labels < 0, nothing, labels)
""",
    "predict": """\
        prediction = unet(x, t, class_labels=told).sample
        if guidance != 1.0:
            free = unet(x, t, class_labels=nothing).sample
            prediction = free + guidance * (prediction - free)""",
}
WITH_CLASSES = {
    "parameters": "labels, steps=50, guidance=1.0",
    "what": "Pictures in [-1, 1] for noise [n, *LATENTS] and n class numbers (-1: none).",
    "options": """\
    options.add_argument("--label", type=int, default=-1, help="class number; -1: none")
    options.add_argument("--guidance", type=float, default=1.0)
""",
    "call": """\
    labels = torch.full((given.num,), given.label)
    pictures = draw(noise, labels, given.steps, given.guidance)""",
}
WITHOUT = {
    "imports": "",
    "parameters": "steps=50",
    "what": "Pictures in [-1, 1] for noise [n, *LATENTS].",
    "condition": "",
    "predict": "        prediction = unet(x, t).sample",
    "options": "",
    "call": "    pictures = draw(noise, given.steps)",
}
WORDS = {None: WITHOUT, "tokens": WITH_CLASSES | ATTENDED, "vector": WITH_CLASSES | ADDED}
"""By how the network is told classes."""
SET_STEPS = {
    False: "scheduler.set_timesteps(steps)  # exact where it divides the number of levels",
    True: "scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])",
}
UNSCALE = {
    False: "    x = x / autoencoder.config.scaling_factor",
    True: """\
    scale = (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    mean, std = (torch.tensor(row).view(-1, 1, 1) for row in scale)
    x = x * std + mean""",
}
SAVE = {
    False: """\
        values = (255 * picture).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(values.squeeze()).save(given.out / f"{number:04}.png")""",
    True: '        np.save(given.out / f"{number:04}.npy", picture.numpy())',
}


class Parts(NamedTuple):
    """What the program names."""

    unet: str
    autoencoder: str
    scheduler: str
    folder: str
    """Of the autoencoder."""
    latents: tuple[int, int, int]
    classes: Literal["tokens", "vector"] | None
    """How the network is told them."""
    flow: bool
    by_channel: bool
    """Whether latents are unscaled by channel here, and not within the autoencoder."""
    image_channels: int


def usage_program(parts: Parts) -> str:
    """The program's text."""
    words = WORDS[parts.classes]
    arrays = parts.image_channels not in (1, 3)
    imports = ("" if arrays else "from PIL import Image\n") + words["imports"]
    head = HEAD.format(
        **words | {"imports": imports},
        **parts._asdict() | {"classes": None},
        names=", ".join(sorted(parts[:3])),
        set_steps=SET_STEPS[parts.flow],
        unscale=UNSCALE[parts.by_channel],
    )
    if not arrays:
        head = head.replace("import numpy as np\n", "")
    return head + MAIN.format(options=words["options"], call=words["call"], save=SAVE[arrays])
