"""Damaged and hostile bytes in every reader: refused, quickly, and with little memory."""

import random
import resource
import time
import traceback

import pytest
from fuzz_targets import TARGETS, Target, unsealed

from ldmkit.configs import TrainDiffusionConfig
from ldmkit.errors import LdmkitError
from ldmkit.options import resolve

SHORT, FULL = 250, 10_000
MAX_SECONDS, MAX_BYTES = 1.0, 512 << 20


def mutated(target: Target, draw: random.Random) -> bytes:
    """A seed with some pieces changed, doubled, left out or put in."""
    data = bytearray(draw.choice(target.seeds))
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        place = draw.randrange(len(data) + 1)
        length = draw.choice((1, 2, 8, 60))
        action = draw.randrange(7)
        if action == 0 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif action == 1 and place < len(data):
            data[place] = draw.choice((0, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif action == 2:
            data[place:place] = draw.choice(target.words)
        elif action == 3:
            data[place : place + length] = draw.choice(target.words)
        elif action == 4:
            del data[place : place + length]
        elif action == 5:
            data[place:place] = data[place : place + length] * draw.choice((1, 2, 50))
        elif draw.random() < 0.3:
            del data[place:]
    return bytes(data)


def attack(name: str, count: int) -> tuple[int, list[str], float]:
    """How many inputs were refused, what broke, and the longest time one took (CPU seconds)."""
    target, draw = TARGETS[name], random.Random(name)
    refused, broken, longest = 0, [], 0.0
    for _ in range(count):
        data = mutated(target, draw)
        started = time.process_time()
        try:
            target.read(data)
        except LdmkitError:
            refused += 1
        except BaseException:
            broken.append(f"{data[:3000]!r}\n{traceback.format_exc()[-1500:]}")
        longest = max(longest, time.process_time() - started)
    return refused, broken, longest


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", TARGETS)
def test_readers_refuse_what_they_do_not_understand(name):
    for seed in TARGETS[name].seeds:
        TARGETS[name].read(seed)
    before = peak_bytes()
    refused, broken, longest = attack(name, SHORT)
    assert broken == []
    assert name == "captions" or refused or name == "config"  # these list problems instead
    assert longest < MAX_SECONDS
    assert peak_bytes() - before < MAX_BYTES


def with_header(block: bytes, old: bytes, new: bytes) -> bytes:
    """A message whose header says something else in one place."""
    length = int.from_bytes(block[:8], "little")
    header = block[8 : 8 + length]
    assert header.count(old) == 1
    changed = header.replace(old, new)
    return len(changed).to_bytes(8, "little") + changed + block[8 + length :]


@pytest.mark.parametrize(
    "new",
    [b'"seed": {"dtype": "I64"}, "seed": {', b'"seed": {"more": 1, "more": 2, '],
    ids=["tensor", "field"],
)
def test_a_header_that_says_a_thing_twice_is_refused(new):
    """Found by the fuzzer: JSON readers differ in which of two values they take."""
    plain = unsealed(TARGETS["stream"].seeds[0])
    TARGETS["stream"].read(plain)
    with pytest.raises(LdmkitError, match="header not understood"):
        TARGETS["stream"].read(with_header(plain, b'"seed": {', new))


def test_what_safetensors_alone_refuses_is_a_sentence():
    plain = unsealed(TARGETS["stream"].seeds[0])
    with pytest.raises(LdmkitError, match="header not understood"):
        TARGETS["stream"].read(with_header(plain, b'"shape": [18]', b'"shape": ["18"]'))


def test_a_list_that_is_too_short_is_a_sentence(tmp_path):
    """Found by the fuzzer, in a file, where its parts are numbers."""
    file = tmp_path / "c.toml"
    file.write_text("betas = [0.9]\n")
    with pytest.raises(LdmkitError, match=r"--betas: too few values \(got 0.9\)"):
        resolve("train-diffusion", TrainDiffusionConfig, None, file, {})


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", TARGETS)
def test_ten_thousand_inputs_break_no_reader(name, capsys):
    before = peak_bytes()
    refused, broken, longest = attack(name, FULL)
    grown = peak_bytes() - before
    with capsys.disabled():
        print(
            f"\n{name}: {FULL} inputs, {refused} refused, {len(broken)} broke, longest "
            f"{longest * 1000:.0f} ms, memory grew by {grown >> 20} MiB"
        )
    assert broken == []
    assert longest < MAX_SECONDS
    assert grown < MAX_BYTES
