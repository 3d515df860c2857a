"""Everything that ldmkit writes, made for a moment, with what reads it again."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import ldmkit
from ldmkit.assembly import diffusion_facts, load_autoencoder, load_diffusion
from ldmkit.configfile import read_run_config
from ldmkit.container import read_header
from ldmkit.data.latent_set import LatentSet
from ldmkit.data.latent_stream import receive_latents
from ldmkit.data.survey import SURVEY
from ldmkit.data_configs import EncodeConfig
from ldmkit.decode_configs import DecodeConfig
from ldmkit.diffusion_configs import AverageConfig, DiffusionConfig
from ldmkit.durable import write_text
from ldmkit.errors import DataError
from ldmkit.facts import validated
from ldmkit.generation_configs import SampleConfig
from ldmkit.manifest import read_manifest
from ldmkit.metrics.feature_networks import Side
from ldmkit.metrics.reference import Protocol, load_reference, reference_of, save_reference
from ldmkit.modelfile import load
from ldmkit.output.listing import Listing
from ldmkit.pages.reading import read_log
from ldmkit.report_configs import ReportConfig
from ldmkit.sample_blocks import read_sample_stream, read_samples
from ldmkit.seals import read_page, sealed_page
from ldmkit.training.checkpoint import TrainingState
from ldmkit.training.setback import Setback, read_setback, write_setback
from ldmkit.training.snapshots import save_snapshot, tracked_averages

PROTOCOL = Protocol(
    network="x",
    weights="w",
    network_input="n",
    size=8,
    resize="r",
    crop="c",
    channels=3,
    background="b",
    range=None,
    holdout=0.0,
    count=9,
)


class Artefact(NamedTuple):
    """A file, and what uses it: raises DataError if it is damaged."""

    path: Path
    use: Callable[[], object] | None
    """None for what ldmkit itself never reads again."""


def make_artefacts(pipeline, root: Path) -> dict[str, Artefact]:
    """One of each kind, in a directory of its own."""
    return {
        **_of_runs(pipeline, root),
        **_of_latents(pipeline, root / "latents"),
        **_of_samples(pipeline, root / "samples"),
    }


def _of_runs(pipeline, root: Path) -> dict[str, Artefact]:
    ae, ldm = root / "ae", root / "ldm"
    shutil.copytree(pipeline.ae.parent, ae)
    shutil.copytree(pipeline.ldm.parent, ldm)
    model = load_diffusion(ldm / "diffusion.safetensors")
    tracked = tracked_averages(model, AverageConfig(kind="power", snapshots=5))
    facts = diffusion_facts(ldm / "diffusion.safetensors")
    config = validated(DiffusionConfig, read_header(ldm / "diffusion.safetensors").config, "")
    average = AverageConfig(kind="power", snapshots=5)
    snapshot = save_snapshot(ldm, 5, tracked, config, facts, average)
    write_setback(ae, Setback(step=1, failed=2, reason="too strong"))
    text = json.dumps({"schema_version": 1, "kind": "eval-ae", "psnr_db": {"mean": 20.5}}, indent=1)
    write_text(root / "report/report.json", sealed_page(text + "\n"))
    reference = root / "reference.safetensors"
    side = Side(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    save_reference(reference, {"x": reference_of(side, PROTOCOL)})
    page = ldmkit.report(ReportConfig(run=(ae,), out=root / "page/report.html"))
    checkpoint = root / "one"
    network = nn.Linear(3, 3)
    network(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.step()
    state = TrainingState(checkpoint, {"network": network}, {"all": optimizer})
    state.save(7)
    preview = next((ae / "samples").glob("*.png"))
    return {
        "autoencoder": _loaded(ae / "autoencoder.safetensors", load_autoencoder),
        "diffusion model": _loaded(ldm / "diffusion.safetensors", load_diffusion),
        "snapshot": _loaded(snapshot, lambda path: load(path, kind="averages")),
        "checkpoint": Artefact(
            checkpoint / "checkpoints/step-000000007/state.safetensors",
            lambda: state.load_latest(torch.device("cpu")),
        ),
        "reference": _loaded(reference, lambda path: load_reference(path, PROTOCOL)),
        "config": _loaded(ae / "config.toml", read_run_config),
        "metrics": _loaded(ae / "metrics.jsonl", _require_whole_log),
        "survey": _loaded(ae / SURVEY, read_page),
        "setback": Artefact(ae / "setback.json", lambda: read_setback(ae)),
        "evaluation": _loaded(root / "report/report.json", read_page),
        "report": Artefact(page, None),
        "preview": Artefact(preview, None),
    }


def _of_latents(pipeline, root: Path) -> dict[str, Artefact]:
    shutil.copytree(pipeline.latents, root)
    stream = io.BytesIO()
    config = EncodeConfig(data=str(pipeline.data), ae=pipeline.ae, out=Path("-"), shard_size=6)
    ldmkit.encode(config, stream)
    kept = root.with_name("latents.stream")
    kept.write_bytes(stream.getvalue())
    return {
        "manifest": Artefact(root / "manifest.json", lambda: read_manifest(root)),
        "shard": Artefact(
            root / "00001.safetensors", lambda: LatentSet(root).wait_until_verified()
        ),
        "stream of latents": _loaded(
            kept,
            lambda path: receive_latents(io.BytesIO(path.read_bytes()), root.with_name("received")),
        ),
    }


def _of_samples(pipeline, root: Path) -> dict[str, Artefact]:
    root.mkdir()
    stream = io.BytesIO()
    settings = {"model": pipeline.ldm, "num": 3, "steps": 2, "batch_size": 2}
    ldmkit.sample(SampleConfig.model_validate(settings | {"out": "-"}), stream)
    kept = root / "samples.stream"
    kept.write_bytes(stream.getvalue())
    samples = root / "samples.safetensors"
    ldmkit.sample(SampleConfig.model_validate(settings | {"out": samples}))
    made = {
        "sample file": _loaded(samples, lambda path: [*read_samples(path)]),
        "stream of samples": _loaded(
            kept, lambda path: [*read_sample_stream(io.BytesIO(path.read_bytes()), "it")]
        ),
    }
    for kind in ("png", "jpg", "npy"):
        out = root / kind
        decoding = {"samples": samples, "ae": pipeline.ae, "out": out, "format": kind}
        ldmkit.decode(DecodeConfig.model_validate(decoding))
        made[f"picture ({kind})"] = _loaded(sorted(out.glob(f"0*.{kind}"))[1], _listed)
    made["list"] = _loaded(root / "png/samples.jsonl", lambda path: Listing(path.parent))
    made["sheet"] = Artefact(root / "png/grid.png", None)
    decoding = {"samples": samples, "ae": pipeline.ae, "tar": root / "all.tar", "format": "jpg"}
    ldmkit.decode(DecodeConfig.model_validate(decoding))
    made["tar"] = Artefact(root / "all.tar", None)
    return made


def _loaded(path: Path, use: Callable[[Path], object]) -> Artefact:
    return Artefact(path, lambda: use(path))


def _require_whole_log(path: Path) -> None:
    """What a page about the run reads: damaged lines are left out, and it says so."""
    problems: list[str] = []
    read_log(path, problems)
    if problems:
        raise DataError(problems[0])


def _listed(path: Path) -> None:
    """What a decoding that goes on does: a picture with other bytes than listed is made anew."""
    if Listing(path.parent).is_damaged(path.name):
        raise DataError(f"{path} is damaged")
