"""Where random numbers come from: the operating system, so that nobody can draw them again, or a seed.

Noise hides an example from whoever cannot take the noise away, so all that privacy rests on is secret unless a seed
is given, and a seed is for experiments alone: epsilon then holds for nobody who knows it. The streams of a run
(:data:`STREAMS`) are apart from each other either way.

How much there is to guess: a generator on the CPU is a Mersenne Twister, and all of its 19,937 bits are filled
(``manual_seed`` and ``seed()`` of torch fill 32: seeds 2^32 apart give the same numbers, and all can be tried in
hours). One on a GPU is Philox, whose key has 64 bits, and all of them are used. Neither is a cipher: who sees 624
numbers of a Mersenne Twister in a row knows the others. Nobody sees noise itself, but its sum with what it hides;
where that is not good enough, :class:`SecureStream` is a cipher.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from groupsearch.errors import GroupSearchError

STREAMS = ("weights", "sampling", "noise", "dropout", "workers")
"""What draws random numbers in a run, each from a stream of its own."""

_TWISTER_WORDS = 624
_TWISTER_BYTES = 5056  # of torch's own form of a state: seed, position, words of 8 bytes, leftovers of normal draws
_WORDS_AT = 24
_LOWEST = -(2**63)

Bytes = Callable[[int], bytes]


class SecureStream:
    """Random numbers of OpenSSL's generator: AES-256 in counter mode (NIST SP 800-90A), seeded by the system.

    Whoever sees some of its numbers can tell nothing of the others. It has no state to be saved or restored, so
    nothing that it drew can be drawn again. It runs on the CPU; numbers for another device are copied there.

    Args:
        device: where the numbers are wanted.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def words(self, count: int) -> Tensor:
        """Independent random 64-bit words, int64 (count,)."""
        drawn = torch.frombuffer(bytearray(ssl.RAND_bytes(8 * max(count, 1))), dtype=torch.int64)
        return drawn[:count].to(self.device)


Source = torch.Generator | SecureStream


def draw_words(source: Source, count: int) -> Tensor:
    """The next independent 64-bit words of a source, int64 (count,), on its device: all bits are random."""
    if isinstance(source, SecureStream):
        return source.words(count)
    words = torch.empty(count, dtype=torch.int64, device=source.device)
    return words.random_(_LOWEST, None, generator=source)


def secret_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that the operating system's entropy fills: 19,937 bits of it on the CPU, 64 on a GPU.

    Its ``initial_seed()`` is a random number that says nothing of its state.
    """
    return make_secret(torch.Generator(device))


def source_of(device: torch.device | str, generator: torch.Generator | None, secure: bool) -> Source:
    """What noise or sampling draws from: what was asked for, else a secret generator.

    Raises:
        GroupSearchError: for a generator where a cipher is asked for.
    """
    if secure and generator is not None:
        raise GroupSearchError(
            "Found a generator and secure=True, which draws from a cipher of its own. Give the one or the other."
        )
    if secure:
        return SecureStream(device)
    return secret_generator(device) if generator is None else generator


def make_secret(generator: torch.Generator) -> torch.Generator:
    """Fill a generator anew from the operating system; what it draws from now on has nothing to do with the past."""
    return _fill(generator, os.urandom)


def seeded_generator(seed: int | Sequence[int], stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one stream of an experiment: the same numbers for the same seed and stream, and no others'.

    Seeds that differ give streams that have nothing to do with each other, seeds 2^32 apart, too; so do the streams
    of one seed. On the CPU the whole state is filled.

    Args:
        seed: not negative, of any size; or several.
        stream: one of :data:`STREAMS`.
        device: where it draws.
    """
    return _fill(torch.Generator(device), _seeded_bytes(seed, stream))


def secret_rng() -> np.random.Generator:
    """NumPy's generator from 128 bits of the operating system's entropy."""
    return np.random.default_rng()


class Streams:
    """The streams of one run, apart from each other: secret without a seed, and with one the same every time.

    Attributes:
        seed: of the experiment; None where everything is secret.
        secure: whether what privacy rests on, noise and sampling, comes from a :class:`SecureStream`.

    Raises:
        GroupSearchError: for a seed of a secure run: there is no such thing.
    """

    def __init__(self, seed: int | None, secure: bool = False) -> None:
        if secure and seed is not None:
            raise GroupSearchError(
                f"Found the seed {seed} and secure=True: a cipher's noise is never had again. Give either."
            )
        self.seed = seed
        self.secure = secure

    def describe(self) -> dict[str, bool | int | None]:
        """What a document says of it: ``secret``, ``secure`` and ``seed``; nothing that a secret could be had from."""
        return {"secret": self.seed is None, "secure": self.secure, "seed": self.seed}

    def generator(self, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A new generator at the beginning of a stream."""
        if self.seed is None:
            return secret_generator(device)
        return seeded_generator(self.seed, stream, device)

    def number(self, stream: str) -> int:
        """A seed of 32 bits, which is what every library takes, for what a secret does not rest on."""
        take = os.urandom if self.seed is None else _seeded_bytes(self.seed, stream)
        return int.from_bytes(take(4), "little")

    @contextmanager
    def drawn_globally(self, stream: str, devices: Iterable[torch.device] = ()) -> Iterator[Callable[[], None]]:
        """Inside, torch's own generators draw a stream, on the CPU and on these CUDA devices; afterwards as before.

        Yields:
            what takes them back to the stream's beginning, or to another where it is secret.
        """
        cuda = [device for device in devices if device.type == "cuda"]

        def begin() -> None:
            torch.set_rng_state(self.generator(stream).get_state())
            for device in cuda:
                torch.cuda.set_rng_state(self.generator(stream, device).get_state(), device)

        with torch.random.fork_rng(cuda):
            begin()
            yield begin


def _fill(generator: torch.Generator, take: Bytes) -> torch.Generator:
    """Put a generator where these bytes say, leaving none of them out."""
    if generator.device.type != "cpu":
        return generator.manual_seed(int.from_bytes(take(8), "little"))
    with _disable_current_modes():  # a state is real, also where the tensors around it are fake
        state = torch.Generator("cpu").get_state().numpy()
        if state.nbytes != _TWISTER_BYTES:
            raise GroupSearchError(
                f"Expected a CPU generator whose state has {_TWISTER_BYTES} bytes, found {state.nbytes}: this torch "
                f"{torch.__version__} keeps it in a form that is not known here. Use another version of torch."
            )
        drawn = np.frombuffer(take(8 + 4 * _TWISTER_WORDS), dtype=np.uint8)
        state[:8] = drawn[:8]  # what initial_seed() says; the words below do not depend on it
        words = state[_WORDS_AT : _WORDS_AT + 8 * _TWISTER_WORDS].view(np.uint64)
        words[:] = drawn[8:].view(np.uint32)
        generator.set_state(torch.from_numpy(state))
    return generator


def _seeded_bytes(seed: int | Sequence[int], stream: str) -> Bytes:
    """So many bytes that a seed and a stream's name decide; the same from the beginning at every call."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS.index(stream),))
    return lambda count: sequence.generate_state(-(-count // 4), np.uint32).tobytes()[:count]
