"""Pictures of any number of channels, depth, range and size through both stages."""

import numpy as np
import pytest
import torch
from PIL import Image

import ldmkit
from conftest import ae_config, diffusion_config
from ldmkit.assembly import autoencoder_facts, save_autoencoder
from ldmkit.autoencoder_configs import AutoencoderConfig, PreprocessingConfig
from ldmkit.data.pictures import decode_picture
from ldmkit.data_configs import EncodeConfig
from ldmkit.decode_configs import DecodeConfig
from ldmkit.errors import UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.manifest import read_manifest
from ldmkit.output.formats import Note, choose_format, encode_picture
from ldmkit.pixels import grid, to_pixels

SIZE = 40  # not a power of two, and halved three times it is odd


def journey(data, root, preprocessing):
    """Train, encode, train, sample; returns the autoencoder and the samples."""
    autoencoder = {"channels": 8, "multipliers": (1, 1, 1, 2), "residual_blocks": 1}
    changes = {"preprocessing": preprocessing, "autoencoder": autoencoder | {"norm_groups": 2}}
    ae = ldmkit.train_ae(ae_config(data, root / "ae", steps=3, holdout=0.2, **changes))
    latents = ldmkit.encode(EncodeConfig(data=data, ae=ae, out=root / "latents"))
    assert latents is not None
    assert read_manifest(latents).latent_shape == (4, SIZE // 8, SIZE // 8)
    unet = {"channels": 16, "multipliers": (1,), "residual_blocks": 1, "norm_groups": 4}
    unet |= {"attention_factors": ()}
    ldm = ldmkit.train_diffusion(diffusion_config(latents, root / "ldm", steps=2, ae=ae, unet=unet))
    samples = ldmkit.sample(SampleConfig(model=ldm, num=3, steps=2, out=root / "s.safetensors"))
    assert samples is not None
    return ae, samples


def arrays(root, *shape, count=6):
    root.mkdir()
    values = np.random.default_rng(0).normal(500.0, 200.0, (count, *shape)).astype(np.float32)
    for number, array in enumerate(values):
        np.save(root / f"{number}.npy", array)
    return root


@pytest.mark.parametrize("channels", [2, 4])
def test_arrays_of_n_channels_come_back_in_their_units(tmp_path, channels):
    data = arrays(tmp_path / "data", channels, SIZE, SIZE + 3)
    preprocessing = {"size": SIZE, "channels": channels, "range": (0.0, 1000.0), "flip": True}
    ae, samples = journey(data, tmp_path, preprocessing)
    out = ldmkit.decode(DecodeConfig(samples=samples, ae=ae, out=tmp_path / "out"))
    assert out is not None
    assert sorted(file.name for file in out.iterdir()) == [
        *(f"00000{seed}.npy" for seed in range(3)),
        "grid.png",
        "samples.jsonl",
    ]
    array = np.load(out / "000001.npy", allow_pickle=False)
    assert (array.shape, array.dtype) == ((SIZE, SIZE, channels), np.float32)
    assert 0 < array.mean() < 1000
    decode_picture(
        (out / "000001.npy").read_bytes(),
        "x",
        PreprocessingConfig(channels=channels, range=(0.0, 1000.0)),
    )
    preview = next((tmp_path / "ae/samples").glob("*.png"))
    for file in (out / "grid.png", preview):
        with Image.open(file) as image:
            assert image.mode == ("RGB" if channels == 4 else "L")
    with pytest.raises(UsageError, match=f"--format png cannot hold {channels} channels"):
        ldmkit.decode(DecodeConfig(samples=samples, ae=ae, out=out, format="png"))


def test_one_channel_goes_through_and_every_format_holds_it(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number}.png")
    ae, samples = journey(data, tmp_path, {"size": SIZE, "channels": 1})

    def decoded(kind):
        config = DecodeConfig(samples=samples, ae=ae, out=tmp_path / kind, format=kind)
        out = ldmkit.decode(config)
        assert out is not None
        return out

    for kind, mode in (("auto", "L"), ("png", "L"), ("png16", "I;16")):
        with Image.open(decoded(kind) / "000002.png") as image:
            assert (image.mode, image.size) == (mode, (SIZE, SIZE))
    numbers = np.load(decoded("npy") / "000002.npy", allow_pickle=False)
    with Image.open(tmp_path / "png/000002.png") as image:
        assert np.array_equal(np.asarray(image), numbers.clip(0, 255).round())
    with Image.open(tmp_path / "png16/000002.png") as image:
        deep = np.asarray(image).astype(np.float64) / 257
    assert np.allclose(deep, numbers.clip(0, 255), atol=0.003)


def test_the_declared_range_is_typed_and_errors_are_sentences(tmp_path, run):
    data = arrays(tmp_path / "data", SIZE, SIZE)
    common = ("train-ae", data, "--preset", "tiny", "--preprocessing.size", SIZE)
    common += ("--preprocessing.channels", 1, "--dry-run")
    done = run(*common, "--preprocessing.range", "-1000,600.5")
    assert done.returncode == 0
    assert b"range = [\n    -1000.0,\n    600.5,\n]" in done.stdout
    assert b"100.0% of the pixels of a batch count" in done.stderr
    done = run(*common)
    assert done.returncode == 3
    assert b"0.npy has float32 values" in done.stderr
    assert b"--preprocessing.range LO,HI" in done.stderr
    assert b"Traceback" not in done.stderr
    for typed, words in (
        ("1000,0", b"--preprocessing.range: LO must lie below HI"),
        ("0,nan", b"--preprocessing.range: "),
        ("0", b"--preprocessing.range: "),
    ):
        done = run(*common, "--preprocessing.range", typed)
        assert done.returncode == 2
        assert words in done.stderr


@pytest.mark.parametrize(
    ("channels", "depth", "value_range", "format_"),
    [
        (1, "uint8", None, "png"),
        (3, "uint8", None, "png"),
        (4, "uint8", None, "npy"),
        (1, "uint16", None, "png16"),
        (3, "uint16", None, "png16"),
        (4, "uint16", None, "npy"),
        (1, "float32", (0.0, 1.0), "npy"),
        (1, "uint8", (0.0, 100.0), "npy"),
    ],
)
def test_the_automatic_format_loses_nothing(tmp_path, channels, depth, value_range, format_):
    path = tmp_path / "ae.safetensors"
    config = AutoencoderConfig(channels=8, multipliers=(1,), norm_groups=2, middle_attention=False)
    preprocessing = PreprocessingConfig(channels=channels, range=value_range)
    model = ldmkit.assembly.build_autoencoder(config, preprocessing)
    save_autoencoder(path, model, preprocessing, {"steps": 0}, depth=depth)
    facts = autoencoder_facts(path)
    assert facts.depth == depth
    assert choose_format(DecodeConfig(ae=path).format, facts) == format_


def test_written_numbers_are_read_back_exactly(tmp_path):
    values = torch.arange(65536).view(1, 256, 256)
    image = decode_picture_of(values.numpy()[0].astype(np.uint16))
    note = Note("", 95, "x")
    (tmp_path / "x.png").write_bytes(encode_picture(image, "png16", (0.0, 1.0), note))
    with Image.open(tmp_path / "x.png") as stored:
        assert np.array_equal(np.asarray(stored), values[0].numpy())
    (tmp_path / "x.npy").write_bytes(encode_picture(image, "npy", (0.0, 65535.0), note))
    assert np.abs(np.load(tmp_path / "x.npy") - values[0].numpy()).max() < 0.01
    wide = torch.tensor([[[-1.5, 1.5]]])
    (tmp_path / "y.npy").write_bytes(encode_picture(wide, "npy", (-1.0, 1.0), note))
    assert np.array_equal(np.load(tmp_path / "y.npy"), wide[0].numpy())  # not clipped


def decode_picture_of(array):
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return decode_picture(buffer.getvalue(), "x", PreprocessingConfig(channels=1))


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (5, 3)])
def test_a_sheet_shows_the_first_channels(channels, shown):
    pixels = torch.arange(channels, dtype=torch.uint8).view(1, channels, 1, 1).expand(2, -1, 2, 2)
    sheet = grid(pixels, 2)
    assert len(sheet) == shown
    assert sheet[:, 2, 2].tolist() == list(range(shown))


def test_pixels_that_do_not_count_are_shown_mid_grey():
    assert to_pixels(torch.full((1, 1, 1, 1), torch.nan)).item() == 128
