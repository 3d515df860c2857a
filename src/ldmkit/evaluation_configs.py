"""Config of `evaluate`: generated pictures, what they are compared with, and by what. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldmkit.data_configs import Job, Location, SourceConfig
from ldmkit.fields import Count, Fraction, Positive, Weight, field
from ldmkit.generation_configs import SamplerName

SAMPLE_FILE = ".safetensors"


class EvaluateConfig(SourceConfig):
    """Measure generated pictures, with intervals, and look for copies; writes OUT/report.json, pictures."""

    data: Location = field("", "Real pictures: anything that train-ae reads")
    samples: Location | None = field(
        None, "Generated pictures: anything that train-ae reads, or a sample file (needs --ae)"
    )
    model: Path | None = field(
        None, "Diffusion model file to draw the samples from instead (needs --ae)"
    )
    ae: Path | None = field(
        None, "Autoencoder file: decodes samples; says how real pictures are preprocessed"
    )
    reference: Path | None = field(
        None, "Statistics that --save-reference wrote, in the place of --data"
    )
    save_reference: Path | None = field(
        None, "File for the statistics of the real pictures, with their protocol (*.safetensors)"
    )
    out: Path = field(Path("runs/evaluate"), "Directory of the report", short="-o")
    effnet: Path | None = field(
        None,
        "Measure in EfficientNet-Lite0 features: its weights (*.safetensors or *.pth); FD-effnet, never"
        " called FID",
    )
    fid: bool = field(
        False, "FID, KID and IS with Inception's weights from torch's cache (extra: eval)"
    )
    inception: Path | None = field(
        None, "FID, KID and IS with these Inception weights of torch-fidelity (extra: eval)"
    )
    size: Positive | None = field(
        None, "Side that all pictures are brought to, pixels (default: what the autoencoder saw)"
    )
    holdout: Fraction = field(
        0.0,
        "Compare with the share of DATA that training with this --holdout kept out, and look for copies of"
        " the rest; 0 = compare with all, and do not look",
    )
    num: Positive | None = field(
        None, "Samples to draw (default: 1000), or to take from --samples by --seed (default: all)"
    )
    num_data: Positive | None = field(
        None, "Real pictures to compare with, drawn by --seed (default: all)"
    )
    like: Path | None = field(
        None,
        "With --model: latent set whose conditions the samples are told (with --holdout: of its held-back"
        " share; default: all classes take turns)",
    )
    steps: Positive = field(30, "With --model: model calls for each sample (1 to T)")
    sampler: SamplerName = field("heun", "With --model: sampler (docs/samplers.md)")
    guidance: Weight | None = field(
        None, "With --model: classifier-free guidance weight; 1 = off (default: as in sample)"
    )
    eta: Annotated[float, Field(ge=0, le=1)] | None = field(
        None, "With --model: noise put back by DDIM; 1 = DDPM (default: as in sample)"
    )
    seed: Count = field(0, "Of the first sample that is drawn, and of all that is random otherwise")
    bootstrap: Count = field(200, "Draws for the 95 % intervals; 0 = no intervals")
    copy_quantile: Fraction = field(
        0.0,
        "A sample is a copy if it is nearer to a training picture than this share of the held-back"
        " pictures; 0 = nearer than any",
    )
    batch_size: Positive = field(32, "Pictures at once; results agree up to rounding")
    jobs: Job | None = field(
        None,
        "I/N: draw and look at the I-th of N fixed ranges of all pictures (I from 1), for array jobs; the one"
        " that comes last writes the report (default: 1/1, or as torchrun says)",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "Where to compute")
    max_fd: Weight | None = field(None, "Fail (exit code 3) above this FD-effnet")
    max_fid: Weight | None = field(None, "Fail above this FID")
    max_kid: float | None = field(None, "Fail above this KID")
    max_copies: Count | None = field(None, "Fail with more copies of training pictures than this")

    @property
    def uses_inception(self) -> bool:
        """Whether Inception's features are asked for."""
        return self.fid or self.inception is not None

    @model_validator(mode="after")
    def _sources_fit(self) -> "EvaluateConfig":
        if (self.samples is None) == (self.model is None):
            raise ValueError("give --samples or --model: one of them, to say what is measured")
        if bool(self.data) == (self.reference is not None):
            raise ValueError("give --data or --reference: one of them, to compare with")
        if self.effnet is None and not self.uses_inception:
            raise ValueError(
                "give --effnet FILE, --inception FILE or --fid: features to compare in"
            )
        if self.ae is None and self.size is None:
            raise ValueError("give --ae or --size: the side of the pictures has to be known")
        needs_ae = self.model is not None or str(self.samples).endswith(SAMPLE_FILE)
        if needs_ae and self.ae is None:
            raise ValueError("samples are decoded by their autoencoder: give --ae")
        return self

    @model_validator(mode="after")
    def _options_have_a_use(self) -> "EvaluateConfig":
        needs = (
            ("--max-fd", self.max_fd, "--effnet FILE", self.effnet),
            ("--max-fid", self.max_fid, "--inception FILE or --fid", self.uses_inception),
            ("--max-kid", self.max_kid, "--inception FILE or --fid", self.uses_inception),
            ("--max-copies", self.max_copies, "--data and --holdout", self.data and self.holdout),
            ("--save-reference", self.save_reference, "--data", self.data),
            ("--like", self.like, "--model", self.model),
        )
        for option, value, other, given in needs:
            if value is not None and not given:
                raise ValueError(f"{option} needs {other}")
        return self
