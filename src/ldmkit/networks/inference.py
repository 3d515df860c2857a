"""Networks made ready to be run many times without gradients: bfloat16, and what does not change kept."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldmkit.networks.packed import pack, packing_works
from ldmkit.networks.transformer import TransformerBlock


def compute_in_bfloat16(network: nn.Module) -> None:
    """From here on a network computes in bfloat16, on the CPU with packed weights.

    Gradients can still be taken with respect to its input. The tensors keep their names; what is
    given to the network has to be bfloat16.

    Args:
        network: in evaluation mode, where it is to run; its weights do not change any more.
    """
    network.to(torch.bfloat16)
    if any(weight.device.type == "cuda" for weight in network.parameters()):
        network.to(memory_format=torch.channels_last)  # what tensor cores want  # pyright: ignore
    if packing_works():
        pack(network)


def remember_contexts(network: nn.Module) -> None:
    """From here on keys and values of a context are computed once while the same tensor is attended to.

    A sampling run gives the same context to each of its calls. Where gradients are taken, nothing is
    remembered.

    Args:
        network: in evaluation mode; its weights do not change any more.
    """
    for block in network.modules():
        if isinstance(block, TransformerBlock):
            for layer in (block.cross_attention.to_k, block.cross_attention.to_v):
                layer.forward = _remembering(layer.forward)


def _remembering(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    known: list[
        tuple[Tensor, Tensor]
    ] = []  # guidance within an interval takes turns with two contexts

    def forward(input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return plain(input)
        for context, result in known:
            if context is input:
                return result
        known.append((input, plain(input)))
        del known[:-2]
        return known[-1][1]

    return forward
