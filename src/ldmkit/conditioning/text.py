"""Text, trained along: the transformer tau_theta over a caption's tokens (Rombach et al. 2022, App. E.2.1).

The code published with the paper calls it BERTEmbedder. It is nothing of BERT but the vocabulary: an
encoder from scratch, trained by the diffusion loss alone. Padding is attended to like any token; there is no
mask.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ldmkit.condition_configs import TextCondition, TextOptions
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.kind import Kind, Reader, Widths
from ldmkit.conditioning.token_transformer import Ids, TokenTransformer
from ldmkit.conditioning.tokenizer import (
    Tokenizer,
    caption_row,
    count_tokens,
    empty_row,
    open_clip_tokenizer,
    train_merges,
    trained_tokenizer,
)
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import DataError
from ldmkit.terminal import say


class TextConditioner(nn.Module):
    """Captions as tokens to attend to, by a transformer that the diffusion loss trains.

    A batch of values is rows of ids as `tokenizer.caption_row` gives them, int64 `[batch, length]`.

    Args:
        vocabulary: number of ids (`Tokenizer.size`).
        empty_ids: the row of the empty text (`tokenizer.empty_row`); its length is that of all rows.
        width: of the tokens.
        depth: blocks of the transformer.
        heads: of each attention.
        head_width: of each head.
    """

    def __init__(
        self,
        vocabulary: int,
        empty_ids: Sequence[int],
        width: int,
        *,
        depth: int,
        heads: int = 8,
        head_width: int = 64,
    ) -> None:
        super().__init__()
        self.empty_ids = tuple(empty_ids)
        self.transformer = TokenTransformer(
            vocabulary, len(empty_ids), width, depth=depth, heads=heads, head_width=head_width
        )

    def empty(self, values: Ids) -> Ids:
        """The rows of the empty text, in the shape of `values`."""
        return torch.tensor(self.empty_ids).to(values).expand_as(values)

    def forward(self, values: Ids) -> Condition:
        """Tokens `[batch, length, width]`."""
        device = self.transformer.token_embedding.weight.device
        return Condition(tokens=self.transformer(values.to(device)))


def tokenizer_of(config: TextCondition) -> Tokenizer:
    """What turns captions into ids for this model."""
    if config.merges is None:
        return open_clip_tokenizer(config.length)
    return trained_tokenizer(config.merges, config.length)


def _settle(options: TextOptions, latents: LatentSet) -> TextCondition:
    captions = [caption for caption in latents.texts("caption") if caption]
    if not captions:
        raise DataError(f"--condition text: {latents.directory} has no captions")
    lines = (line for caption in captions for line in caption.splitlines())
    own = options.vocabulary == "own"
    merges = train_merges(lines, options.vocabulary_size) if own else None
    settings = options.model_dump(exclude={"dropout", "vocabulary_size", "without", "vocabulary"})
    return TextCondition(**settings, merges=merges)


def _build(config: TextCondition, widths: Widths) -> TextConditioner:
    tokenizer = tokenizer_of(config)
    return TextConditioner(
        tokenizer.size,
        empty_row(tokenizer).tolist(),
        widths.context,
        depth=config.depth,
        heads=config.heads,
        head_width=config.head_width,
    )


def _reader(config: TextCondition, options: TextOptions, latents: LatentSet) -> Reader:
    tokenizer = tokenizer_of(config)
    captions = list(latents.texts("caption"))
    silent = [n for n, text in enumerate(captions) if not text.strip() and not _lines(text)]
    if silent and options.without == "refuse":
        key = next(key for n, key in enumerate(latents.texts("key")) if n == silent[0])
        raise DataError(
            f"{len(silent)} of {len(captions)} latents in {latents.directory} have no caption, the first of "
            f"them {key}: give them one, or train with --text.without null"
        )
    longest = _longest_line(captions)
    if count_tokens(longest, tokenizer) > tokenizer.length:
        say(
            f"captions of more than {tokenizer.length} tokens are cut off, such as: {longest[:60]} ..."
        )

    def read(indices: np.ndarray, generator: torch.Generator) -> Ids:
        rows = []
        for index in indices.tolist():
            lines = _lines(captions[index]) or [""]
            chosen = int(torch.randint(len(lines), (), generator=generator))
            rows.append(caption_row(lines[chosen], tokenizer, allow_empty=True))
        return torch.stack(rows)

    return read


def _lines(text: str) -> list[str]:
    """The captions of a picture."""
    return [line for line in text.splitlines() if line]


def _longest_line(texts: Sequence[str]) -> str:
    longest = ""
    for text in sorted(texts, key=len, reverse=True):
        if len(text) <= len(longest):  # no line of what follows can be longer
            break
        longest = max((longest, *text.splitlines()), key=len)
    return longest


TEXT = Kind(
    settle=_settle,
    build=_build,
    reader=_reader,
    row=lambda config, value: caption_row(value, tokenizer_of(config), allow_empty=True),
    silence="",
)
