"""The trained text transformer's names against those of the code published with the paper.

There it is `cond_stage_model.transformer`, an early x-transformers encoder whose list of layers alternates
between attention and feed-forward. Pure naming: no file is touched.
"""

import re
from typing import NamedTuple

from torch import Tensor

from ldmkit.conditioning.token_transformer import FEED_FORWARD_FACTOR
from ldmkit.errors import DataError
from ldmkit.interop.layout import Tensors

PREFIX = "cond_stage_model.transformer."
HEAD_WIDTH = 64
"""Of every published model; shapes do not say it."""
IGNORED = re.compile(r"to_logits\.")
"""An output layer for language modelling, which the paper's models carry and never use."""
BLOCK = re.compile(r"blocks\.(\d+)\.(norm1|norm2|attention|expand|contract)\.(.+)")
OUTSIDE = {
    "token_embedding.weight": "token_emb.weight",
    "position_embedding.weight": "pos_emb.emb.weight",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
PLACES = {
    "norm1": (0, "0"),
    "attention": (0, "1"),
    "norm2": (1, "0"),
    "expand": (1, "1.net.0.0"),
    "contract": (1, "1.net.2"),
}
"""Our part of a block: which of its two layers over there, and where in it."""


class TextShape(NamedTuple):
    """What `conditioning.token_transformer.TokenTransformer` is built with."""

    vocabulary: int
    length: int
    width: int
    depth: int
    heads: int
    head_width: int


def original_name(name: str) -> str:
    """The published code's name, without prefix, of a tensor of `TokenTransformer`."""
    if (match := BLOCK.fullmatch(name)) is None:
        return OUTSIDE[name]
    layer, place = PLACES[match[2]]
    return f"attn_layers.layers.{2 * int(match[1]) + layer}.{place}.{match[3]}"


def from_original(tensors: Tensors, source: str) -> tuple[TextShape, Tensors]:
    """The text transformer of a published checkpoint: its numbers, and its tensors by our names.

    Args:
        tensors: all of the file's.
        source: how to name it in errors.

    Raises:
        DataError: there is none, or one that ours cannot express.
    """
    own = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX)
    }
    if "token_emb.weight" not in own:
        raise DataError(
            f"{source} holds no trained text transformer: none of its {len(tensors)} tensors is "
            f"called {PREFIX}token_emb.weight"
        )
    depth = 1 + max(
        (int(name.split(".")[2]) // 2 for name in own if name.startswith("attn_layers.layers.")),
        default=-1,
    )
    wanted = {original_name(name): name for name in _names(depth)}
    found = {name for name in own if not IGNORED.match(name)}
    if odd := sorted(found ^ wanted.keys()):
        state = "lacks" if odd[0] in wanted else "has the unknown"
        raise DataError(f"{source} {state} tensor {PREFIX}{odd[0]}")
    shape = _shape(own, depth, source)
    return shape, {ours: own[theirs] for theirs, ours in wanted.items()}


def _names(depth: int) -> list[str]:
    parts = [
        *(f"attention.{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out")),
        "attention.to_out.bias",
        *(
            f"{part}.{kind}"
            for part in PLACES
            if part != "attention"
            for kind in ("weight", "bias")
        ),
    ]
    return [*OUTSIDE, *(f"blocks.{n}.{part}" for n in range(depth) for part in parts)]


def _shape(tensors: Tensors, depth: int, source: str) -> TextShape:
    """Read the numbers off the tensors, and check every shape against them."""
    vocabulary, width = _matrix(tensors, "token_emb.weight", source)
    length = _matrix(tensors, "pos_emb.emb.weight", source)[0]
    query = "attn_layers.layers.0.1.to_q.weight"
    inner = _matrix(tensors, query, source)[0] if depth else HEAD_WIDTH
    if inner % HEAD_WIDTH:
        raise DataError(f"{source}: {PREFIX}{query} has {inner} rows, no multiple of {HEAD_WIDTH}")
    wide = FEED_FORWARD_FACTOR * width
    shapes = {
        "token_emb.weight": (vocabulary, width),
        "pos_emb.emb.weight": (length, width),
        "to_q.weight": (inner, width),
        "to_k.weight": (inner, width),
        "to_v.weight": (inner, width),
        "to_out.weight": (width, inner),
        "net.0.0.weight": (wide, width),
        "net.0.0.bias": (wide,),
        "net.2.weight": (width, wide),
    }
    for name, tensor in tensors.items():
        if IGNORED.match(name):
            continue
        expected = next((s for end, s in shapes.items() if name.endswith(end)), (width,))
        if tuple(tensor.shape) != expected:
            raise DataError(
                f"{source}: tensor {PREFIX}{name} has shape {list(tensor.shape)}, the others ask "
                f"for {list(expected)}"
            )
    return TextShape(vocabulary, length, width, depth, inner // HEAD_WIDTH, HEAD_WIDTH)


def _matrix(tensors: Tensors, name: str, source: str) -> tuple[int, int]:
    tensor: Tensor = tensors[name]
    if tensor.ndim != 2:
        raise DataError(
            f"{source}: tensor {PREFIX}{name} has shape {list(tensor.shape)}, no matrix"
        )
    return tensor.shape[0], tensor.shape[1]
