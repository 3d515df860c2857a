"""Damaged and hostile bytes in every reader: refused, quickly, and with little memory."""

import random
import resource
import time
import traceback

import pytest
from fuzz_targets import TARGETS, Target

from ldmkit.errors import LdmkitError

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
