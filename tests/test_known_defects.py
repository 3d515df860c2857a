"""Defects found in other trainers' first stages, each held off by a test.

Elsewhere in this suite: a perceptual term without gradient and each term's reach (test_loss), graphs
that leak into the discriminator's step (test_discriminator), optimizers lost on resume
(test_training), the misplaced commitment weight and codebooks as running means (test_codebook),
whitening from the whole set (test_encode), any number of DDIM steps (test_diffusion).
"""

import pytest
import torch

import ldmkit
from conftest import ae_config
from ldmkit.autoencoder import training_step
from ldmkit.autoencoder.training_step import batch_of, divided
from ldmkit.autoencoder_configs import AutoencoderLossConfig, DiscriminatorConfig
from ldmkit.diffusion.samplers import sample_ddim
from ldmkit.modelfile import load
from ldmkit.recipes.train_ae import build_learners
from ldmkit.training.checkpoint import saved_checkpoints


@pytest.fixture
def learners_and_parts(pictures, tmp_path):
    config = ae_config(pictures, tmp_path, disc=DiscriminatorConfig(channels=8, layers=1))
    learners = build_learners(config, None, torch.device("cpu"))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parts = divided(batch_of(images, None, learners.model, torch.ones_like), range(2))
    return config, learners, parts


def copies(module):
    return {name: value.clone() for name, value in module.named_parameters()}


def test_neither_sides_step_moves_or_marks_the_other(learners_and_parts):
    """diffusers: after its start the discriminator's gradients leak into the autoencoder's, and back."""
    config, learners, parts = learners_and_parts
    judge = copies(learners.discriminator)
    shown, _ = training_step.update_autoencoder(learners, config, parts, 1.0)
    assert all(torch.equal(v, judge[n]) for n, v in learners.discriminator.named_parameters())
    assert all(p.grad is None for p in learners.discriminator.parameters())
    marks = [p.grad.clone() for p in learners.model.parameters() if p.grad is not None]
    maker = copies(learners.model)
    training_step.update_discriminator(learners, config, shown, penalize=True)
    assert all(torch.equal(v, maker[n]) for n, v in learners.model.named_parameters())
    after = [p.grad for p in learners.model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(marks, after, strict=True))
    assert not all(torch.equal(v, judge[n]) for n, v in learners.discriminator.named_parameters())


def test_both_sides_see_the_same_pictures(learners_and_parts):
    """diffusers and others: the two alternate, so each sees every other batch only."""
    config, learners, parts = learners_and_parts
    shown, _ = training_step.update_autoencoder(learners, config, parts, 1.0)
    assert all(torch.equal(s.images, p.images) for s, p in zip(shown, parts, strict=True))
    assert not any(s.reconstructions.requires_grad for s in shown)


@pytest.mark.parametrize("learned", [True, False])
def test_the_variance_is_trained_where_it_is_said_to_be(learned, pictures, tmp_path):
    """CompVis: a parameter that no optimizer ever got."""
    config = ae_config(
        pictures, tmp_path / "run", loss=AutoencoderLossConfig(learn_variance=learned)
    )
    ldmkit.train_ae(config)
    newest = saved_checkpoints(tmp_path / "run/checkpoints")[-1] / "state.safetensors"
    log_variance = load(newest, kind="checkpoint")[1]["loss.log_variance"]
    assert (log_variance != 0) == learned


def test_bfloat16_leaves_weights_in_float32(pictures, tmp_path):
    """diffusers: weights cast to half precision, in which small steps are lost."""
    path = ldmkit.train_ae(ae_config(pictures, tmp_path / "run", precision="bf16"))
    assert {x.dtype for x in load(path, kind="autoencoder")[1].values()} == {torch.float32}


def test_samplers_never_clip_latents():
    """MONAI: a scheduler's default clamps latents, which are no pixels, to [-1, 1]."""
    wanted = torch.tensor([50.0, -50.0]).view(1, 2, 1, 1)
    sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
    found = sample_ddim(
        lambda x, _: wanted.expand_as(x), torch.zeros(1, 2, 1, 1), sigmas, noise=torch.zeros_like
    )
    assert torch.allclose(found, wanted)
