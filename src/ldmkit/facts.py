"""What files say of themselves beside their config: typed, and strict about unknown keys."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_serializer

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.diffusion_configs import SnapshotFormat
from ldmkit.errors import DataError
from ldmkit.fields import Config
from ldmkit.label_names import ClassColour, LabelSet

AnyConfig = TypeVar("AnyConfig", bound=Config)
Facts = dict[str, Any]
Depth = Literal["uint8", "uint16", "float32"]
"""Number format of pictures; float32 stands for every other than the first two."""
Statistics = tuple[Annotated[float, Field(allow_inf_nan=False)], ...]


class AutoencoderFacts(Config):
    """Facts of an autoencoder file."""

    fingerprint: str
    value_range: tuple[float, float] = (-1.0, 1.0)
    image_channels: int
    factor: int
    latent_channels: int
    preprocessing: PreprocessingConfig
    decodes: tuple[str, ...] = ()
    """Fingerprints of autoencoders whose latents it decodes too: its decoder alone was trained on."""
    depth: Depth = "uint8"
    """Of the pictures it was trained on; decides what `decode` writes."""
    trained: Facts
    """Data, pictures, steps, and the quality on held-back pictures where there were any."""
    versions: dict[str, str]


class Whitening(Config):
    """Per-channel statistics of raw latents over a whole set; diffusion works on (z - mean) / std."""

    mean: Statistics
    std: Statistics


class DiffusionFacts(Config):
    """Facts of a diffusion model file."""

    fingerprint: str
    autoencoder: str
    """Fingerprint of the autoencoder whose latents it makes."""
    latent_shape: tuple[int, int, int]
    """z, height, width of the latents it was trained on."""
    factor: int | None = None
    """Pixels that a latent stands for along each side; None in files that do not say."""
    whitening: Whitening
    trained: Facts
    versions: dict[str, str]


class SnapshotFacts(Config):
    """Facts of a snapshot of averages during training."""

    fingerprint: str
    step: int
    """How many updates the averages have seen."""
    every: int
    """Steps between snapshots."""
    widths: tuple[float, ...]
    """Relative widths of its averages, in the order of their tensors."""
    stored: SnapshotFormat
    """Number format of the averages."""
    model: DiffusionFacts
    """What a model file of this step would say of itself."""


class SampleFacts(Config):
    """Facts of one block of samples."""

    fingerprint: str
    autoencoder: str
    """Fingerprint of the autoencoder that decodes them."""
    diffusion: str
    """Fingerprint of the model they were drawn from."""
    total: int
    """How many samples the whole stream has."""
    first: int
    """Number of this block's first sample in the stream."""
    manner: Facts = Field(default_factory=dict)
    """How they were drawn: sampler, steps, guidance ..."""
    asked: str | None = None
    """sha256 of everything that decides their bytes; of samples in files, to know them again."""
    versions: dict[str, str]


class NoiseFacts(Config):
    """Facts of a noise file."""

    fingerprint: str
    autoencoder: str
    """Fingerprint of the autoencoder whose latents the noise leads to."""
    diffusion: str
    """Fingerprint of the model that it was found with."""
    level: float
    """Noise level that it stands for, standard deviations of whitened latents."""
    manner: Facts
    """How it was found: steps, guidance ..."""
    versions: dict[str, str]


class ShardFacts(Config):
    """Facts of one shard of a latent set."""

    fingerprint: str
    recipe: Facts
    """What decides the bytes beside the items: autoencoder, preprocessing, dtype ..."""
    items: str
    """sha256 over what is known of the source items; see `latents.items_digest`."""
    start: int
    stop: int
    """Range of source items it covers."""
    skipped: tuple[tuple[str, str], ...]
    """Key and reason of each item in the range that is left out."""
    converted: dict[str, tuple[int, tuple[str, ...]]]
    """What decoding changed beyond scaling: in how many pictures, and the keys of the first."""
    moments: tuple[float, Statistics, Statistics]
    """Values per channel, and their sum and sum of squares (of means, plus posterior variance)."""


class ShardEntry(Config):
    """One shard as the manifest knows it."""

    name: Annotated[str, Field(pattern=r"^[0-9]{5,}\.safetensors$")]
    """A plain file name: nothing a manifest says leads out of its directory."""
    start: int
    stop: int
    count: int
    bytes: int
    sha256: str
    shape: tuple[int, int, int] | None = None
    """z, height, width of its latents, where they are not the set's `latent_shape`."""


class Manifest(Config):
    """The page that commits a latent set; written last."""

    format: str
    recipe: Facts
    items: str
    """sha256 over the `items` of the shards."""
    count: int
    latent_shape: tuple[int, int, int]
    columns: tuple[str, ...]
    class_names: tuple[str, ...]
    box_names: tuple[str, ...] = ()
    scalar_names: tuple[str, ...] = ()
    label_sets: tuple[LabelSet, ...] = ()
    """All of them, where there are several; `class_names` are those of the first."""
    labelmap_colours: tuple[ClassColour, ...] = ()
    """What the colours of the label maps meant, where they were RGB pictures."""
    whitening: Whitening
    shards: tuple[ShardEntry, ...]
    skipped: tuple[tuple[str, str], ...]
    converted: dict[str, tuple[int, tuple[str, ...]]]
    """What decoding changed beyond scaling: in how many pictures, and the keys of the first."""
    versions: dict[str, str]

    @model_serializer(mode="wrap")
    def _without_what_only_some_sets_have(self, dumped: Callable[[Any], Facts]) -> Facts:
        dump = dumped(self)
        for name in ("scalar_names", "label_sets", "labelmap_colours"):
            if not getattr(
                self, name
            ):  # the page of such a set is what it was before there were any
                dump.pop(name, None)
        return dump


class SamplesSeen:
    """Follows the messages of samples: one stream, or several one after the other.

    A stream says in each message how many samples it has and where the message stands, so that one that
    was cut is noticed, also between two messages, or where `cat` joined several.

    Args:
        source: how to call it in errors.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._seen = self._total = 0

    def add(self, facts: SampleFacts, count: int) -> None:
        """Note a message of `count` samples.

        Raises:
            DataError: samples before it are missing.
        """
        if facts.first == 0:
            self.close()
            self._seen, self._total = 0, facts.total
        elif (facts.first, facts.total) != (self._seen, self._total):
            raise DataError(
                f"{self._source} lacks samples: after {self._seen} of {self._total} come those from "
                f"{facts.first} of {facts.total}"
            )
        self._seen += count

    def close(self) -> None:
        """Note the end of a stream.

        Raises:
            DataError: it came too early.
        """
        if self._seen != self._total:
            raise DataError(f"{self._source} ended after {self._seen} of {self._total} samples")


def validated(model: type[AnyConfig], value: Any, source: str) -> AnyConfig:  # noqa: ANN401
    """Validate a config or facts read from a file.

    Raises:
        DataError: a fact is missing, unknown or of the wrong type; the message names it.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{source}: {where}: {first['msg']}") from error
