"""Text towers of open_clip, frozen, with weights that the user gives as a file.

Only the text half is built. Nothing is downloaded, and nothing unpickled here.
"""

import difflib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldmkit.conditioning.tokenizer import Tokenizer, caption_row, open_clip_tokenizer
from ldmkit.errors import DataError, UsageError
from ldmkit.modelfile import fingerprint, require_tensors
from ldmkit.torchvision_import import import_torchvision
from ldmkit.unpickling import read_tensors

Output = Literal["last", "penultimate", "pooled"]
"""All tokens after the last block, or after the one before it, both behind the final LayerNorm, as in
Stable Diffusion 1 and 2; or the one embedding that the tower was trained to give."""

Ids = Int[Tensor, "batch length"]
Embeddings = Float[Tensor, "batch count width"]

FIRST = "token_embedding.weight"
PREFIXES = ("", "text.", "module.", "module.text.", "cond_stage_model.model.")
"""Of a text tower in files of open_clip, OpenAI, their training and Stable Diffusion 2."""
PARTS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
OPENAI_MARKS = {"input_resolution", "context_length", "vocab_size"}
SUGGESTIONS = 3
WEIGHTS_FILE = "open_clip_model.safetensors"


class TowerShape(NamedTuple):
    """What a tower gives for a text."""

    tokens: int
    """How many; 1 where they are pooled."""
    width: int
    length: int
    """Ids in a row that it takes."""


class FrozenTower:
    """A text tower with its weights; calling it embeds rows of ids without gradients.

    Not a module on purpose: what holds one neither trains it nor saves it. A deep copy is the same tower.

    Args:
        network: open_clip's `TextTransformer`.
        tokenizer: that it was trained with.
        output: which of its numbers to give.
    """

    def __init__(self, network: Any, tokenizer: Tokenizer, output: Output) -> None:  # noqa: ANN401
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.output: Output = output
        self.fingerprint = fingerprint(network.state_dict())
        """Of its weights, for the facts of what is made with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenTower":
        return self

    @property
    def shape(self) -> TowerShape:
        """What it gives for a text."""
        pooled = self.output == "pooled"
        width = self.network.output_dim if pooled else self.network.width
        return TowerShape(1 if pooled else self.tokenizer.length, width, self.tokenizer.length)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.network.token_embedding.weight.device

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
    if weights is None:
        raise UsageError(f"{name} needs its weights: {_advice(name, config, option)}")
    if not weights.is_file():
        raise DataError(f"there is no file {weights}: {_advice(name, config, option)}")
    network = _empty_tower(config)
    tensors = _text_tensors(weights, name, config)
    require_tensors(network.state_dict(), tensors, f"{weights} (as {name})")
    if odd := next((n for n, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise DataError(f"{weights}: tensor {odd} holds NaN or infinity; get the file again")
    network.load_state_dict(tensors, assign=True)
    tokenizer = open_clip_tokenizer(network.context_length, pad_with_end=pad_with_end)
    return FrozenTower(network, tokenizer, output)


def _config(name: str) -> dict[str, Any]:
    """open_clip's own config of an architecture that can be used here."""
    import_torchvision()
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=SUGGESTIONS, cutoff=0.0)
        raise UsageError(
            f"open_clip has no architecture {name!r}; the nearest are {', '.join(nearest)}"
        )
    config: dict[str, Any] = open_clip.get_model_config(name)  # pyright: ignore[reportAssignmentType]
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


def _text_tensors(path: Path, name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The text tower's tensors in a file, float32, without prefix."""
    if path.suffix != ".safetensors" and _is_torchscript(path):
        raise DataError(
            f"{path} is a TorchScript archive, a program: get the same weights as safetensors "
            f"({WEIGHTS_FILE} of timm's copies of OpenAI's models)"
        )
    tensors = read_tensors(path)
    prefix = next((prefix for prefix in PREFIXES if prefix + FIRST in tensors), None)
    if prefix is None:
        raise DataError(
            f"{path} holds no text tower by open_clip's names: none of its {len(tensors)} tensors "
            f"is called {FIRST}"
        )
    if tensors.keys() >= OPENAI_MARKS and not config.get("quick_gelu"):
        raise DataError(
            f"{path} holds OpenAI's weights, which were trained with another activation than "
            f"{name} has: take {name}-quickgelu"
        )
    own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    return {n: x.float() for n, x in own.items() if n.startswith(PARTS)}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in member for member in archive.namelist())


def _advice(name: str, config: dict[str, Any], option: str) -> str:
    """Where the weights are published, and how to pass them."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    quick = config.get("quick_gelu", False)
    entries = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    homes = [
        entry["hf_hub"].rpartition("/")
        for entry in entries
        if entry.get("hf_hub") and entry.get("quick_gelu", False) == quick
    ]
    homes.sort(key=lambda home: not home[0].startswith("laion/"))
    if not homes:
        return f"open_clip names none that are published, so give a file that you trained with {option}"
    where = " or ".join(
        f"{file or WEIGHTS_FILE} of {home}" for home, _, file in homes[:SUGGESTIONS]
    )
    return f"get {where} at huggingface.co, and give its path with {option}"
