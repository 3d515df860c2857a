"""ldmkit: train latent diffusion models on your own pictures.

Every command is one typed function here: `train_ae`, `encode`, `train_diffusion`, `sample`, `decode`,
`inspect`; each takes its config. `load_autoencoder` and `load_diffusion` give modules. All of it is
imported on first use, so that `import ldmkit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldmkit.version import __version__

if TYPE_CHECKING:
    from ldmkit.assembly import load_autoencoder, load_diffusion
    from ldmkit.configs import (
        DecodeConfig,
        EncodeConfig,
        InspectConfig,
        SampleConfig,
        TrainAEConfig,
        TrainDiffusionConfig,
    )
    from ldmkit.recipes.decode import decode
    from ldmkit.recipes.encode import encode
    from ldmkit.recipes.inspect import inspect
    from ldmkit.recipes.sample import sample
    from ldmkit.recipes.train_ae import train_ae
    from ldmkit.recipes.train_diffusion import train_diffusion

__all__ = [
    "DecodeConfig",
    "EncodeConfig",
    "InspectConfig",
    "SampleConfig",
    "TrainAEConfig",
    "TrainDiffusionConfig",
    "__version__",
    "decode",
    "encode",
    "inspect",
    "load_autoencoder",
    "load_diffusion",
    "sample",
    "train_ae",
    "train_diffusion",
]

_HOME = {
    **dict.fromkeys(("load_autoencoder", "load_diffusion"), "ldmkit.assembly"),
    **dict.fromkeys([name for name in __all__ if name.endswith("Config")], "ldmkit.configs"),
    **{
        name: f"ldmkit.recipes.{name}"
        for name in ("train_ae", "encode", "train_diffusion", "sample", "decode", "inspect")
    },
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562: modules and functions alike
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ldmkit' has no attribute {name!r}")
