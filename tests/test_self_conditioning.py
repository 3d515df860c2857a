"""Self-conditioning: which samples see an estimate, which one, and what that leaves as it was."""

import torch

import ldmkit
from conftest import diffusion_config
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.self_conditioning import estimating_first, remembering
from ldmkit.diffusion.guidance import Branches, Guidance, classifier_free
from ldmkit.modelfile import load
from test_latent_set import write_set


def recording(seen):
    """A network that halves its input and adds a tenth of what it is given."""

    def denoise(x, sigma, condition):
        seen.append(condition.previous)
        previous = 0.0 if condition.previous is None else condition.previous
        return 0.5 * x + 0.1 * previous

    return denoise


def test_the_chosen_samples_see_the_estimate_made_without_one_and_no_gradient_flows_through_it():
    x = torch.arange(1.0, 4.0).view(3, 1, 1, 1).requires_grad_()
    chosen, seen = torch.tensor([True, False, True]), []
    result = estimating_first(recording(seen), chosen)(x, torch.ones(3), Condition())
    assert seen[0] is None
    assert torch.equal(seen[1].flatten(), torch.tensor([0.5, 0.0, 1.5]))
    result.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 0.5))


def test_each_row_of_a_condition_goes_with_its_sample_to_the_first_look():
    tokens, seen = torch.arange(3.0).view(3, 1, 1), []

    def denoise(x, sigma, condition):
        seen.append((condition.tokens.flatten().tolist(), sigma.tolist()))
        return x

    chosen, sigma = torch.tensor([False, True, True]), torch.tensor([1.0, 2.0, 3.0])
    estimating_first(denoise, chosen)(torch.zeros(3, 1, 1, 1), sigma, Condition(tokens=tokens))
    assert seen == [([1.0, 2.0], [2.0, 3.0]), ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])]


def test_a_batch_of_which_none_is_chosen_goes_through_once():
    seen = []
    denoise = estimating_first(recording(seen), torch.zeros(2, dtype=torch.bool))
    denoise(torch.ones(2, 1, 1, 1), torch.ones(2), Condition())
    assert len(seen) == 1
    assert not seen[0].any()


def test_sampling_sees_the_guided_result_of_the_call_before():
    seen = []

    def network(x, sigma, condition):
        seen.append(condition.previous)
        return x

    guided = classifier_free(network, Guidance((2.0,)))
    denoise = remembering(lambda x, sigma, told: guided(x, sigma, Branches(told, told)))
    first = denoise(torch.ones(2, 1, 1, 1), torch.ones(2), Condition())
    denoise(torch.ones(2, 1, 1, 1), torch.ones(2), Condition())
    assert seen[0] is None
    assert torch.equal(seen[1], first)


def test_a_self_conditioned_model_trains_resumes_and_draws(tmp_path):
    means = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 2
    latents = write_set(tmp_path / "set", [means], class_names=("a", "b"), labels=labels)

    def trained(name, steps):
        config = diffusion_config(latents, tmp_path / name, steps=steps)
        unet = config.unet.model_copy(update={"self_conditioning": True})
        return load(
            ldmkit.train_diffusion(config.model_copy(update={"unet": unet})), kind="diffusion"
        )[1]

    whole, half, resumed = trained("whole", 6), trained("parts", 3), trained("parts", 6)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    seeing = [tensors["unet.conv_in.weight"][:, 3:] for tensors in (half, whole)]
    assert seeing[0].shape[1] == 3
    assert not torch.equal(*seeing), "the weights that see the estimate do not learn"

    model = tmp_path / "whole" / "diffusion.safetensors"
    drawn = []
    for batch in (1, 3):
        out = tmp_path / f"{batch}.safetensors"
        ldmkit.sample(_drawing(model, out, batch))
        drawn.append(load(out, kind="samples")[1])
    assert torch.equal(drawn[0]["latents"], drawn[1]["latents"])
    assert drawn[0]["latents"].isfinite().all()


def _drawing(model, out, batch_size):
    return ldmkit.SampleConfig(
        model=model, out=out, num=3, steps=3, batch_size=batch_size, device="cpu"
    )
