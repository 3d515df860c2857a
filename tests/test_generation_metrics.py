"""Metrics of generated pictures: parity with torch-fidelity, closed forms, bootstrap, copies."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import draw_picture, save_pickled
from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.images import read_images
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError
from ldmkit.metrics import bootstrap, feature_networks, generation, memorization
from ldmkit.metrics.feature_networks import Side, features_of, inception_network
from ldmkit.metrics.frechet import FeatureStatistics, frechet_distance, rgb_pixels
from ldmkit.metrics.quality import moments_of, quality
from ldmkit.metrics.reference import Protocol, load_reference, reference_of, save_reference
from ldmkit.networks.efficientnet import EfficientNetLite0
from ldmkit.torchvision_import import import_torchvision

COUNT = 60
EXAMPLES = Path(__file__).parent.parent / "examples/data/emoji-64-00002.tar"


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def fidelity():
    import_torchvision()
    import torch_fidelity

    return torch_fidelity


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 60 coloured shapes of 32 pixels, alike but not the same."""
    root = tmp_path_factory.mktemp("folders")
    draw = np.random.default_rng(0)
    for name, strength in (("samples", 30), ("real", 10)):
        (root / name).mkdir()
        for number in range(COUNT):
            picture = np.asarray(draw_picture("circle" if number % 2 else "square", number), int)
            picture = picture + draw.normal(0, strength, picture.shape)
            pixels = picture.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


def our_pixels(folder):
    items = open_source(SourceConfig(data=str(folder))).items
    for first in range(0, len(items), 7):
        yield rgb_pixels(read_images(items[first : first + 7], PreprocessingConfig(size=32)))


class Tiny(nn.Module):
    """A random network in float64, so that nothing but the metrics' own arithmetic can differ."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(12, 3, 5, 5, generator=generator).double() * 0.1
        self.head = torch.randn(12, 6, generator=generator).double()

    def maps(self, pixels):
        return nn.functional.conv2d(pixels.double() / 127.5 - 1.0, self.weight, stride=2).relu()

    def everywhere(self, pixels):
        return nn.functional.adaptive_avg_pool2d(self.maps(pixels), 3).flatten(1)

    def forward(self, pixels):
        features = self.maps(pixels).mean(dim=(2, 3))
        return features, features @ self.head


def test_files_give_torch_fidelitys_numbers(fidelity, folders):
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import register_feature_extractor

    network = Tiny()

    class Extractor(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("12", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "12"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, input):
            both = dict(zip(("12", "logits"), network(input), strict=True))
            return tuple(both[name] for name in self.features_list)

    register_feature_extractor("tiny-random", Extractor)
    theirs = fidelity.calculate_metrics(
        input1=str(folders / "samples"),
        input2=str(folders / "real"),
        feature_extractor="tiny-random",
        **dict.fromkeys(("isc", "fid", "kid", "prc", "save_cpu_ram"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        kid_subset_size=COUNT,
    )
    ours = feature_networks.FeatureNetwork("x", "", "", lambda pixels: Side(*network(pixels)))
    samples, real = (
        features_of(ours, our_pixels(folders / name), lambda _: None)
        for name in ("samples", "real")
    )
    assert samples.logits is not None
    score = generation.inception_score(samples.logits)
    shares = generation.shares(generation.neighbourhoods(samples.features, real.features))
    found = {
        "frechet_inception_distance": frechet_distance(moments_of(samples), moments_of(real)),
        "kernel_inception_distance_mean": generation.kernel_distance(*both(samples, real)).mean,
        "inception_score_mean": score.mean,
        "inception_score_std": score.std,
        "precision": shares["precision"],
        "recall": shares["recall"],
    }
    assert 0 < theirs["precision"] < 1 or 0 < theirs["recall"] < 1
    for name, value in found.items():
        assert value == pytest.approx(theirs[name], rel=1e-6), name


def both(*sides):
    return [side.features for side in sides]


@pytest.mark.parametrize(("samples", "real"), [(1200, 1100), (1000, 1000)])
def test_random_subsets_are_those_of_torch_fidelity(fidelity, samples, real, monkeypatch):
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = noise(samples, 5), noise(real, 5, seed=1) + 0.1
    theirs = kid_features_to_metric(x, y, verbose=False, kid_subsets=5)
    assert generation.KERNEL_SUBSETS == 100
    monkeypatch.setattr(generation, "KERNEL_SUBSETS", 5)
    found = generation.kernel_distance(x, y)
    assert found.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    expected = theirs["kernel_inception_distance_std"]
    assert found.std == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_precision_and_recall_of_features_equal_torch_fidelity(fidelity):
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = noise(150, 4) + 0.5, noise(200, 4, seed=1)
    theirs = prc_features_to_metric(x, y, verbose=False)
    ours = generation.shares(generation.neighbourhoods(x, y))
    assert 0.5 < theirs["precision"] < 1
    assert 0.3 < theirs["recall"] < 1
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)


@pytest.fixture(scope="module")
def inception_file(fidelity, tmp_path_factory):
    """torch-fidelity's Inception with random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        save_pickled(file, module.FeatureExtractorInceptionV3("x", ["2048"]).state_dict())
    return file


def test_inception_of_a_file_gives_torch_fidelitys_numbers(
    fidelity, inception_file, folders, tmp_path, monkeypatch
):
    """Twelve files a side through both, at 75 pixels instead of 299 to save time; its kernel distance is computed in float32."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    for name in ("samples", "real"):
        (tmp_path / name).mkdir()
        for file in sorted((folders / name).iterdir())[:12]:
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    theirs = fidelity.calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(tmp_path / "real"),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        **dict.fromkeys(("isc", "fid", "kid", "prc", "save_cpu_ram"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        kid_subset_size=12,
        batch_size=7,
    )
    network = inception_network(inception_file, torch.device("cpu"))
    samples, real = (
        features_of(network, our_pixels(tmp_path / name), lambda _: None)
        for name in ("samples", "real")
    )
    found = quality("inception", samples, real, moments_of(real), draws=0, seed=0).numbers
    expected = {
        "FID": ("frechet_inception_distance", 1e-6),
        "KID": ("kernel_inception_distance_mean", 1e-4),
        "IS": ("inception_score_mean", 1e-6),
        "precision": ("precision", 1e-6),
        "recall": ("recall", 1e-6),
    }
    for label, (name, tolerance) in expected.items():
        assert found[label].value == pytest.approx(theirs[name], rel=tolerance, abs=1e-9), label


def test_density_and_coverage_by_hand():
    """Points on a line; radii of the 5th neighbour: of 0 ... 6 they are 5 4 3 3 3 4 5."""
    real = torch.arange(7.0)[:, None]
    samples = torch.tensor([[0.0], [0.1], [3.0], [9.0], [50.0], [60.0]])
    balls = generation.neighbourhoods(samples, real)
    # a sample is in as many balls as there are real points that reach it
    assert (balls.density * 5).tolist() == [4, 4, 7, 2, 0, 0]
    found = generation.shares(balls)
    assert found["density"] == pytest.approx(17 / 30)
    assert found["coverage"] == 1.0
    assert found["precision"] == pytest.approx(4 / 6)


def test_equal_points_are_at_distance_zero():
    points = 100 + noise(50, 40)
    found = generation.distances(points, points)
    assert found.diagonal().eq(0).all()
    exact = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.allclose(found, exact, atol=1e-6)
    index, distance = generation.nearest(points[10:20], points)
    assert index.tolist() == list(range(10, 20))
    assert distance.eq(0).all()


@pytest.mark.parametrize(("count", "width"), [(30, 50), (80, 12)])
def test_frechet_draws_are_distances_of_the_drawn_rows(count, width):
    samples, real = noise(count, width) + 0.3, noise(70, width, seed=1)
    moments = moments_of(Side(real))
    counts = bootstrap.resampling_counts(count, 5, seed=3)
    assert counts.sum(1).eq(count).all()
    found = bootstrap.frechet_draws(samples, moments, counts)
    for row, value in zip(counts, found.tolist(), strict=True):
        rows = samples.repeat_interleave(row, dim=0)
        expected = frechet_distance(moments_of(Side(rows)), moments)
        assert value == pytest.approx(expected, rel=1e-6)
    once = bootstrap.frechet_draws(samples, moments, torch.ones(1, count, dtype=torch.int64))
    assert once.item() == pytest.approx(frechet_distance(moments_of(Side(samples)), moments))


def test_kernel_draws_leave_out_a_sample_with_itself():
    samples, real = noise(20, 4), noise(20, 4, seed=1)
    once = bootstrap.kernel_draws(samples, real, torch.ones(1, 20, dtype=torch.int64))
    assert once.item() == pytest.approx(generation.squared_mmd(samples, real), rel=1e-9)
    counts = bootstrap.resampling_counts(20, 2000, seed=0)
    drawn = bootstrap.kernel_draws(samples, real, counts)
    assert drawn.mean().item() == pytest.approx(once.item(), abs=4 * drawn.std().item() / 2000**0.5)


def test_draws_of_all_samples_once_are_the_values():
    samples, real = noise(40, 3), noise(50, 3, seed=1)
    balls = generation.neighbourhoods(samples, real)
    drawn = bootstrap.share_draws(balls, torch.ones(1, 40, dtype=torch.int64))
    for name, value in generation.shares(balls).items():
        assert drawn[name].item() == pytest.approx(value), name
    few = torch.zeros(1, 40, dtype=torch.int64)
    few[0, 0] = 40
    assert bootstrap.share_draws(balls, few)["recall"] < drawn["recall"]
    flat = bootstrap.score_draws(torch.zeros(40, 5), torch.ones(1, 40, dtype=torch.int64))
    assert flat.item() == pytest.approx(1.0)


def test_the_interval_covers_what_it_should():
    """The interval of a mean over 200 normal numbers: 1.96 standard errors to both sides."""
    drawn = 3.0 + torch.randn(4000, generator=torch.Generator().manual_seed(0)) / math.sqrt(200)
    low, high = bootstrap.interval(drawn, 7.0)
    assert (low + high) / 2 == pytest.approx(7.0, abs=0.01)
    assert (high - low) / 2 == pytest.approx(1.96 / math.sqrt(200), rel=0.05)


def test_frechet_intervals_hold_other_samples_of_the_same_model():
    """Of 40 sets of samples, most distances lie in the interval that one of them gives."""
    real = moments_of(Side(noise(500, 6)))
    first = noise(100, 6, seed=1) * 1.2
    counts = bootstrap.resampling_counts(100, 200, seed=0)
    value = frechet_distance(real, moments_of(Side(first)))
    low, high = bootstrap.interval(bootstrap.frechet_draws(first, real, counts), value)
    others = [
        frechet_distance(real, moments_of(Side(noise(100, 6, seed=2 + n) * 1.2))) for n in range(40)
    ]
    spread = 4 * float(np.std(others))
    assert 0.5 < (high - low) / spread < 2.0
    assert low < value < high


def test_quality_has_labels_floor_and_limits():
    real, samples = Side(noise(40, 6)), Side(noise(20, 6, seed=1) + 1.0)
    found = quality("effnet", samples, real, moments_of(real), draws=50, seed=0)
    expected = {"FD-effnet", "KD-effnet", "precision", "recall", "density", "coverage"}
    assert set(found.numbers) == expected
    assert (found.samples, found.real, found.floor_pictures) == (20, 40, 20)
    for label, number in found.numbers.items():
        assert number.interval is not None
        assert number.interval[0] <= number.value <= number.interval[1], label
        assert number.floor is not None
        if label in ("precision", "recall", "coverage"):
            assert 0 <= number.interval[0] <= number.interval[1] <= 1
    distance = found.numbers["FD-effnet"]
    assert distance.floor is not None
    assert distance.value > distance.floor
    few = quality("effnet", samples, Side(noise(8, 6)), moments_of(real), draws=0, seed=0)
    assert few.floor_pictures is None
    assert few.numbers["precision"] == (few.numbers["precision"].value, None, None)
    with pytest.raises(DataError, match="6 pictures or more on each side; there are 5"):
        quality("effnet", Side(noise(5, 6)), real, moments_of(real), draws=0, seed=0)


def blurred(images, sigma):
    radius = int(4 * sigma)
    x = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = nn.functional.pad(images, (radius,) * 4, "replicate")
    across = nn.functional.conv2d(padded, kernel[:, :, None], groups=3)
    return nn.functional.conv2d(across, kernel[..., None], groups=3)


def measured_ladder(extract, first, second):
    """FD and KD of `first`, from itself to noise, to `second`."""
    generator = torch.Generator().manual_seed(0)
    ladder = (
        first,
        blurred(first, 0.7),
        blurred(first, 2.0),
        torch.rand(first.shape, generator=generator) * 2 - 1,
    )
    sides = [
        Side(torch.cat([extract(rgb_pixels(batch)) for batch in images.split(16)]))
        for images in (second, *ladder)
    ]
    real = sides[0]
    found: dict[str, list[float]] = {}
    for side in sides[1:]:
        numbers = quality("effnet", side, real, moments_of(real), draws=0, seed=0).numbers
        for label in ("FD-effnet", "KD-effnet"):
            found.setdefault(label, []).append(numbers[label].value)
    return found


def test_worse_pictures_are_farther_away_for_a_random_network():
    """Real halves < slightly blurred < more blurred < noise, in features of random weights."""
    torch.manual_seed(0)
    network = EfficientNetLite0()
    images = emoji(96)
    values = measured_ladder(
        lambda pixels: network.features(pixels.float() / 127.5 - 1.0)[1].mean(dim=(2, 3)),
        images[:48],
        images[48:],
    )
    for name, found in values.items():
        assert found == sorted(found), (name, found)


PROTOCOL = {
    "network": "effnet",
    "weights": "abc",
    "network_input": "224",
    "size": 32,
    "resize": "area",
    "crop": "center",
    "channels": 3,
    "background": "white",
    "range": None,
    "holdout": 0.1,
    "count": 9,
}


def test_a_reference_gives_back_what_was_measured(tmp_path):
    protocol = Protocol.model_validate(PROTOCOL)
    made = reference_of(Side(noise(9, 4).float()), protocol)
    save_reference(tmp_path / "r.safetensors", {"effnet": made})
    found = load_reference(tmp_path / "r.safetensors", protocol.model_copy(update={"count": 0}))
    assert torch.equal(found.side.features, made.side.features)
    assert torch.equal(found.covariance, made.covariance)
    assert found.protocol == protocol
    statistics = FeatureStatistics()
    statistics.add(made.side.features)
    assert torch.equal(found.mean, statistics.moments()[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("weights", "abd"), ("size", 64), ("resize", "bicubic"), ("holdout", 0.0), ("crop", "none")],
)
def test_another_protocol_is_refused_by_name(tmp_path, field, value):
    protocol = Protocol.model_validate(PROTOCOL)
    file = tmp_path / "r.safetensors"
    save_reference(file, {"effnet": reference_of(Side(noise(9, 4)), protocol)})
    other = protocol.model_copy(update={field: value})
    assert other.digest != protocol.digest
    with pytest.raises(DataError, match=rf"another protocol: {field} \S+ there, {value} here"):
        load_reference(file, other)
    other = protocol.model_copy(update={"network": "inception"})
    with pytest.raises(DataError, match="holds features of effnet, not of inception"):
        load_reference(file, other)


def scenes(count, seed):
    """Pictures with enough in them that no two are alike, `[n, 3, 32, 32]`."""
    rough = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return nn.functional.interpolate(rough, 32, mode="bicubic").clamp(-1, 1)


def jpeg(images, quality):
    again = []
    for image in images:
        buffer = io.BytesIO()
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        again.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1))
    return torch.stack(again) / 127.5 - 1.0


def look(images, training):
    """The nearest training picture of each."""
    return memorization.nearness(
        memorization.area_means(images), [memorization.area_means(training)]
    )


def test_every_planted_copy_is_found_and_no_held_back_picture():
    """1,000 samples: 60 exact and JPEG copies, 200 held-back pictures, and new ones."""
    training, held_back = scenes(600, 1), scenes(400, 2)
    copies = torch.cat(
        [
            training[:20],
            jpeg(training[20:40], 85),
            jpeg(training[40:60], 60),
        ]
    )
    samples = torch.cat([copies, held_back[200:], scenes(740, 3)])
    assert len(samples) == 1000
    near, calm = look(samples, training), look(held_back[:200], training)
    found = memorization.verdict(near, calm, 0.0)
    assert near.place[:60].tolist() == list(range(60))
    assert found.copies[:60].all()
    assert not found.copies[60:].any()
    assert found.duplicates == 0
    assert set(memorization.nearest_first(near)[:60]) == set(range(60))


def test_held_back_pictures_that_are_training_pictures_do_not_blind_it():
    training = scenes(80, 1)
    held_back = torch.cat([training[:3], scenes(40, 2)])
    samples = torch.cat([training[5:10], scenes(40, 3)])
    found = memorization.verdict(look(samples, training), look(held_back, training), 0.0)
    assert found.duplicates == 3
    assert found.limit > memorization.SAME
    assert found.copies[:5].all()
    assert not found.copies[5:].any()
    only = memorization.verdict(look(samples, training), look(training[:4], training), 0.0)
    assert (only.limit, only.duplicates) == (memorization.SAME, 4)
    assert only.copies.sum() == 5


def test_mirror_images_are_copies():
    training = scenes(30, 1)
    assert look(training.flip(3), training).areas.max() < 1e-6
    near = look(jpeg(training.flip(3), 80), training)
    assert near.place.tolist() == list(range(30))
    assert near.areas.max() < 0.25 < look(training[:15], training[15:]).areas.min()


def test_the_difference_is_that_of_the_area_that_differs_most():
    """A picture that differs in one corner alone is another one, on however large a common ground."""
    picture = torch.zeros(1, 3, 64, 64)
    other = picture.clone()
    other[:, 1, :8, :8] = 0.5  # an area: 4 of 32 places on each axis
    near = look(other, picture)
    assert near.areas.item() == pytest.approx(0.5)
    assert not near.same
    assert look(picture + 0.05, picture).areas.item() == pytest.approx(0.05, abs=1e-6)


def test_a_copy_through_the_autoencoder_is_found_in_that_version():
    """An autoencoder that changes colours hides copies from who compares with files alone."""
    training, held_back = scenes(60, 1), scenes(40, 2)

    def through(images):
        return (0.5 * images + 0.3).clamp(-1, 1)

    versions = [memorization.area_means(part) for part in (training, through(training))]
    samples = torch.cat([through(training[7:12]), training[20:22], through(scenes(30, 3))])
    near = memorization.nearness(memorization.area_means(samples), versions)
    calm = memorization.nearness(memorization.area_means(through(held_back)), versions)
    found = memorization.verdict(near, calm, 0.0)
    assert near.place[:7].tolist() == [7, 8, 9, 10, 11, 20, 21]
    assert found.copies.tolist() == [True] * 7 + [False] * 30
    alone = memorization.nearness(memorization.area_means(samples), versions[:1])
    assert not alone.same[:5].any()


def emoji(count):
    items = open_source(SourceConfig(data=str(EXAMPLES))).items
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    return read_images([items[i] for i in order[:count]], PreprocessingConfig(size=64))


def test_every_copy_of_an_emoji_is_found_among_twins():
    """Pictures drawn after one pattern: exact, compressed and mirrored copies, and ones not trained on."""
    images = emoji(560)
    training, held_back, new = images.split([240, 160, 160])
    copies = torch.cat(
        [
            training[:20],
            jpeg(training[20:40], 90),
            jpeg(training[40:60], 75),
            training[60:70].flip(3),
        ]
    )
    near, calm = look(torch.cat([copies, new]), training), look(held_back, training)
    found = memorization.verdict(near, calm, 0.0)
    assert near.place[:70].tolist() == list(range(70))
    assert found.copies[:70].all()
    wrong = found.copies[70:]
    assert near.same[70:][wrong].all()
    assert (
        wrong.sum() <= 2
    )  # twins: pictures that are there twice but for a direction or a clock's hand


@pytest.mark.weights
def test_the_published_network_orders_worse_and_worse_pictures(published_weights, capsys):
    file = published_weights("efficientnet-lite0-*.pth")[0]
    network = feature_networks.effnet_network(file, torch.device("cpu"))
    images = emoji(120)
    values = measured_ladder(
        lambda pixels: network.extract(pixels).features, images[:60], images[60:]
    )
    with capsys.disabled():
        print({name: [round(one, 4) for one in found] for name, found in values.items()})
    for name, found in values.items():
        assert found == sorted(found), name


def test_nearness_to_training_is_one_half_without_memory():
    training, held_back = noise(300, 8), noise(100, 8, seed=1)
    new = memorization.nearer_to_training(noise(400, 8, seed=2), training, held_back, seed=0)
    assert new == pytest.approx(0.5, abs=0.1)
    learnt = training[:200] + 0.01 * noise(200, 8, seed=3)
    share = memorization.nearer_to_training(learnt, training[:200], held_back, seed=0)
    assert share > 0.65
    same = memorization.nearer_to_training(training[:50], training[:50], training[:50], seed=0)
    assert same == 0.5
