"""Pictures of other sizes than the training's: plain, in windows, and with borders that meet."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ldmkit
from conftest import SIZE
from ldmkit.assembly import diffusion_facts, load_autoencoder, load_diffusion, save_diffusion
from ldmkit.autoencoder.networks import Decoder, Encoder
from ldmkit.autoencoder_configs import AutoencoderConfig
from ldmkit.canvas import Canvas, canvas_of, make_seamless, pixels_of_a_latent
from ldmkit.canvas_configs import CanvasConfig
from ldmkit.condition_configs import ClassCondition, LayoutCondition, LowResCondition
from ldmkit.decode_configs import DecodeConfig
from ldmkit.diffusion import tiles
from ldmkit.diffusion.guidance import Guidance
from ldmkit.diffusion.tiles import Tiling, tiled, windows_of
from ldmkit.diffusion_configs import DiffusionConfig, ScheduleConfig, UNetConfig
from ldmkit.drawing import Guide, Manner, denoise_at, draw_latents, seeded_noise
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts, Manifest, Whitening
from ldmkit.generation_configs import SampleConfig
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import load, read_header, save
from ldmkit.networks.seamless import AXES, wrap_convolutions
from ldmkit.networks.unet import UNet

UNET = UNetConfig(
    channels=8,
    multipliers=(1, 2),
    residual_blocks=1,
    attention_factors=(2,),
    head_channels=8,
    norm_groups=4,
    context_channels=8,
)
CLASS = ClassCondition(names=("cat", "dog"))
LOWRES = LowResCondition(image_channels=3, ratio=4, factor=4)
FACTOR = 4
SHAPE = (2, 8, 8)


def randomised(network, scale=0.2):
    """The same network, every weight of which matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in network.parameters():
            weights.copy_(scale * torch.randn(weights.shape, generator=generator))
    return network.eval()


def model_told(*conditions, **network) -> LatentDiffusion:
    unet = UNET.model_copy(update=network)
    config = DiffusionConfig(
        unet=unet,
        latent_channels=SHAPE[0],
        conditions=conditions,
        parameterization="v",
        schedule=ScheduleConfig(),
    )
    return randomised(LatentDiffusion(config)).requires_grad_(False)


def facts_of(factor: int | None = FACTOR) -> DiffusionFacts:
    return DiffusionFacts(
        fingerprint="",
        autoencoder="a" * 64,
        latent_shape=SHAPE,
        factor=factor,
        whitening=Whitening(mean=(0.0, 0.0), std=(1.0, 1.0)),
        trained={},
        versions={},
    )


def whole(condition, window):
    del window
    return condition


@settings(max_examples=40)
@given(
    length=st.integers(1, 70), side=st.integers(2, 24), share=st.floats(0, 1), wraps=st.booleans()
)
def test_weights_sum_to_one_everywhere_and_neighbours_share_enough(length, side, share, wraps):
    overlap = 1 + round(share * (side - 2))
    tiling = Tiling((side, side), overlap, (wraps, False))
    windows = windows_of(length, 3 * side, tiling)
    total = torch.zeros(length, 3 * side, dtype=torch.float64)
    for rows, columns in windows:
        assert (len(rows.cells), len(columns.cells)) == (min(side, length), side)
        total[rows.cells[:, None], columns.cells] += rows.weights[:, None] * columns.weights
    assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12)
    starts = sorted({int(window.rows.cells[0]) for window in windows})
    if length > side:
        ends = [*starts[1:], starts[0] + length] if wraps else starts[1:]
        assert all(end - start <= side - overlap for start, end in zip(starts, ends, strict=wraps))
    else:
        assert starts == [0]


def test_as_few_windows_as_the_overlap_allows():
    assert len(windows_of(32, 16, Tiling((16, 16), 8))) == 3
    assert len(windows_of(32, 32, Tiling((16, 16), 1))) == 9
    assert len(windows_of(32, 32, Tiling((16, 16), 8, (True, True)))) == 16
    assert len(windows_of(16, 48, Tiling((16, 16), 4, (True, True)))) == 4


def test_windows_that_share_all_are_refused(generator):
    denoise = tiled(lambda x, sigma, condition: x, Tiling((8, 8), 8), whole)
    with pytest.raises(ValueError, match="windows of 8 cells cannot share 8: 1 to 7"):
        denoise(torch.randn(1, 2, 8, 9, generator=generator), torch.ones(1), None)


@pytest.mark.parametrize("wraps", [(False, False), (True, True)])
def test_one_window_that_covers_all_changes_no_bit(wraps, generator):
    model = model_told()
    x, sigma = torch.randn(2, *SHAPE, generator=generator), torch.tensor([1.0, 2.0])
    condition = model.condition({})
    expected = model.denoise(x, sigma, condition)
    for side in (8, 16):
        found = tiled(model.denoise, Tiling((side, side), 4, wraps), whole)(x, sigma, condition)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("wraps", [(False, False), (True, False), (True, True)])
def test_denoisers_of_single_cells_give_the_same_in_windows(wraps, generator):
    x, sigma = torch.randn(2, 3, 21, 30, generator=generator).double(), torch.tensor([0.3, 5.0])
    tiling = Tiling((8, 10), 3, wraps)

    def gaussian(x, sigma, variance):
        return x * (variance / (variance + sigma.view(-1, 1, 1, 1) ** 2))

    for denoise in (lambda x, sigma, variance: x, gaussian):
        found = tiled(denoise, tiling, whole)(x, sigma, 0.7)
        assert torch.allclose(found, denoise(x, sigma, 0.7), rtol=0, atol=1e-12)


def test_each_window_is_told_its_own_part(generator):
    x, told = (
        torch.randn(2, 2, 12, 20, generator=generator),
        torch.randn(2, 2, 12, 20, generator=generator),
    )
    calls = []

    def denoise(x, sigma, part):
        assert x.shape == part.shape == (2, 2, 8, 8)
        calls.append(x)
        return part

    tiling = Tiling((8, 8), 4, (False, True))
    found = tiled(denoise, tiling, lambda told, window: window.of(told))(x, torch.ones(2), told)
    assert torch.allclose(found, told, rtol=0, atol=1e-6)
    assert len(calls) == len(windows_of(12, 20, tiling)) == 2 * 5


def test_windows_around_the_border_have_no_first_place(generator):
    """Rolling the latents by the windows' distance rolls the result, around the border too."""
    kernel = torch.randn(2, 2, 3, 3, generator=generator)

    def denoise(x, sigma, condition):
        return F.conv2d(x, kernel, padding=1) + x.mean((2, 3), keepdim=True)

    x = torch.randn(1, 2, 16, 24, generator=generator)
    around = tiled(denoise, Tiling((8, 8), 4, (True, True)), whole)
    for shift in ((4, 0), (0, 8), (12, -4)):
        expected = around(x, torch.ones(1), None).roll(shift, (2, 3))
        found = around(x.roll(shift, (2, 3)), torch.ones(1), None)
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    bordered = tiled(denoise, Tiling((8, 8), 4), whole)
    moved = bordered(x.roll(4, 3), torch.ones(1), None)
    assert not torch.allclose(moved, bordered(x, torch.ones(1), None).roll(4, 3), atol=1e-2)


def steps_at(images, columns):
    """Mean absolute difference across the borders before these columns."""
    steps = (images - images.roll(1, 3)).abs().mean((0, 1, 2))
    return float(steps[columns].mean())


def test_no_seam_where_windows_begin_end_or_meet_the_border(generator, monkeypatch):
    """Windows that disagree by an offset of their own: within 5 % across their borders."""

    def denoise(x, sigma, condition):
        return 0.5 * x + 8.0 * x.mean((2, 3), keepdim=True)

    x = torch.randn(64, 2, 16, 48, generator=generator)
    tiling = Tiling((16, 16), 8, (False, True))
    places = [0, 8, 16, 24, 32, 40]  # the first is the border that meets the last column
    others = [place for place in range(48) if place not in places]

    def ratio():
        images = tiled(denoise, tiling, whole)(x, torch.ones(64), None)
        return steps_at(images, places) / steps_at(images, others)

    assert abs(ratio() - 1.0) < 0.05
    monkeypatch.setattr(tiles, "_bump", lambda side: torch.ones(side, dtype=torch.float64))
    assert ratio() > 1.05  # equal weights do show them


@pytest.mark.parametrize("updown", [False, True])
def test_a_circular_unet_rolls_with_its_input(updown, generator):
    config = UNET.model_copy(update={"residual_updown": updown})
    unet, other = (
        randomised(UNet(config, in_channels=3, out_channels=2, use_tokens=False)) for _ in range(2)
    )
    x, at = torch.randn(2, 3, 12, 16, generator=generator), torch.tensor([3.0, 500.0])
    before = unet(x, at)
    names = list(unet.state_dict())
    wrap_convolutions(unet, AXES["x"])
    along = unet(x, at)
    assert torch.allclose(unet(x.roll(6, 3), at), along.roll(6, 3), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unet(x.roll(6, 2), at), along.roll(6, 2), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="cannot be made circular"):  # twice
        wrap_convolutions(unet, AXES["y"])
    wrap_convolutions(other, AXES["none"])
    assert torch.equal(other(x, at), before)
    wrap_convolutions(other, AXES["both"])
    both = other(x, at)
    assert torch.allclose(other(x.roll((2, 4), (2, 3)), at), both.roll((2, 4), (2, 3)), atol=1e-4)
    assert both.shape == before.shape
    assert not torch.allclose(both, before, rtol=1e-2)
    assert list(unet.state_dict()) == names


def test_a_circular_decoder_rolls_with_its_latents(generator):
    config = AutoencoderConfig(
        channels=8, multipliers=(1, 2, 2), residual_blocks=1, norm_groups=2, latent_channels=2
    )
    decoder = randomised(Decoder(config, image_channels=3))
    latents = torch.randn(1, 2, 6, 5, generator=generator)
    bordered = decoder(latents)
    wrap_convolutions(decoder, AXES["both"])
    found = decoder(latents.roll((1, 2), (2, 3)))
    expected = decoder(latents).roll((4, 8), (2, 3))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, bordered.roll((4, 8), (2, 3)), rtol=1e-2)
    encoder = Encoder(config, image_channels=3, out_channels=4)
    with pytest.raises(ValueError, match="cannot be made circular"):
        wrap_convolutions(encoder, AXES["both"])


@pytest.mark.parametrize("tiling", [None, Tiling((8, 8), 4, (True, True))])
def test_samples_without_borders_roll_with_their_noise(tiling):
    model = model_told()
    make_seamless(model, Canvas((2, 16, 12), tiling, (True, True)))

    def drawn(shift):
        source = seeded_noise([3])

        def noise(like):
            return source(like).roll(shift, (2, 3))

        manner = Manner(2, sampler="euler-ancestral", tiling=tiling)
        return draw_latents(model, {}, (1, 2, 16, 12), noise, manner)

    here, there = drawn((0, 0)), drawn((4, -4))
    assert here.std() > 0.1
    assert torch.allclose(there, here.roll((4, -4), (2, 3)), rtol=1e-3, atol=1e-3)


def test_the_network_goes_around_only_where_a_window_covers_all(generator):
    """Windows along x have borders of their own; along y each covers all, and y meets itself."""
    model, tiling = model_told(), Tiling((8, 8), 4, (True, True))
    make_seamless(model, Canvas((2, 8, 16), tiling, (True, True)))
    x, at = torch.randn(1, 2, 8, 8, generator=generator), torch.tensor([3.0])
    rolled = {axis: model.unet(x.roll(2, axis), at) for axis in (2, 3)}
    assert torch.allclose(rolled[2], model.unet(x, at).roll(2, 2), atol=1e-4)
    assert not torch.allclose(rolled[3], model.unet(x, at).roll(2, 3), atol=1e-2)


@pytest.mark.parametrize("remembers", [False, True])
def test_guidance_and_concatenated_conditions_stay_inside_the_window(remembers, generator):
    model = model_told(CLASS, LOWRES, self_conditioning=remembers)
    guide = Guide(Guidance((3.0,), rescale=0.7), (("class", "lowres"),))
    pictures = torch.rand(2, 3, 8, 16, generator=generator) * 2 - 1
    values = {
        "class": torch.tensor([[0], [1]]),
        "lowres": torch.cat([pictures, torch.zeros(2, 1, 8, 16)], 1),
    }
    x, sigmas = torch.randn(2, 2, 8, 16, generator=generator), torch.tensor([3.0, 1.0, 0.0])
    tiling = Tiling((8, 8), 4)
    found = denoise_at(model, values, guide, sigmas, tiling=tiling)
    first = found(x, sigmas[:1].expand(2))
    expected = torch.zeros_like(x)
    for window in windows_of(8, 16, tiling):
        part = values | {"lowres": window.of(values["lowres"])}
        alone = denoise_at(model, part, guide, sigmas)(window.of(x), sigmas[:1].expand(2))
        columns = window.columns
        expected[..., columns.cells] += columns.weights.float() * alone
    assert torch.allclose(first, expected, rtol=1e-4, atol=1e-4)
    second = found(x, sigmas[1:2].expand(2))
    fresh = denoise_at(model, values, guide, sigmas, tiling=tiling)(x, sigmas[1:2].expand(2))
    assert torch.equal(second, fresh) != remembers  # an estimate is seen by the windows it lies in


def test_sides_in_pixels_become_latents():
    model = model_told()

    def canvas(**options):
        return canvas_of(CanvasConfig(**options), model, facts_of())

    assert canvas() == Canvas(SHAPE, None, (False, False))
    assert canvas(size="64x16").shape == (2, 4, 16)
    assert canvas(size="24").shape == (2, 6, 6)
    assert canvas(tile="auto").tiling == Tiling((8, 8), 4)
    assert canvas(tile=16, tile_overlap=4).tiling == Tiling((4, 4), 1)
    assert canvas(tile="auto", seamless="x").tiling == Tiling((8, 8), 4, (False, True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": "60x33"}, "--size 60x33: sides are multiples of 8 pixels.*56x32 or 64x40"),
        ({"size": "3"}, "take 8"),
        ({"tile": 20}, "--tile 20: sides are multiples of 8 pixels.*16 or 24"),
        ({"tile": 16, "tile_overlap": 6}, "--tile-overlap 6: .*multiples of 4 pixels.*4 or 8"),
        ({"tile": 16, "tile_overlap": 16}, "windows of 16 pixels can share 4 to 12"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest(options, said):
    with pytest.raises(UsageError, match=said):
        canvas_of(CanvasConfig(**options), model_told(), facts_of())


def test_boxes_and_windows_are_refused_together():
    boxes = LayoutCondition(names=("cat",), objects=2, depth=1, heads=1, head_width=8)
    with pytest.raises(UsageError, match="boxes in shares of the whole picture"):
        canvas_of(CanvasConfig(tile="auto"), model_told(boxes), facts_of())


def test_a_file_that_does_not_say_its_factor_wants_the_autoencoder(pipeline):
    facts = facts_of(None)
    with pytest.raises(UsageError, match="give --ae"):
        canvas_of(CanvasConfig(size="32"), model_told(), facts)
    with pytest.raises(DataError, match="another autoencoder"):
        canvas_of(CanvasConfig(size="32", ae=pipeline.ae), model_told(), facts)
    fitting = facts.model_copy(update={"autoencoder": diffusion_facts(pipeline.ldm).autoencoder})
    found = canvas_of(CanvasConfig(size="32", ae=pipeline.ae), model_told(), fitting)
    assert found.shape == (2, 8, 8)
    assert canvas_of(CanvasConfig(tile="auto"), model_told(), facts).tiling is not None


def drawn(pipeline, folder, **options):
    out = folder / "samples.safetensors"
    settings = {"model": pipeline.ldm, "out": out, "num": 2, "steps": 2, "device": "cpu"}
    ldmkit.sample(SampleConfig.model_validate(settings | options))
    return load(out, kind="samples")[1]["latents"]


def test_sample_and_decode_a_larger_picture(pipeline, tmp_path):
    assert diffusion_facts(pipeline.ldm).factor == FACTOR
    latents = drawn(pipeline, tmp_path, size="64x40", tile="auto")
    assert latents.shape[2:] == (10, 16)
    manner = read_header(tmp_path / "samples.safetensors").facts["manner"]
    assert (manner["size"], manner["tile"]) == ("64x40", "auto")
    assert "seamless" not in manner
    assert not torch.allclose(latents, drawn(pipeline, tmp_path, size="64x40"), atol=1e-3)
    one = drawn(pipeline, tmp_path, size="32", tile=SIZE)
    assert torch.equal(one, drawn(pipeline, tmp_path))


def decoded(pipeline, folder, **options):
    out = folder / f"pictures-{options.get('seamless')}"
    config = {"samples": folder / "samples.safetensors", "ae": pipeline.ae, "out": out}
    ldmkit.decode(DecodeConfig.model_validate(config | options))
    return json.loads((out / "samples.jsonl").read_text().splitlines()[0])


def test_decode_takes_seamless_from_the_samples(pipeline, tmp_path):
    latents = drawn(pipeline, tmp_path, seamless="x")
    record = decoded(pipeline, tmp_path, format="npy", precision="fp32")
    assert record["decoded"]["seamless"] == record["manner"]["seamless"] == "x"
    assert "seamless" not in decoded(pipeline, tmp_path, seamless="none")["decoded"]
    assert decoded(pipeline, tmp_path, seamless="both")["decoded"]["seamless"] == "both"
    with pytest.raises(UsageError, match=r"seamless x.*leave out --tile"):
        decoded(pipeline, tmp_path, tile=16)
    model = load_autoencoder(pipeline.ae)
    wrap_convolutions(model.decoder, AXES["x"])
    file = next((tmp_path / "pictures-None").glob("000000-*.npy"))
    with torch.inference_mode():
        expected = model.decode(latents)[0]
    found = torch.from_numpy(np.load(file)).movedim(2, 0) / 127.5 - 1.0
    assert torch.allclose(found, expected, atol=1e-4)


def test_samples_that_say_nonsense_are_refused(pipeline, tmp_path):
    drawn(pipeline, tmp_path)
    path = tmp_path / "samples.safetensors"
    header, tensors = load(path, kind="samples")
    facts = header.facts | {"fingerprint": "", "manner": {"seamless": "z"}}
    save(path, tensors, kind="samples", config={}, facts=facts)
    with pytest.raises(DataError, match="drawn with seamless 'z'"):
        decoded(pipeline, tmp_path)


def test_maps_of_the_training_size_are_refused_for_larger_pictures(tmp_path):
    model = model_told(LOWRES)
    save_diffusion(tmp_path / "ldm.safetensors", model, facts_of())
    lines = tmp_path / "lines.jsonl"
    for side in (8, 16):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    settings = {"model": tmp_path / "ldm.safetensors", "out": tmp_path / "s.safetensors"}
    settings |= {"size": "64", "steps": 1, "device": "cpu", "conditions": lines}
    lines.write_text(json.dumps({"lowres": str(tmp_path / "8.png")}))
    with pytest.raises(DataError, match="8 x 8 pixels; the model takes 16 x 16"):
        ldmkit.sample(SampleConfig.model_validate(settings))
    lines.write_text(json.dumps({"lowres": str(tmp_path / "16.png")}))
    ldmkit.sample(SampleConfig.model_validate(settings))
    assert load(settings["out"], kind="samples")[1]["latents"].shape == (1, 2, 16, 16)
    assert load_diffusion(settings["model"]).config.conditions == (LOWRES,)


def test_options_of_windows_stand_together(run, pipeline):
    done = run("sample", pipeline.ldm, "--tile-overlap", "8")
    assert done.returncode == 2
    assert b"--tile-overlap needs --tile" in done.stderr
    done = run("sample", pipeline.ldm, "--size", "5x")
    assert done.returncode == 2
    assert b"WIDTHxHEIGHT" in done.stderr


@pytest.mark.parametrize(
    ("recipe", "shape", "expected"),
    [
        ({"preprocessing": {"size": 64}}, (4, 16, 16), 4),
        ({"preprocessing": {"size": 64}}, (4, 12, 20), 4),  # of a set of several shapes
        ({"preprocessing": {"size": 256}}, (4, 32, 32), 8),
        ({"preprocessing": {"size": 32}}, (3, 32, 32), 1),
        ({}, (4, 16, 16), None),
    ],
)
def test_a_set_says_how_many_pixels_a_latent_stands_for(recipe, shape, expected):
    manifest = Manifest.model_construct(recipe=recipe, latent_shape=shape)
    assert pixels_of_a_latent(manifest) == expected
