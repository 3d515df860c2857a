"""Frozen image towers: parity with open_clip, what encode stores of them, variations of a picture."""

import json
from typing import get_args

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import ldmkit
from conftest import diffusion_config, save_pickled
from ldmkit.assembly import diffusion_facts
from ldmkit.conditioning import image_tower
from ldmkit.conditioning.image_tower import COLOURS, ColourScale, embed_pictures, load_image_tower
from ldmkit.conditioning.open_clip_weights import OPENAI_MARKS
from ldmkit.container import read_header
from ldmkit.data.latent_set import LatentSet
from ldmkit.data_configs import EncodeConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.manifest import read_manifest
from ldmkit.modelfile import load
from ldmkit.torchvision_import import import_torchvision
from ldmkit.tower_configs import ColourScale as ColourScaleName
from ldmkit.tower_configs import ImageOutput

TINY = "tiny-image"
VISION = {"image_size": 16, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8}
CHANGES = {
    "": {},
    "-quickgelu": {"quick_gelu": True},
    "-custom": {"custom_text": True},
    "-resnet": {"vision_cfg": VISION | {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}},
    "-coca": {"vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2}},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Random models that open_clip knows by name."""
    import_torchvision()
    import open_clip

    folder = tmp_path_factory.mktemp("architectures")
    text = {"width": 8, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 16}
    for name, changes in CHANGES.items():
        config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": text, **changes}
        (folder / f"{TINY}{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    found = {}
    for name in CHANGES:
        torch.manual_seed(7)
        model = open_clip.create_model(TINY + name, pretrained=None, load_weights=False).eval()
        for key, parameter in model.named_parameters():
            if name != "-resnet" or "attnpool" in key:
                nn.init.normal_(parameter, std=0.3)  # what differs between pictures shows
        found[name] = model
    return found


def saved(model, path, **changes):
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()} | changes
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    safetensors.torch.save_file(state, path)
    return path


@pytest.fixture
def weights(clips, tmp_path):
    return saved(clips[""], tmp_path / "tower.safetensors")


def normalised(pictures, size):
    """What open_clip's own preprocessing makes of pictures that are squares."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in COLOURS["clip"])
    resized = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True)
    return ((resized.clamp(-1, 1) + 1) / 2 - mean) / std


@pytest.mark.parametrize("name", ["", "-quickgelu", "-custom", "-resnet", "-coca"])
def test_a_tower_equals_open_clip(clips, tmp_path, name):
    tower = load_image_tower(
        TINY + name, saved(clips[name], tmp_path / "w.safetensors"), "pooled", option="--w"
    )
    pictures = torch.rand(5, 3, 24, 24) * 2 - 1
    with torch.no_grad():
        expected = clips[name].encode_image(normalised(pictures, tower.size))
    found = embed_pictures(tower, pictures, 2)
    assert (found - expected[:, None]).abs().max() < 1e-5
    assert not found.requires_grad
    assert found.std(0).mean() > 1e-4, "pictures differ"
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(embed_pictures(tower, pictures[order], 5), found[order], atol=1e-5)
    assert embed_pictures(tower, pictures[:0], 2).shape == (0, *found.shape[1:])


def test_tokens_are_those_behind_the_last_block(clips, weights):
    tower = load_image_tower(TINY, weights, "tokens", option="--w")
    pictures = torch.rand(3, 3, 16, 16) * 2 - 1
    visual = clips[""].visual
    with torch.no_grad():
        x = visual.ln_post(visual.transformer(visual._embeds(normalised(pictures, 16))))
        pooled = x[:, 0] @ visual.proj
    assert (embed_pictures(tower, pictures, 3) - x).abs().max() < 1e-5
    assert x.shape == (3, 5, 16)
    whole = load_image_tower(TINY, weights, "pooled", option="--w")
    assert (embed_pictures(whole, pictures, 3)[:, 0] - pooled).abs().max() < 1e-5


def test_a_residual_network_gives_a_token_for_each_place(clips, tmp_path):
    path = saved(clips["-resnet"], tmp_path / "w.safetensors")
    tower = load_image_tower(f"{TINY}-resnet", path, "tokens", option="--w")
    assert embed_pictures(tower, torch.zeros(2, 3, 32, 32), 2).shape == (2, 1, 256)


def test_pictures_of_any_shape_and_grey_ones_fit(weights):
    tower = load_image_tower(TINY, weights, "pooled", option="--w")
    grey = torch.rand(2, 1, 20, 20) * 2 - 1
    assert torch.equal(
        embed_pictures(tower, grey, 2), embed_pictures(tower, grey.expand(-1, 3, -1, -1), 2)
    )
    wide = torch.rand(1, 3, 16, 40) * 2 - 1
    assert torch.equal(
        embed_pictures(tower, wide, 1), embed_pictures(tower, wide[..., 12:28].contiguous(), 1)
    )


@pytest.mark.parametrize("prefix", ["module.", "embedder.model."])
def test_towers_come_out_of_checkpoints_of_other_kinds(clips, tmp_path, weights, prefix):
    state = {prefix + name: tensor.half() for name, tensor in clips[""].state_dict().items()}
    save_pickled(tmp_path / "epoch_1.pt", {"state_dict": state, "epoch": 1})
    pictures = torch.rand(3, 3, 16, 16) * 2 - 1
    one, other = (
        embed_pictures(load_image_tower(TINY, path, "pooled", option="--w"), pictures, 3)
        for path in (weights, tmp_path / "epoch_1.pt")
    )
    assert (one - other).abs().max() < 0.05


def test_loading_a_tower_draws_no_random_number(weights):
    before = torch.get_rng_state()
    load_image_tower(TINY, weights, "pooled", option="--w")
    assert torch.equal(before, torch.get_rng_state())


def test_a_missing_weight_file_is_a_sentence_that_names_it(tmp_path):
    with pytest.raises(UsageError) as caught:
        load_image_tower("ViT-H-14", None, "pooled", option="--image-weights")
    assert str(caught.value).startswith(
        "ViT-H-14 needs its weights: get open_clip_model.safetensors of "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K or "
    )
    assert str(caught.value).endswith(" at huggingface.co, and give its path with --image-weights")
    with pytest.raises(DataError, match=r"no file .*nowhere.*timm/ViT-B-16-SigLIP"):
        load_image_tower("ViT-B-16-SigLIP", tmp_path / "nowhere", "pooled", option="--w")
    with pytest.raises(UsageError, match=r"nearest are .*ViT-H-14"):
        load_image_tower("ViT-H14", None, "pooled", option="--w")
    with pytest.raises(UsageError, match="--image-colours clip or inception"):
        load_image_tower("ViT-L-14", tmp_path / "w", "pooled", option="--w")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"visual.ln_post.bias": None}, "lacks tensor ln_post.bias"),
        ({"visual.extra": torch.ones(3)}, "unknown tensor extra"),
        ({"visual.proj": torch.ones(16, 13)}, r"shape \[16, 13\]"),
        ({"visual.ln_post.bias": torch.full((16,), torch.nan)}, "ln_post.bias holds NaN"),
        ({name: torch.ones(()) for name in OPENAI_MARKS}, f"take {TINY}-quickgelu"),
    ],
)
def test_other_weights_are_refused_by_name(clips, tmp_path, change, part):
    with pytest.raises(DataError, match=part):
        load_image_tower(
            TINY, saved(clips[""], tmp_path / "w.safetensors", **change), "pooled", option="--w"
        )


def test_a_file_without_an_image_half_and_a_tower_without_places_are_refused(clips, tmp_path):
    safetensors.torch.save_file(
        {"token_embedding.weight": torch.ones(1)}, tmp_path / "t.safetensors"
    )
    with pytest.raises(DataError, match="holds no image tower"):
        load_image_tower(TINY, tmp_path / "t.safetensors", "pooled", option="--w")
    path = saved(clips["-coca"], tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="take --image-output pooled"):
        load_image_tower(f"{TINY}-coca", path, "tokens", option="--w")


def test_names_of_outputs_and_colours_are_those_of_the_options():
    import_torchvision()
    import open_clip

    assert get_args(ImageOutput) == get_args(image_tower.Output)
    assert get_args(ColourScaleName) == get_args(image_tower.Colours) == tuple(COLOURS)
    stated = {
        ColourScale(tuple(entry["mean"]), tuple(entry["std"]))
        for name in open_clip.list_models()
        for entry in image_tower.published(name)
        if entry.get("mean")
    }
    assert stated <= set(COLOURS.values()), "open_clip has another scale"


# from pictures to variations


@pytest.fixture(scope="module")
def variations(clips, pipeline, tmp_path_factory):
    """Latents with embedded pictures, and a model told them; the command line and Python alike."""
    root = tmp_path_factory.mktemp("variations")
    weights = saved(clips[""], root / "tower.safetensors")
    latents = ldmkit.encode(
        EncodeConfig(
            data=str(pipeline.data),
            ae=pipeline.ae,
            out=root / "latents",
            image_encoder=TINY,
            image_weights=weights,
            image_output="tokens",
            shard_size=5,
            batch_size=4,
        )
    )
    assert latents is not None
    model = ldmkit.train_diffusion(
        diffusion_config(
            latents, root / "ldm", condition="embedded-image", steps=2, preview_steps=1
        )
    )
    return latents, model, weights


def test_a_set_says_what_embedded_its_pictures(variations, pipeline):
    latents, model, weights = variations
    manifest = read_manifest(latents)
    tower = load_image_tower(TINY, weights, "tokens", option="--w")
    assert manifest.recipe["image_embedding"] == {
        "encoder": TINY,
        "output": "tokens",
        "colours": "clip",
        "fingerprint": tower.fingerprint,
    }
    found = LatentSet(latents).rows("image_embedding", range(12))
    assert (found.dtype, found.shape) == (torch.float16, (12, 5, 16))
    plain = LatentSet(pipeline.latents)
    assert "image_embedding" not in plain.manifest.columns
    assert torch.equal(plain.read(range(12)).mean, LatentSet(latents).read(range(12)).mean)
    config = read_header(model).config
    assert config["conditions"][0]["fingerprint"] == tower.fingerprint
    assert diffusion_facts(model).autoencoder == manifest.recipe["autoencoder"]


def test_variations_of_a_set_and_of_ones_own_picture(variations, pipeline, tmp_path, run):
    latents, model, weights = variations
    set_ = LatentSet(latents)
    key = set_.text("key", 0)
    own = next(path for path in pipeline.data.rglob("*.png") if str(path).endswith(key))
    (tmp_path / "asked.jsonl").write_text(f"{json.dumps({'image': str(own)})}\n{{}}\n")
    shared = {"model": model, "steps": 1, "num": 2, "guidance": 1.0}
    like, typed = tmp_path / "like.safetensors", tmp_path / "typed.safetensors"
    ldmkit.sample(SampleConfig(**shared, like=latents, out=like))
    asked = ("--conditions", tmp_path / "asked.jsonl", "--image-weights", weights)
    done = run("sample", model, "--steps", 1, "--guidance", 1, *asked, "-o", typed)
    assert done.returncode == 0, done.stderr
    one, other = (load(path, kind="samples")[1]["latents"] for path in (like, typed))
    assert torch.allclose(one[0], other[0], atol=1e-3)
    assert not torch.allclose(one[1], other[1], atol=1e-4), "the second line says nothing"


def test_what_does_not_fit_is_one_sentence(variations, clips, pipeline, tmp_path, run):
    _, model, _ = variations
    other = saved(clips[""], tmp_path / "o.safetensors", **{"visual.proj": torch.ones(16, 12)})
    Image.new("RGB", (8, 8)).save(tmp_path / "own.png")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"image": str(tmp_path / "own.png")}))
    out = ("-o", tmp_path / "out.safetensors")
    asked = ("--conditions", tmp_path / "asked.jsonl")
    encode = ("encode", pipeline.data, "--ae", pipeline.ae, "--out", tmp_path / "latents")
    for code, message, arguments in (
        (3, "is another tower (", ("sample", model, *asked, "--image-weights", other, *out)),
        (3, "there is no file", ("sample", model, *asked, "--image-weights", "no", *out)),
        (3, "has no embedded pictures", ("sample", model, "--like", pipeline.latents, *out)),
        (2, "for --image-encoder NAME", (*encode, "--image-weights", other)),
        (2, "ViT-H-14 needs its weights", (*encode, "--image-encoder", "ViT-H-14")),
    ):
        done = run(*arguments)
        text = done.stderr.decode()
        assert (done.returncode, len(text.strip().splitlines())) == (code, 1), text
        assert message in text
    another = ldmkit.encode(
        EncodeConfig(
            data=str(pipeline.data),
            ae=pipeline.ae,
            out=tmp_path / "latents",
            image_encoder=TINY,
            image_weights=other,
            image_output="pooled",
        )
    )
    done = run("sample", model, "--like", another, *out)
    assert done.returncode == 3
    assert b"embedded by another image tower" in done.stderr
