"""Statistics of real pictures in a file, with the protocol they were measured by."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ldmkit.container import read_header
from ldmkit.errors import DataError
from ldmkit.facts import validated
from ldmkit.fields import Config
from ldmkit.metrics.feature_networks import Side
from ldmkit.metrics.frechet import FeatureStatistics
from ldmkit.modelfile import load, save, versions


class Protocol(Config):
    """How pictures became features; numbers of two protocols cannot be compared."""

    network: str
    weights: str
    """Fingerprint of the network's tensors."""
    network_input: str
    """How it brings pictures to its own size."""
    size: int
    """Side of the pictures before that, pixels."""
    resize: str
    """Filter that brought them to it."""
    crop: str
    channels: int
    background: str
    """What transparency is laid over."""
    range: tuple[float, float] | None
    holdout: float
    """The share of a set that was looked at because training keeps it out; 0 = all of it."""
    count: int
    """Pictures."""

    @property
    def digest(self) -> str:
        """sha256 over all of it (hex)."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class ReferenceFacts(Config):
    """Facts of a file of statistics."""

    fingerprint: str
    protocols: dict[str, Protocol]
    """By network."""
    protocol_digests: dict[str, str]
    versions: dict[str, str]


class Reference(NamedTuple):
    """Real pictures in the features of one network."""

    side: Side
    mean: Tensor
    """`[f]`, float64."""
    covariance: Tensor
    """`[f, f]`, float64, unbiased."""
    protocol: Protocol


def reference_of(side: Side, protocol: Protocol) -> Reference:
    """Statistics of features."""
    statistics = FeatureStatistics()
    statistics.add(side.features)
    return Reference(side, *statistics.moments(), protocol)


def save_reference(path: Path, references: Mapping[str, Reference]) -> None:
    """Write the statistics of each network into one file."""
    tensors: dict[str, Tensor] = {}
    for name, reference in references.items():
        tensors[f"{name}.features"] = reference.side.features
        tensors[f"{name}.mean"] = reference.mean
        tensors[f"{name}.covariance"] = reference.covariance
        if reference.side.logits is not None:
            tensors[f"{name}.logits"] = reference.side.logits
    facts = ReferenceFacts(
        fingerprint="",
        protocols={name: one.protocol for name, one in references.items()},
        protocol_digests={name: one.protocol.digest for name, one in references.items()},
        versions=versions(),
    )
    save(path, tensors, kind="reference", config={}, facts=facts.model_dump(mode="json"))


def stored_protocol(path: Path, network: str) -> Protocol:
    """How the pictures behind a file of statistics became features.

    Raises:
        DataError: the file is damaged, or holds no features of this network.
    """
    facts = validated(ReferenceFacts, read_header(path).facts, str(path))
    if network not in facts.protocols:
        raise DataError(
            f"{path} holds features of {', '.join(facts.protocols)}, not of {network}: make it again"
        )
    return facts.protocols[network]


def load_reference(path: Path, wanted: Protocol) -> Reference:
    """The statistics that a file holds of one network.

    Args:
        path: of the file.
        wanted: the protocol of the pictures they are to be compared with, but for `count`.

    Raises:
        DataError: the file is damaged, or measured otherwise; the message names the first difference.
    """
    header, tensors = load(path, kind="reference")
    facts = validated(ReferenceFacts, header.facts, str(path))
    name = wanted.network
    protocol = stored_protocol(path, name)
    if protocol.digest != facts.protocol_digests.get(name):
        raise DataError(f"{path} is damaged: its protocol does not match its hash; make it again")
    _require_same(protocol, wanted, path)
    for part in ("features", "mean", "covariance"):
        if f"{name}.{part}" not in tensors:
            raise DataError(f"{path} lacks the tensor {name}.{part}; make it again")
    side = Side(tensors[f"{name}.features"], tensors.get(f"{name}.logits"))
    return Reference(side, tensors[f"{name}.mean"], tensors[f"{name}.covariance"], protocol)


def _require_same(found: Protocol, wanted: Protocol, path: Path) -> None:
    theirs, ours = found.model_dump(), wanted.model_dump()
    for field in theirs:
        if field != "count" and theirs[field] != ours[field]:
            raise DataError(
                f"{path} was measured by another protocol: {field} {theirs[field]} there, "
                f"{ours[field]} here; take the same, or make it again with --save-reference"
            )
