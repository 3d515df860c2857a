"""Captions to token ids: open_clip's byte-pair vocabulary, or one trained on the user's own captions.

Both are a `Tokenizer`, a row of plain values; `caption_row` and `count_tokens` work with either. A row of
ids is start, the caption's tokens, end, padding. The trained vocabulary is a list of merges (Sennrich et al.
2016) over bytes, so that no caption has an unknown token, and stands as JSON in a model file's config.
"""

import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ldmkit.torchvision_import import import_torchvision

MAX_CHARACTERS = 10_000
"""Of a caption; 77 tokens are about 300."""
BYTES = 256
SPECIAL = 3
SMALLEST_VOCABULARY = BYTES + SPECIAL
"""Every byte, start, end and padding: what a trained vocabulary has without any merge."""
CACHED_WORDS = 1 << 16
WORD = re.compile(r" ?[^\W\d_]{1,64}| ?\d| ?(?:[^\w\s]|_){1,64}")
"""A word, a digit or signs in a row, with the space before it; bounded, so that time is."""

Merge = tuple[int, int]
Row = Int[Tensor, " length"]


class Tokenizer(NamedTuple):
    """How captions become rows of ids."""

    pieces: Callable[[str], list[int]]
    """A text to its ids, without start and end."""
    size: int
    """How many ids there are: 0 ... size - 1."""
    start: int
    end: int
    pad: int
    length: int
    """Of a row, start and end included."""


def open_clip_tokenizer(length: int = 77, *, pad_with_end: bool = False) -> Tokenizer:
    """CLIP's vocabulary of 49,408 ids as open_clip has it (Radford et al. 2021).

    Args:
        length: of a row.
        pad_with_end: fill rows up with the end token, as Stable Diffusion 1 does; otherwise with 0, as
            CLIP and Stable Diffusion 2.
    """
    simple = _open_clip_vocabulary()
    start, end = simple.sot_token_id, simple.eot_token_id
    pad = end if pad_with_end else 0
    return Tokenizer(_open_clip_pieces, simple.vocab_size, start, end, pad, length)


def trained_tokenizer(merges: Sequence[Sequence[int]], length: int = 77) -> Tokenizer:
    """A vocabulary of bytes and merges; the last three ids are start, end and padding.

    Args:
        merges: as `train_merges` gives them, or as lists again after JSON.
        length: of a row.

    Raises:
        ValueError: a merge joins ids that do not exist yet, or comes twice.
    """
    ranks: dict[Merge, int] = {}
    for number, merge in enumerate(merges):
        known = BYTES + number
        if len(merge) != 2 or not all(0 <= part < known for part in merge):
            raise ValueError(f"merge {number} is {list(merge)}; two ids below {known} are needed")
        ranks[merge[0], merge[1]] = known
    if len(ranks) != len(merges):
        raise ValueError("a merge comes twice; each pair of ids may come once")

    @lru_cache(CACHED_WORDS)
    def of_word(word: str) -> list[int]:
        return _apply_merges(word.encode(), ranks)

    def pieces(text: str) -> list[int]:
        return [token for word in _words(text) for token in of_word(word)]

    top = BYTES + len(ranks)
    return Tokenizer(pieces, top + SPECIAL, top, top + 1, top + 2, length)


def train_merges(captions: Iterable[str], size: int) -> tuple[Merge, ...]:
    """Byte-pair encoding (Sennrich et al. 2016, Alg. 1): join the commonest pair, again and again.

    Pairs that are equally common are joined in the order of their ids, so that the result depends on the
    captions alone, not on their order.

    Args:
        captions: to learn from.
        size: how many ids there shall be; fewer when no pair is left that occurs twice.

    Returns:
        For id 256, 257 ...: the two ids that it stands for.

    Raises:
        ValueError: the size is below `SMALLEST_VOCABULARY`, or a caption is no proper text.
    """
    if size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"a vocabulary of {size} tokens is too small; bytes, start, end and padding alone "
            f"are {SMALLEST_VOCABULARY}"
        )
    words = _count_words(captions)
    spelled = [list(word.encode()) for word in words]
    times = list(words.values())
    counts: Counter[Merge] = Counter()
    places: defaultdict[Merge, set[int]] = defaultdict(set)
    for index, ids in enumerate(spelled):
        _count(ids, times[index], counts)
        _note(ids, index, places)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    merges: list[Merge] = []
    while queue and len(merges) < size - SMALLEST_VOCABULARY:
        count, pair = heapq.heappop(queue)
        if counts[pair] != -count:  # it has changed since, and stands elsewhere in the queue
            continue
        if count > -2:
            break
        changed: set[Merge] = set()
        for index in places.pop(pair):
            before = spelled[index]
            after = spelled[index] = _joined(before, pair, BYTES + len(merges))
            _count(before, -times[index], counts)
            _count(after, times[index], counts)
            _note(after, index, places)
            changed.update(_pairs(before), _pairs(after))
        for other in changed - {pair}:
            heapq.heappush(queue, (-counts[other], other))
        merges.append(pair)
    return tuple(merges)


def count_tokens(caption: object, tokenizer: Tokenizer) -> int:
    """How many ids a caption has with start and end; what is above `tokenizer.length` is cut off.

    Raises:
        ValueError: as `caption_row`.
    """
    return len(tokenizer.pieces(proper_caption(caption))) + 2


def caption_row(caption: object, tokenizer: Tokenizer, *, allow_empty: bool = False) -> Row:
    """A caption as a row of ids: start, tokens, end, padding; what is too long loses its end.

    Args:
        caption: the text, as a user or a file gives it.
        tokenizer: the vocabulary.
        allow_empty: take a caption without a token, whose row is that of the null.

    Raises:
        ValueError: it is no text, too long to be a caption, not Unicode, or empty.
    """
    pieces = tokenizer.pieces(proper_caption(caption))
    if not (pieces or allow_empty):
        raise ValueError("the caption is empty; write one, or leave this sample out")
    ids = [tokenizer.start, *pieces[: tokenizer.length - 2], tokenizer.end]
    return torch.tensor(ids + [tokenizer.pad] * (tokenizer.length - len(ids)))


def empty_row(tokenizer: Tokenizer) -> Row:
    """The row of the empty text, which says nothing."""
    return caption_row("", tokenizer, allow_empty=True)


@cache
def _open_clip_vocabulary():  # noqa: ANN202 - its class comes with the import, which takes seconds
    import_torchvision()
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _open_clip_pieces(text: str) -> list[int]:
    """What `SimpleTokenizer.encode` gives, with the ids of a word remembered."""
    simple = _open_clip_vocabulary()
    return [i for word in simple.pat.findall(simple.clean_fn(text)) for i in _open_clip_word(word)]


@lru_cache(CACHED_WORDS)
def _open_clip_word(word: str) -> list[int]:
    simple = _open_clip_vocabulary()
    letters = "".join(simple.byte_encoder[byte] for byte in word.encode())
    return [simple.encoder[piece] for piece in simple.bpe(letters).split(" ")]


def proper_caption(caption: object) -> str:
    """The caption itself.

    Raises:
        ValueError: it is no text, too long, or not Unicode.
    """
    if not isinstance(caption, str):
        raise ValueError(f"a caption must be text; this is {type(caption).__name__}")
    if len(caption) > MAX_CHARACTERS:
        raise ValueError(
            f"the caption has {len(caption):,} characters; at most {MAX_CHARACTERS:,} are read"
        )
    if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise ValueError(
            "the caption is not Unicode (it has half of a character); save it as UTF-8"
        )
    return caption


def _count_words(captions: Iterable[str]) -> Counter[str]:
    """How often each word occurs; what stands between spaces is cut into words once, however often it does."""
    between: Counter[str] = Counter()
    for caption in captions:
        between.update(_cleaned(proper_caption(caption)))
    words: Counter[str] = Counter()
    for text, times in between.items():
        for word in WORD.findall(f" {text}"):  # no word goes beyond a space
            words[word] += times
    return words


def _words(text: str) -> list[str]:
    """Small letters and single spaces, cut into words; the first has a space before it as all have."""
    cleaned = " ".join(_cleaned(text))
    return WORD.findall(f" {cleaned}") if cleaned else []


def _cleaned(text: str) -> list[str]:
    """In small letters, what stands between spaces."""
    return unicodedata.normalize("NFC", text).lower().split()


def _pairs(ids: list[int]) -> Iterator[Merge]:
    return pairwise(ids)


def _count(ids: list[int], times: int, counts: Counter[Merge]) -> None:
    for pair in _pairs(ids):
        counts[pair] += times


def _note(ids: list[int], index: int, places: defaultdict[Merge, set[int]]) -> None:
    for pair in _pairs(ids):
        places[pair].add(index)


def _joined(ids: list[int], pair: Merge, joint: int) -> list[int]:
    """`ids` with `joint` in place of the pair, from left to right."""
    result: list[int] = []
    for token in ids:
        if result and (result[-1], token) == pair:
            result[-1] = joint
        else:
            result.append(token)
    return result


def _apply_merges(word: bytes, ranks: dict[Merge, int]) -> list[int]:
    ids = list(word)
    while found := [ranks[pair] for pair in _pairs(ids) if pair in ranks]:
        first = min(found)
        pair = next(pair for pair in _pairs(ids) if ranks.get(pair) == first)
        ids = _joined(ids, pair, first)
    return ids
