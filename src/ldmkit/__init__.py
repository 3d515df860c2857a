"""ldmkit: train latent diffusion models on your own pictures.

Every command is one typed function of its name here (`train_ae` for `train-ae`), which takes its config.
`load_autoencoder` and `load_diffusion` give modules. All of it is imported on first use, so that
`import ldmkit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldmkit.version import __version__

if TYPE_CHECKING:
    from ldmkit.assembly import load_autoencoder, load_diffusion
    from ldmkit.care_configs import DoctorConfig, VerifyConfig
    from ldmkit.configs import (
        EMAConfig,
        EvalAEConfig,
        InspectConfig,
        PresetsConfig,
        TrainAEConfig,
        TrainDiffusionConfig,
    )
    from ldmkit.data_configs import CheckConfig, EncodeConfig, SplitConfig
    from ldmkit.decode_configs import DecodeConfig
    from ldmkit.evaluation_configs import EvaluateConfig
    from ldmkit.generation_configs import SampleConfig
    from ldmkit.interchange_configs import ExportConfig, ImportConfig
    from ldmkit.inversion_configs import InvertConfig
    from ldmkit.measures_configs import (
        AnomalyConfig,
        LikelihoodConfig,
        RateDistortionConfig,
        SpreadConfig,
    )
    from ldmkit.recipes.anomaly import anomaly
    from ldmkit.recipes.check import check
    from ldmkit.recipes.decode import decode
    from ldmkit.recipes.doctor import doctor
    from ldmkit.recipes.ema import ema
    from ldmkit.recipes.encode import encode
    from ldmkit.recipes.eval_ae import eval_ae
    from ldmkit.recipes.evaluate import evaluate
    from ldmkit.recipes.export import export
    from ldmkit.recipes.import_ import import_
    from ldmkit.recipes.inspect import inspect
    from ldmkit.recipes.invert import invert
    from ldmkit.recipes.likelihood import likelihood
    from ldmkit.recipes.presets import presets
    from ldmkit.recipes.rate_distortion import rate_distortion
    from ldmkit.recipes.report import report
    from ldmkit.recipes.sample import sample
    from ldmkit.recipes.split import split
    from ldmkit.recipes.spread import spread
    from ldmkit.recipes.train_ae import train_ae
    from ldmkit.recipes.train_diffusion import train_diffusion
    from ldmkit.recipes.tune_steps import tune_steps
    from ldmkit.recipes.verify import verify
    from ldmkit.report_configs import ReportConfig
    from ldmkit.tuning_configs import TuneStepsConfig

__all__ = [
    "AnomalyConfig",
    "CheckConfig",
    "DecodeConfig",
    "DoctorConfig",
    "EMAConfig",
    "EncodeConfig",
    "EvalAEConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ImportConfig",
    "InspectConfig",
    "InvertConfig",
    "LikelihoodConfig",
    "PresetsConfig",
    "RateDistortionConfig",
    "ReportConfig",
    "SampleConfig",
    "SplitConfig",
    "SpreadConfig",
    "TrainAEConfig",
    "TrainDiffusionConfig",
    "TuneStepsConfig",
    "VerifyConfig",
    "__version__",
    "anomaly",
    "check",
    "decode",
    "doctor",
    "ema",
    "encode",
    "eval_ae",
    "evaluate",
    "export",
    "import_",
    "inspect",
    "invert",
    "likelihood",
    "load_autoencoder",
    "load_diffusion",
    "presets",
    "rate_distortion",
    "report",
    "sample",
    "split",
    "spread",
    "train_ae",
    "train_diffusion",
    "tune_steps",
    "verify",
]


CONFIG_HOMES = {
    "ReportConfig": "ldmkit.report_configs",
    "DecodeConfig": "ldmkit.decode_configs",
    "EvaluateConfig": "ldmkit.evaluation_configs",
    "InvertConfig": "ldmkit.inversion_configs",
    "SampleConfig": "ldmkit.generation_configs",
    **dict.fromkeys(("DoctorConfig", "VerifyConfig"), "ldmkit.care_configs"),
    "TuneStepsConfig": "ldmkit.tuning_configs",
    **dict.fromkeys(("CheckConfig", "EncodeConfig", "SplitConfig"), "ldmkit.data_configs"),
    **dict.fromkeys(("ExportConfig", "ImportConfig"), "ldmkit.interchange_configs"),
    **dict.fromkeys(
        ("AnomalyConfig", "LikelihoodConfig", "RateDistortionConfig", "SpreadConfig"),
        "ldmkit.measures_configs",
    ),
}


def _home(name: str) -> str:
    """The module that defines a public name."""
    if name.endswith("Config"):
        return CONFIG_HOMES.get(name, "ldmkit.configs")
    return "ldmkit.assembly" if name.startswith("load_") else f"ldmkit.recipes.{name}"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562: modules and functions alike
    if name in __all__:
        return getattr(import_module(_home(name)), name)
    raise AttributeError(f"module 'ldmkit' has no attribute {name!r}")
