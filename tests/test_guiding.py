"""Guidance by pictures behind the decoder, from the options of `sample` to the pictures."""

import json
import shutil

import torch
from PIL import Image

import ldmkit
from conftest import ae_config, draw_picture
from ldmkit.assembly import load_autoencoder
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.self_conditioning import remembering
from ldmkit.data.latent_set import LatentSet
from ldmkit.generation_configs import SampleConfig
from ldmkit.guiding import smaller
from ldmkit.modelfile import load


def drawn(pipeline, tmp_path, name="out", **asked):
    path = tmp_path / f"{name}.safetensors"
    settings = {"model": pipeline.ldm, "out": path, "num": 3, "steps": 4, "guidance": 1.0} | asked
    assert ldmkit.sample(SampleConfig.model_validate(settings)) == path
    return load(path, kind="samples")[1]["latents"]


def guided(pipeline, place, **changes):
    return {"guide_image": place, "guide_ae": pipeline.ae, "guide_scale": 30.0} | changes


def distance(pipeline, latents, targets):
    """Mean squared difference of decoded samples, made as small as the targets."""
    with torch.no_grad():
        pictures = load_autoencoder(pipeline.ae).decode(latents)
    return float((smaller(pictures, targets.shape[2:]) - targets).square().mean())


def of_set(pipeline, numbers, side):
    with torch.no_grad():
        mean = LatentSet(pipeline.latents).read(numbers).mean.float()
        return smaller(load_autoencoder(pipeline.ae).decode(mean), (side, side))


def test_guided_samples_are_nearer_to_the_latents_they_are_led_to(pipeline, tmp_path):
    plain = drawn(pipeline, tmp_path)
    led = drawn(pipeline, tmp_path, **guided(pipeline, pipeline.latents))
    targets = of_set(pipeline, [0, 1, 2], 8)
    assert distance(pipeline, led, targets) < 0.8 * distance(pipeline, plain, targets)
    near, far = (targets, targets.roll(1, 0))
    assert distance(pipeline, led, near) <= distance(pipeline, led, far), "each has its own"


def test_pictures_lead_as_files_and_in_folders(pipeline, tmp_path):
    small = Image.new("RGB", (8, 8), "black")
    (tmp_path / "folder").mkdir()
    small.save(tmp_path / "folder/a.png")
    Image.new("RGB", (64, 48), "black").save(tmp_path / "one.png")
    plain = drawn(pipeline, tmp_path)
    folder = drawn(pipeline, tmp_path, **guided(pipeline, tmp_path / "folder"))
    one = drawn(pipeline, tmp_path, **guided(pipeline, tmp_path / "one.png"))
    assert (folder - one).abs().max() < 0.01 * one.abs().max(), "both are black"
    black = -torch.ones(3, 3, 8, 8)
    assert distance(pipeline, one, black) < 0.9 * distance(pipeline, plain, black)
    draw_picture("circle", 1).save(tmp_path / "folder/b.png")
    two = drawn(pipeline, tmp_path, **guided(pipeline, tmp_path / "folder"))
    assert torch.equal(two[0::2], folder[0::2])
    assert not torch.equal(two[1], folder[1])


def test_no_scale_is_no_guide_bit_for_bit_and_batches_do_not_matter(pipeline, tmp_path):
    plain = drawn(pipeline, tmp_path)
    nothing = drawn(pipeline, tmp_path, **guided(pipeline, pipeline.latents, guide_scale=0.0))
    assert torch.equal(nothing, plain)
    whole = drawn(pipeline, tmp_path, **guided(pipeline, pipeline.latents))
    parts = drawn(pipeline, tmp_path, **guided(pipeline, pipeline.latents), batch_size=1)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, plain)


def test_a_sample_file_says_what_led_it(pipeline, tmp_path):
    drawn(pipeline, tmp_path, **guided(pipeline, pipeline.latents, guide_factor=8))
    manner = load(tmp_path / "out.safetensors", kind="samples")[0].facts["manner"]
    assert manner["guide_image"] == str(pipeline.latents)
    assert (manner["guide_factor"], manner["guide_scale"]) == (8, 30.0)
    drawn(pipeline, tmp_path)
    assert (
        "guide_image" not in load(tmp_path / "out.safetensors", kind="samples")[0].facts["manner"]
    )


def test_an_estimate_that_is_remembered_holds_no_gradient():
    seen = []

    def denoise(x, sigma, condition):
        seen.append(condition.previous)
        return 2.0 * x

    denoise_on = remembering(denoise)
    x = torch.ones(1, 1, 1, 1, requires_grad=True)
    assert denoise_on(x, torch.ones(1), Condition()).requires_grad
    denoise_on(x, torch.ones(1), Condition())
    assert seen[0] is None
    assert not seen[1].requires_grad


def test_what_does_not_fit_is_one_sentence(pipeline, tmp_path, run):
    other = ldmkit.train_ae(ae_config(pipeline.data, tmp_path / "ae", steps=1))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    strange = tmp_path / "strange"
    shutil.copytree(pipeline.latents, strange)
    page = json.loads((strange / "manifest.json").read_text())
    del page["digest"]
    fingerprint = LatentSet(pipeline.latents).manifest.recipe["autoencoder"]
    (strange / "manifest.json").write_text(json.dumps(page).replace(fingerprint, "0" * 64))
    image, ae = ("--guide-image", tmp_path / "a.png"), ("--guide-ae", pipeline.ae)
    for code, message, arguments in (
        (2, "--guide-ae", image),
        (2, "is for --guide-image", ae),
        (2, "is for --guide-image", ("--guide-scale", 3)),
        (2, "--guide-factor 5 does not divide 32 x 32", (*image, *ae, "--guide-factor", 5)),
        (3, "there is no such picture", ("--guide-image", tmp_path / "nowhere", *ae)),
        (3, "autoencoder.safetensors", ("--guide-image", pipeline.ae, *ae)),
        (3, "another autoencoder", (*image, "--guide-ae", other)),
        (3, "another autoencoder", ("--guide-image", strange, *ae)),
    ):
        done = run("sample", pipeline.ldm, *arguments, "-o", tmp_path / "out.safetensors")
        text = done.stderr.decode()
        assert (done.returncode, len(text.strip().splitlines())) == (code, 1), text
        assert message in text, text
        assert not (tmp_path / "out.safetensors").exists()
