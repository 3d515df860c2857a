"""Text towers of open_clip, frozen, with weights that the user gives as a file.

Only the text half is built. Nothing is downloaded, and nothing unpickled here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldmkit.conditioning.open_clip_weights import (
    Embeddings,
    FrozenNetwork,
    Weights,
    architecture,
    give_weights,
    read_weights,
    require_activation,
)
from ldmkit.conditioning.tokenizer import Tokenizer, caption_row, open_clip_tokenizer
from ldmkit.errors import DataError, UsageError

Output = Literal["last", "penultimate", "pooled"]
"""All tokens after the last block, or after the one before it, both behind the final LayerNorm, as in
Stable Diffusion 1 and 2; or the one embedding that the tower was trained to give."""

Ids = Int[Tensor, "batch length"]

FIRST = "token_embedding.weight"
PREFIXES = ("", "text.", "module.", "module.text.", "cond_stage_model.model.")
"""Of a text tower in files of open_clip, OpenAI, their training and Stable Diffusion 2."""
PARTS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


class TowerShape(NamedTuple):
    """What a tower gives for a text."""

    tokens: int
    """How many; 1 where they are pooled."""
    width: int
    length: int
    """Ids in a row that it takes."""


class FrozenTower(FrozenNetwork):
    """A text tower with its weights; calling it embeds rows of ids.

    Args:
        network: open_clip's `TextTransformer`.
        tokenizer: that it was trained with.
        output: which of its numbers to give.
    """

    def __init__(self, network: Any, tokenizer: Tokenizer, output: Output) -> None:  # noqa: ANN401
        super().__init__(network)
        self.tokenizer = tokenizer
        self.output: Output = output

    @property
    def shape(self) -> TowerShape:
        """What it gives for a text."""
        pooled = self.output == "pooled"
        width = self.network.output_dim if pooled else self.network.width
        return TowerShape(1 if pooled else self.tokenizer.length, width, self.tokenizer.length)

    @torch.no_grad()
    def __call__(self, ids: Ids) -> Embeddings:
        """Rows of ids to tokens `[batch, count, width]`, float32, on the tower's device."""
        ids = ids.to(self.device)
        if self.output == "pooled":
            return self.network(ids)[:, None].float()
        found = self.network.forward_intermediates(
            ids,
            indices=[-1 if self.output == "last" else -2],
            stop_early=True,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        return found["text_intermediates"][0].float()


def encode_texts(
    tower: FrozenTower, texts: Sequence[str], batch: int
) -> Float[Tensor, "texts count width"]:
    """Embeddings of texts, float32 on the CPU; a text that comes several times is computed once.

    Args:
        tower: what embeds.
        texts: captions; the empty text is taken too, since its embedding is the null.
        batch: how many at a time. Results agree for any number up to rounding, and for the same texts in
            the same batches exactly.

    Raises:
        ValueError: one of them is no proper text.
    """
    places = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    rows = [caption_row(text, tower.tokenizer, allow_empty=True) for text in places]
    parts = [
        tower(torch.stack(rows[start : start + batch])).float().cpu()
        for start in range(0, len(rows), batch)
    ]
    found = torch.cat(parts) if parts else torch.empty(0, *tower.shape[:2])
    return found[[places[text] for text in texts]]


def load_tower(
    name: str,
    weights: Path | None,
    output: Output,
    *,
    option: str,
    pad_with_end: bool = False,
) -> FrozenTower:
    """The text tower of an open_clip architecture, on the CPU, float32.

    Args:
        name: of the architecture, such as ViT-H-14.
        weights: its file, safetensors or a checkpoint, of open_clip, OpenAI or Stable Diffusion 2; what it
            holds beside the text tower is left out.
        output: which of its numbers to give.
        option: how the user gives the file, for errors: `--text-encoder-weights`.
        pad_with_end: as Stable Diffusion 1 fills up rows; see `open_clip_tokenizer`.

    Raises:
        UsageError: no weights are given, the architecture is unknown, or ldmkit does not take it.
        DataError: the file is missing or damaged, or holds other weights.
    """
    config = _config(name)
    path, tensors = read_weights(Weights(name, weights, option), config)
    network = _empty_tower(config)
    own = _text_tensors(path, tensors)
    require_activation(path, name, tensors, config.get("quick_gelu", False))
    give_weights(network, own, path, name)
    tokenizer = open_clip_tokenizer(network.context_length, pad_with_end=pad_with_end)
    return FrozenTower(network, tokenizer, output)


def _config(name: str) -> dict[str, Any]:
    """open_clip's own config of an architecture that can be used here."""
    config = architecture(name)
    text = config["text_cfg"]
    foreign = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if foreign or "multimodal_cfg" in config:
        reason = f"it needs {foreign}" if foreign else "it was made to write captions"
        raise UsageError(
            f"{name} is not supported ({reason}): take a tower with CLIP's own vocabulary, "
            "such as ViT-L-14-quickgelu or ViT-H-14"
        )
    return config


def _empty_tower(config: dict[str, Any]) -> Any:  # noqa: ANN401 - open_clip's TextTransformer
    """The tower without numbers: only its text half is built, and no random number is drawn."""
    from open_clip.model import _build_text_tower

    with torch.device("meta"):
        network: Any = _build_text_tower(
            config["embed_dim"], config["text_cfg"], config.get("quick_gelu", False)
        )
    if network.attn_mask is not None:  # in no file, so nothing else would fill it
        network.attn_mask = network.build_causal_mask()
    return network


def _text_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text tower's tensors among those of a file, float32, without prefix."""
    prefix = next((prefix for prefix in PREFIXES if prefix + FIRST in tensors), None)
    if prefix is None:
        raise DataError(
            f"{path} holds no text tower by open_clip's names: none of its {len(tensors)} tensors "
            f"is called {FIRST}"
        )
    own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    return {n: x.float() for n, x in own.items() if n.startswith(PARTS)}
