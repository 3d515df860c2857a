"""Text as a condition: tokenizers, the transformer trained along, frozen towers, stored embeddings."""

import json
import re
import time
import zipfile
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import save_pickled
from ldmkit.conditioning import text_tower
from ldmkit.conditioning import tokenizer as tok
from ldmkit.conditioning.open_clip_weights import OPENAI_MARKS
from ldmkit.conditioning.stored_embedding import StoredConditioner, embedding_row
from ldmkit.conditioning.text import TextConditioner, _lines, _longest_line
from ldmkit.conditioning.text_tower import encode_texts, load_tower
from ldmkit.conditioning.token_transformer import TokenTransformer
from ldmkit.conditioning.tokenizer import _count_words, _words
from ldmkit.errors import DataError, UsageError
from ldmkit.interop import text_layout
from ldmkit.torchvision_import import import_torchvision

CAPTIONS = [
    f"{article} {colour} {shape} {place}"
    for article in ("a", "one", "the")
    for colour in ("red", "green", "blue", "Très grün")
    for shape in ("circle", "square", "rectangle")
    for place in ("on white", "on black", "beside 12 others!")
]
TINY = "tiny-text"


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory):
    """The package, with one small architecture more."""
    import_torchvision()
    import open_clip

    vision = {"image_size": 8, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8}
    text = {"width": 16, "heads": 2, "layers": 3, "context_length": 20}
    folder = tmp_path_factory.mktemp("architectures")
    for name, changes in {
        TINY: {},
        f"{TINY}-quickgelu": {"quick_gelu": True},
        f"{TINY}-custom": {"custom_text": True},
    }.items():
        config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text, **changes}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return open_clip


@pytest.fixture(scope="module")
def clips(open_clip):
    """Random models by name; every tensor random, so that none can be left out unnoticed."""
    torch.manual_seed(3)
    models = {}
    for name in (TINY, f"{TINY}-quickgelu", f"{TINY}-custom"):
        models[name] = open_clip.create_model(name, pretrained=None, load_weights=False).eval()
        for parameter in models[name].parameters():
            nn.init.normal_(parameter, std=0.2)
    return models


def saved(model, path):
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


@pytest.fixture
def tower(clips, tmp_path):
    return load_tower(TINY, saved(clips[TINY], tmp_path / "t.safetensors"), "last", option="--w")


# tokenizers


def trained(size=300, length=20):
    return tok.trained_tokenizer(tok.train_merges(CAPTIONS, size), length)


def spelled(merges, token):
    """The bytes behind an id, by its definition."""
    return (
        bytes([token]) if token < 256 else b"".join(spelled(merges, t) for t in merges[token - 256])
    )


def naive_merges(captions, size):
    """The algorithm as published, counting everything anew each time."""
    words = Counter(word for caption in captions for word in tok._words(caption))
    ids = {word: list(word.encode()) for word in words}
    merges = []
    while len(merges) < size - tok.SMALLEST_VOCABULARY:
        counts = Counter()
        for word, number in words.items():
            for pair in zip(ids[word], ids[word][1:], strict=False):
                counts[pair] += number
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        for word, old in ids.items():
            new, at = [], 0
            while at < len(old):
                hit = tuple(old[at : at + 2]) == best
                new.append(256 + len(merges) if hit else old[at])
                at += 1 + hit
            ids[word] = new
        merges.append(best)
    return tuple(merges)


def test_open_clip_rows_equal_its_own_tokenizer(open_clip):
    texts = [*CAPTIONS, "", "a <End_of_text> b, don't", "  Ünïcode &amp; 12 x 34 🙂", "word " * 100]
    ours = tok.open_clip_tokenizer()
    rows = torch.stack([tok.caption_row(text, ours, allow_empty=True) for text in texts])
    assert torch.equal(rows, open_clip.get_tokenizer("ViT-B-32")(texts))
    assert ours.size == 49_408
    assert rows.shape[1] == 77


def test_stable_diffusion_1_pads_with_the_end_token():
    zero, end = tok.open_clip_tokenizer(8), tok.open_clip_tokenizer(8, pad_with_end=True)
    first, second = (tok.caption_row("a cat", t).tolist() for t in (zero, end))
    assert first[:4] == second[:4]
    assert first[4:] == [0] * 4
    assert second[4:] == [49_407] * 4


@given(st.lists(st.text(alphabet="ab c", max_size=12), max_size=8), st.integers(259, 290))
def test_training_equals_the_algorithm_done_slowly(captions, size):
    assert tok.train_merges(captions, size) == naive_merges(captions, size)


def test_training_on_captions_equals_the_algorithm_done_slowly_in_any_order():
    merges = tok.train_merges(CAPTIONS, 400)
    assert merges == naive_merges(CAPTIONS, 400)
    assert merges == tok.train_merges(CAPTIONS[::-1], 400)
    assert len(merges) > 50


@given(st.text(max_size=60))
def test_no_text_is_lost_by_a_trained_vocabulary(text):
    merges = tok.train_merges(CAPTIONS, 320)
    ids = tok.trained_tokenizer(merges).pieces(text)
    clean = " ".join(tok.unicodedata.normalize("NFC", text).lower().split())
    assert b"".join(spelled(merges, i) for i in ids).decode().removeprefix(" ") == clean


def test_a_vocabulary_survives_json_and_shortens_captions():
    merges = tok.train_merges(CAPTIONS, 400)
    again = tok.trained_tokenizer(json.loads(json.dumps(merges)))
    fresh = tok.trained_tokenizer(merges)
    assert [again.pieces(c) for c in CAPTIONS] == [fresh.pieces(c) for c in CAPTIONS]
    assert fresh.pieces("red circle") == fresh.pieces(" RED   circle\n")
    assert len(fresh.pieces("a red circle on white")) == 5
    assert fresh.size == 259 + len(merges)


def test_rows_have_start_end_and_padding_and_keep_the_end_when_cut():
    tokenizer = trained(length=8)
    row = tok.caption_row("a red circle", tokenizer).tolist()
    assert (row[0], row[-1]) == (tokenizer.start, tokenizer.pad)
    used = tok.count_tokens("a red circle", tokenizer)
    assert row[used - 1] == tokenizer.end
    assert set(row[used:]) == {tokenizer.pad}
    long = "a red circle beside 12 others! " * 3
    assert tok.count_tokens(long, tokenizer) > tokenizer.length
    assert tok.caption_row(long, tokenizer)[-1] == tokenizer.end
    assert max(tokenizer.start, tokenizer.end, tokenizer.pad) == tokenizer.size - 1


@pytest.mark.parametrize("make", [trained, tok.open_clip_tokenizer])
@pytest.mark.parametrize(
    ("caption", "part"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        (7, "must be text"),
        (b"a cat", "must be text"),
        ("x" * 10_001, "10,001 characters"),
        ("a \ud83d cat", "not Unicode"),
    ],
)
def test_bad_captions_are_one_sentence(make, caption, part):
    with pytest.raises(ValueError, match=part) as caught:
        tok.caption_row(caption, make())
    assert "\n" not in str(caught.value)


def test_the_empty_caption_is_the_null_where_it_is_allowed():
    tokenizer = trained(length=5)
    row = tok.caption_row("  ", tokenizer, allow_empty=True)
    assert row.tolist() == [tokenizer.start, tokenizer.end, *[tokenizer.pad] * 3]
    assert torch.equal(row, tok.empty_row(tokenizer))


@pytest.mark.parametrize(
    ("merges", "part"),
    [
        ([[97, 256]], "below 256"),
        ([[97]], "merge 0"),
        ([[-1, 5]], "below"),
        ([[1, 2], [1, 2]], "twice"),
    ],
)
def test_a_broken_vocabulary_is_refused(merges, part):
    with pytest.raises(ValueError, match=part):
        tok.trained_tokenizer(merges)


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="259"):
        tok.train_merges(CAPTIONS, 258)


@pytest.mark.parametrize("make", [trained, tok.open_clip_tokenizer])
def test_the_longest_word_takes_no_time(make):
    tokenizer = make()
    start = time.perf_counter()
    tok.caption_row("ab" * 5_000, tokenizer)
    assert time.perf_counter() - start < 10


# the transformer trained along


def build(width=32, heads=4, head_width=8):
    torch.manual_seed(0)
    tokenizer = trained(length=12)
    empty = tok.empty_row(tokenizer).tolist()
    conditioner = TextConditioner(
        tokenizer.size, empty, width, depth=3, heads=heads, head_width=head_width
    )
    for parameter in conditioner.parameters():
        nn.init.normal_(parameter, std=0.3)
    rows = torch.stack([tok.caption_row(caption, tokenizer) for caption in CAPTIONS[:6]])
    return conditioner, rows


def test_the_transformer_and_its_gradients_equal_torchs_encoder():
    conditioner, ids = build()
    ours: Any = conditioner.transformer
    layer = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    theirs: Any = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(32), enable_nested_tensor=False)
    pairs: list[tuple[Any, Any]] = [(ours.norm, theirs.norm)]
    with torch.no_grad():
        for mine, other in zip(ours.blocks, theirs.layers, strict=True):
            attention = mine.attention
            fused = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
            other.self_attn.in_proj_weight.copy_(torch.cat(fused))
            nn.init.zeros_(other.self_attn.in_proj_bias)
            pairs += [
                (attention.to_out, other.self_attn.out_proj),
                (mine.norm1, other.norm1),
                (mine.norm2, other.norm2),
                (mine.expand, other.linear1),
                (mine.contract, other.linear2),
            ]
        for mine, other in pairs:
            other.weight.copy_(mine.weight)
            other.bias.copy_(mine.bias)
    embedded = (ours.token_embedding(ids) + ours.position_embedding.weight[:12]).detach()
    embedded.requires_grad_(True)
    expected, found = theirs(embedded), ours(ids)
    assert (expected - found).abs().max() < 1e-5
    weight = torch.randn_like(found)
    ((expected * weight).mean()).backward()
    ((found * weight).mean()).backward()
    for mine, other in pairs:
        assert torch.allclose(mine.weight.grad, other.weight.grad, atol=1e-5)
        assert torch.allclose(mine.bias.grad, other.bias.grad, atol=1e-5)
    for mine, other in zip(ours.blocks, theirs.layers, strict=True):
        grads = [
            p.weight.grad for p in (mine.attention.to_q, mine.attention.to_k, mine.attention.to_v)
        ]
        assert torch.allclose(torch.cat(grads), other.self_attn.in_proj_weight.grad, atol=1e-5)
    positions = embedded.grad.sum(0)
    assert torch.allclose(positions, ours.position_embedding.weight.grad, atol=1e-5)


def original_state(vocabulary=30, length=9, width=24, depth=2, heads=2):
    """A checkpoint as the published code writes it; heads of 64 are wider than the tokens."""
    torch.manual_seed(1)
    inner = heads * 64
    shapes = {"token_emb.weight": (vocabulary, width), "pos_emb.emb.weight": (length, width)}
    for at in range(0, 2 * depth, 2):
        attention, feed = f"attn_layers.layers.{at}", f"attn_layers.layers.{at + 1}"
        for norm in (attention, feed):
            shapes |= {f"{norm}.0.weight": (width,), f"{norm}.0.bias": (width,)}
        shapes |= {f"{attention}.1.to_{part}.weight": (inner, width) for part in "qkv"}
        shapes |= {
            f"{attention}.1.to_out.weight": (width, inner),
            f"{attention}.1.to_out.bias": (width,),
        }
        shapes |= {
            f"{feed}.1.net.0.0.weight": (4 * width, width),
            f"{feed}.1.net.0.0.bias": (4 * width,),
        }
        shapes |= {f"{feed}.1.net.2.weight": (width, 4 * width), f"{feed}.1.net.2.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"to_logits.weight": (vocabulary, width), "to_logits.bias": (vocabulary,)}
    state = {f"cond_stage_model.transformer.{k}": torch.randn(s) * 0.2 for k, s in shapes.items()}
    return state | {"model.diffusion_model.out.2.weight": torch.ones(1)}


def original_forward(state, ids, depth, heads):
    """The published forward pass, written down from its own names."""
    own = {k.removeprefix("cond_stage_model.transformer."): v for k, v in state.items()}

    def normed(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * own[f"{name}.weight"] + own[f"{name}.bias"]

    x = own["token_emb.weight"][ids] + own["pos_emb.emb.weight"][: ids.shape[1]]
    for block in range(depth):
        at, ff = f"attn_layers.layers.{2 * block}", f"attn_layers.layers.{2 * block + 1}"
        y = normed(x, f"{at}.0")
        q, k, v = (
            (y @ own[f"{at}.1.to_{part}.weight"].T).unflatten(-1, (heads, 64)) for part in "qkv"
        )
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 8).softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
        x = x + mixed @ own[f"{at}.1.to_out.weight"].T + own[f"{at}.1.to_out.bias"]
        y = normed(x, f"{ff}.0") @ own[f"{ff}.1.net.0.0.weight"].T + own[f"{ff}.1.net.0.0.bias"]
        x = x + F.gelu(y) @ own[f"{ff}.1.net.2.weight"].T + own[f"{ff}.1.net.2.bias"]
    return normed(x, "norm")


def test_a_published_checkpoint_computes_the_same_by_our_names():
    state = original_state()
    shape, tensors = text_layout.from_original(state, "x.ckpt")
    assert shape == (30, 9, 24, 2, 2, 64)
    model = TokenTransformer(
        shape.vocabulary,
        shape.length,
        shape.width,
        depth=shape.depth,
        heads=shape.heads,
        head_width=shape.head_width,
    )
    model.load_state_dict(tensors)
    ids = torch.randint(30, (3, 9))
    assert (model(ids) - original_forward(state, ids, 2, 2)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"attn_layers.layers.1.1.net.2.bias": None}, "lacks tensor .*net.2.bias"),
        ({"pos_emb.emb.weight": None}, "lacks tensor .*pos_emb"),
        ({"attn_layers.layers.0.1.mem_k": (3,)}, "unknown tensor .*mem_k"),
        ({"attn_layers.layers.0.1.to_k.weight": (64, 24)}, r"to_k.weight has shape \[64, 24\]"),
        ({"attn_layers.layers.0.1.to_q.weight": (70, 24)}, "70 rows"),
        ({"token_emb.weight": (30,)}, "no matrix"),
        ({"token_emb.weight": None}, "holds no trained text transformer"),
    ],
)
def test_another_layout_is_refused_by_name(change, part):
    state = original_state()
    for name, shape in change.items():
        full = f"cond_stage_model.transformer.{name}"
        state.pop(full, None)
        if shape is not None:
            state[full] = torch.zeros(shape)
    with pytest.raises(DataError, match=part):
        text_layout.from_original(state, "x.ckpt")


def test_the_papers_text_model_has_its_published_size():
    with torch.device("meta"):
        model = TokenTransformer(30_522, 77, 1280, depth=32)
    per_block = 3 * 1280 * 512 + 512 * 1280 + 1280 + 2 * 4 * 1280**2 + 5 * 1280 + 4 * 1280
    total = (30_522 + 77) * 1280 + 32 * per_block + 2 * 1280
    assert sum(p.numel() for p in model.parameters()) == total


# the protocol, for all three


def protocol_cases(tower):
    conditioner, rows = build()
    yield conditioner, rows
    for width in (16, 24):
        stored = StoredConditioner(20, 16, width)
        stored.set_empty(encode_texts(tower, [""], 1)[0])
        yield stored, encode_texts(tower, CAPTIONS[:6], 4)


def test_conditioners_keep_to_the_protocol(tower):
    for conditioner, values in protocol_cases(tower):
        with torch.no_grad():
            tokens = conditioner(values).tokens
            order = torch.tensor([3, 0, 5, 1, 2, 4])
            assert torch.allclose(conditioner(values[order]).tokens, tokens[order], atol=1e-5)
            assert torch.allclose(conditioner(values[:1]).tokens, tokens[:1], atol=1e-5)
            nothing = conditioner.empty(values)
            assert (nothing.shape, nothing.dtype) == (values.shape, values.dtype)
            null = conditioner(nothing).tokens
            assert torch.equal(null[0], null[1])
            drop = torch.tensor([True, False, False, True, False, False])
            shape = [-1] + [1] * (values.ndim - 1)
            mixed = conditioner(torch.where(drop.view(shape), nothing, values)).tokens
            assert torch.allclose(mixed[drop], null[drop], atol=1e-5)
            assert torch.allclose(mixed[~drop], tokens[~drop], atol=1e-5)
            assert (tokens - null).abs().amax((1, 2)).min() > 1e-2


def test_a_captions_words_and_their_order_matter():
    conditioner, _ = build()
    tokenizer = trained(length=12)
    texts = ["red circle blue square", "blue circle red square", "red circle blue circle"]
    with torch.no_grad():
        rows = torch.stack([tok.caption_row(text, tokenizer) for text in texts])
        first, *others = conditioner(rows).tokens
    assert all((first - other).abs().max() > 1e-2 for other in others)


def test_the_transformer_learns_what_captions_say():
    torch.manual_seed(0)
    tokenizer = trained(length=16)
    empty = tok.empty_row(tokenizer).tolist()
    conditioner = TextConditioner(tokenizer.size, empty, 16, depth=1, heads=2, head_width=8)
    rows = torch.stack([tok.caption_row(caption, tokenizer) for caption in CAPTIONS])
    colours = ("red", "green", "blue", "Très")
    wanted = torch.tensor([[colour in caption for colour in colours] for caption in CAPTIONS])
    optimizer = torch.optim.Adam(conditioner.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.mse_loss(conditioner(rows).tokens.mean(1)[:, :4], wanted.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        said = conditioner(rows).tokens.mean(1)[:, :4]
    shuffled = wanted[torch.randperm(len(wanted))].float()
    assert F.mse_loss(said, wanted.float()) < 0.1 * F.mse_loss(said, shuffled)


# frozen towers


@pytest.mark.parametrize("name", [TINY, f"{TINY}-quickgelu", f"{TINY}-custom"])
def test_a_tower_equals_open_clip(clips, open_clip, tmp_path, name):
    path = saved(clips[name], tmp_path / "w.safetensors")
    ids = open_clip.get_tokenizer(name)(CAPTIONS[:8])
    with torch.no_grad():
        expected = clips[name].encode_text(ids)
        text = getattr(clips[name], "text", clips[name])
        x = text.token_embedding(ids) + text.positional_embedding
        layers = []
        for block in text.transformer.resblocks:
            x = block(x, attn_mask=text.attn_mask)
            layers.append(text.ln_final(x))
    wanted = {"last": layers[-1], "penultimate": layers[-2], "pooled": expected[:, None]}
    for output in get_args(text_tower.Output):
        found = load_tower(name, path, output, option="--w")
        embeddings = encode_texts(found, CAPTIONS[:8], 3)
        assert (embeddings - wanted[output]).abs().max() < 1e-5
        assert embeddings.shape[1:] == found.shape[:2]
        assert not embeddings.requires_grad


@pytest.mark.parametrize("prefix", ["module.", "cond_stage_model.model."])
def test_towers_come_out_of_checkpoints_of_other_kinds(clips, tmp_path, tower, prefix):
    state = {prefix + name: tensor.half() for name, tensor in clips[TINY].state_dict().items()}
    path = tmp_path / "epoch_1.pt"
    save_pickled(path, {"state_dict": state, "epoch": 1})
    found = load_tower(TINY, path, "last", option="--w")
    difference = encode_texts(found, CAPTIONS[:3], 3) - encode_texts(tower, CAPTIONS[:3], 3)
    assert difference.abs().max() < 0.05


def test_loading_a_tower_draws_no_random_number(clips, tmp_path):
    path = saved(clips[TINY], tmp_path / "w.safetensors")
    before = torch.get_rng_state()
    load_tower(TINY, path, "last", option="--w")
    assert torch.equal(before, torch.get_rng_state())


def test_a_missing_weight_file_is_a_sentence_that_names_it(tmp_path):
    with pytest.raises(UsageError) as caught:
        load_tower("ViT-H-14", None, "penultimate", option="--text-encoder-weights")
    sentence = str(caught.value)
    assert sentence.startswith(
        "ViT-H-14 needs its weights: get open_clip_model.safetensors of "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K or "
    )
    assert sentence.endswith(" at huggingface.co, and give its path with --text-encoder-weights")
    with pytest.raises(UsageError, match=r"pytorch_model.bin of jienengchen/ViTamin-S "):
        load_tower("ViTamin-S", None, "last", option="--w")
    with pytest.raises(UsageError, match="a file that you trained with --w"):
        load_tower("ViT-e-14", None, "last", option="--w")
    with pytest.raises(
        DataError, match=r"no file .*nowhere.*timm/vit_large_patch14_clip_224.openai"
    ):
        load_tower("ViT-L-14-quickgelu", tmp_path / "nowhere.pt", "last", option="--w")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ViT-H14", "nearest are .*ViT-H-14"),
        ("roberta-ViT-B-32", "roberta-base"),
        ("ViT-B-16-SigLIP", "not supported"),
        ("coca_ViT-B-32", "captions"),
    ],
)
def test_architectures_that_cannot_be_used_are_refused(name, part):
    with pytest.raises(UsageError, match=part):
        load_tower(name, None, "last", option="--w")


def test_the_shapes_of_stable_diffusions_towers():
    for name, width, pooled in (
        ("ViT-L-14-quickgelu", 768, 768),
        ("ViT-H-14", 1024, 1024),
        ("RN50x64", 1024, 1024),
    ):
        network = text_tower._empty_tower(text_tower._config(name))
        assert (network.context_length, network.width, network.output_dim) == (77, width, pooled)


def test_every_architecture_that_is_taken_can_be_built_and_has_its_stated_shape(open_clip):
    seen = set()
    published = {
        name for name in open_clip.list_models() if not name.startswith("tiny")
    }  # of tests
    for name in sorted(published):
        text = json.dumps(open_clip.get_model_config(name)["text_cfg"])
        if text in seen:
            continue
        seen.add(text)
        try:
            config = text_tower._config(name)
        except UsageError:
            continue
        network = text_tower._empty_tower(config)
        rows = tok.open_clip_tokenizer(network.context_length)
        assert network.vocab_size == rows.size, name
        assert network.output_dim == config["embed_dim"], name
        assert network.width == config["text_cfg"].get("width", 512), name
    assert len(seen) > 20


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"ln_final.bias": None}, "lacks tensor ln_final.bias"),
        ({"transformer.resblocks.3.ln_1.weight": torch.ones(16)}, "unknown tensor .*resblocks.3"),
        ({"text_projection": torch.ones(16, 13)}, r"shape \[16, 13\]"),
        ({"ln_final.bias": torch.full((16,), torch.nan)}, "ln_final.bias holds NaN"),
        ({"token_embedding.weight": None}, "holds no text tower"),
        ({name: torch.ones(()) for name in OPENAI_MARKS}, f"take {TINY}-quickgelu"),
    ],
)
def test_other_weights_are_refused_by_name(clips, tmp_path, change, part):
    state = {name: tensor.clone() for name, tensor in clips[TINY].state_dict().items()}
    state = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(DataError, match=part):
        load_tower(TINY, path, "last", option="--w")


def test_a_program_is_no_weight_file(tmp_path, clips):
    path = tmp_path / "ViT-B-32.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ViT-B-32/code/__torch__.py", "")
        archive.writestr("ViT-B-32/data.pkl", b"")
    with pytest.raises(DataError, match="TorchScript"):
        load_tower(TINY, path, "last", option="--w")


# stored embeddings


def test_stored_embeddings_go_through_a_projection_where_the_widths_differ(tower):
    embeddings = encode_texts(tower, [*CAPTIONS[:2], ""], 3)
    plain, projected = StoredConditioner(20, 16, 16), StoredConditioner(20, 16, 24)
    assert torch.equal(plain(embeddings).tokens, embeddings)
    weight, bias = (projected.get_parameter(f"projection.{name}") for name in ("weight", "bias"))
    assert torch.allclose(projected(embeddings).tokens, embeddings @ weight.T + bias, atol=1e-6)
    plain.set_empty(embeddings[-1])
    assert torch.equal(plain(plain.empty(embeddings)).tokens[0], embeddings[-1])


def test_the_empty_embedding_is_saved_and_cannot_be_forgotten():
    conditioner = StoredConditioner(2, 3, 3)
    values = torch.zeros(4, 2, 3, dtype=torch.float16)
    assert conditioner(conditioner.empty(values)).tokens.isnan().all()
    conditioner.set_empty(torch.ones(2, 3))
    assert conditioner.empty(values).dtype == torch.float16
    assert torch.equal(conditioner(conditioner.empty(values)).tokens, torch.ones(4, 2, 3))
    assert list(conditioner.state_dict()) == ["empty_embedding"]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (np.zeros((3, 3), np.float32), r"\[2, 3\] is needed"),
        (np.zeros((2, 3), np.int64), "floating point"),
        (np.full((2, 3), np.inf, np.float16), "NaN or infinity"),
    ],
)
def test_bad_embeddings_are_one_sentence(value, part):
    with pytest.raises(ValueError, match=part):
        embedding_row(value, 2, 3)


def test_no_text_gives_no_embedding(tower):
    assert encode_texts(tower, [], 4).shape == (0, 20, 16)


@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
def test_words_are_counted_as_each_caption_is_cut(captions):
    proper = [text for text in captions if not re.search("[\ud800-\udfff]", text)]
    assert _count_words(proper) == Counter(word for text in proper for word in _words(text))


def test_the_longest_line_and_what_is_silent_are_those_of_all_captions():
    texts = ["a\nbbbb", "", "\n\n", "cc\n\u2028ddddd\n", " ", "ddd"]
    assert _longest_line(texts) == max(
        (line for text in texts for line in text.splitlines()), key=len
    )
    assert [bool(_lines(text)) for text in texts] == [True, False, False, True, True, True]
    assert _longest_line([]) == ""
