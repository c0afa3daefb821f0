"""Generators that nobody can regenerate, and streams of experiments that are apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from groupsearch.errors import GroupSearchError
from groupsearch.randomness import (
    STREAMS,
    SecureStream,
    Streams,
    draw_words,
    make_secret,
    secret_generator,
    seeded_generator,
)

FAR = 2**32  # two seeds that differ by it differ in none of the 32 bits that torch keeps


def words(generator: torch.Generator, count: int = 1000) -> list[int]:
    return draw_words(generator, count).tolist()


def twister_state(generator: torch.Generator) -> np.ndarray:
    """The 624 words of a CPU generator's state."""
    return generator.get_state().numpy()[24 : 24 + 8 * 624].copy().view(np.uint64)


def test_torch_keeps_32_bits_of_a_seed_and_ours_all() -> None:
    assert words(torch.Generator().manual_seed(5)) == words(torch.Generator().manual_seed(5 + FAR))
    assert not set(words(seeded_generator(5, "noise"))) & set(words(seeded_generator(5 + FAR, "noise")))


def test_a_secret_generator_has_a_whole_state_of_random_words() -> None:
    """No seed of 32 bits leads there: after ``manual_seed`` every word follows from the first."""
    states = [twister_state(secret_generator()) for _ in range(8)]
    for state in states:
        assert state.max() < FAR
        follows = 1812433253 * (state[:-1] ^ (state[:-1] >> np.uint64(30))) + np.arange(1, 624, dtype=np.uint64)
        assert (follows % FAR == state[1:]).sum() < 3
    assert (
        (lambda s: 1812433253 * (s[:-1] ^ (s[:-1] >> np.uint64(30))) + np.arange(1, 624, dtype=np.uint64))(
            twister_state(torch.Generator().manual_seed(3))
        )
        % FAR
        == twister_state(torch.Generator().manual_seed(3))[1:]
    ).all(), "the test itself: that is how a seed is spread"
    assert len(np.unique(np.concatenate(states))) > 8 * 624 - 10
    bits = np.unpackbits(np.concatenate(states).astype(np.uint32).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))


def test_the_state_is_the_one_that_draws() -> None:
    """Against NumPy's Mersenne Twister at the same 624 words."""
    generator = secret_generator()
    twister = np.random.MT19937()
    twister.state = {
        "bit_generator": "MT19937",
        "state": {"key": twister_state(generator).astype(np.uint32), "pos": 624},
    }
    expected = twister.random_raw(2000).reshape(-1, 2)
    drawn = np.array(words(generator)).view(np.uint64)
    assert (drawn == (expected[:, 0] << np.uint64(32) | expected[:, 1])).all()


def test_initial_seed_tells_nothing_of_the_state() -> None:
    generator = secret_generator()
    seed = generator.initial_seed()
    for guess in (torch.Generator().manual_seed(seed), seeded_generator(seed % 2**64, "noise")):
        assert not set(words(generator)) & set(words(guess))


def test_secret_generators_differ_and_are_made_anew_in_place() -> None:
    one, other = secret_generator(), secret_generator()
    seen = [words(one), words(other)]
    assert make_secret(one.manual_seed(1)) is one
    seen += [words(one), words(torch.Generator().manual_seed(1))]
    for a, b in itertools.combinations(seen, 2):
        assert not set(a) & set(b)


def test_streams_of_a_seed_are_the_same_every_time_and_apart() -> None:
    seen = [words(seeded_generator(seed, stream)) for seed in (0, 1, 2**40) for stream in STREAMS]
    assert seen == [words(seeded_generator(seed, stream)) for seed in (0, 1, 2**40) for stream in STREAMS]
    for one, other in itertools.combinations(seen, 2):
        assert not set(one) & set(other)
        bound = 5 / np.sqrt(len(one))
        assert abs(np.corrcoef(np.array(one, dtype=float), np.array(other, dtype=float))[0, 1]) < bound


def test_streams_without_a_seed_are_never_the_same() -> None:
    free, again = Streams(None), Streams(None)
    seen = [words(streams.generator(stream)) for streams in (free, again, free) for stream in STREAMS]
    assert len({word for one in seen for word in one}) == sum(map(len, seen))
    assert free.number("weights") != again.number("weights")


def test_torchs_own_generators_draw_a_stream_for_a_while() -> None:
    before = torch.get_rng_state()
    with Streams(3).drawn_globally("dropout") as begin:
        first = torch.rand(5)
        begin()
        assert torch.equal(torch.rand(5), first)
    assert torch.equal(torch.rand(5, generator=seeded_generator(3, "dropout")), first)
    assert torch.equal(before, torch.get_rng_state())
    with Streams(None).drawn_globally("dropout") as begin:
        first = torch.rand(5)
        begin()
        assert not torch.equal(torch.rand(5), first)


def test_words_of_a_cipher_are_uniform_and_never_the_same() -> None:
    one, other = SecureStream().words(20_000), SecureStream().words(20_000)
    assert len(torch.cat([one, other]).unique()) == 40_000
    bits = np.unpackbits(one.numpy().view(np.uint8)).reshape(-1, 64)
    assert (np.abs(bits.mean(0) - 0.5) < 5 * 0.5 / np.sqrt(len(bits))).all()
    assert SecureStream().words(0).shape == (0,)


def test_a_seed_of_a_cipher_is_refused() -> None:
    with pytest.raises(GroupSearchError, match="secure=True"):
        Streams(1, secure=True)
