"""Random draws made alike for all examples, so that a batch and one example alone draw the same.

Every random operation of torch answers with one constant, whatever generator it is given; dropout
keeps everything and scales as it does. Python's ``random`` and numpy's global functions begin anew
at every call, so that equal calls give equal draws. Nothing is drawn from any generator meanwhile.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from statistics import NormalDist
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Constants:
    """What draws are.

    Attributes:
        uniform: a uniform number between 0 and 1; other distributions are at this quantile.
        coin: a coin that shows one with probability p does so where p is larger than this.
        seed: of Python's and numpy's generators; chosen so that their first uniform number is near ``uniform``.
    """

    uniform: float
    coin: float
    seed: int

    def __str__(self) -> str:
        return f"uniform ones {self.uniform:g}, coins one where p > {self.coin:g}"


# both Python and numpy draw a first uniform number near to the quantile from these seeds
_CHOICES = (
    Constants(0.75, 0.0, 1947),
    Constants(0.25, 0.5, 855),
    Constants(0.03, 0.03, 470),
    Constants(0.97, 0.97, 56),
)
USUAL, *OTHERS = _CHOICES
"""The usual draws, and others for parts of a model that are used at some draws only."""


@contextmanager
def alike(draws: Constants = USUAL) -> Iterator[None]:
    """Inside, draws are these. Generators are afterwards as they were.

    On fake tensors, whose draws have no values, only those of Python and numpy are.
    """
    fake = torch._guards.detect_fake_mode() is not None
    before = random.getstate(), np.random.get_state()
    mode: AbstractContextManager[Any] = _nothing() if fake else _AlikeMode(draws)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng() if not fake else _nothing())
        stack.callback(random.setstate, before[0])
        stack.callback(np.random.set_state, before[1])
        for namespace, names in ((random, _PYTHON), (np.random, _NUMPY)):
            for name in names:
                begun = _begun_anew(namespace, getattr(namespace, name), draws.seed)
                stack.enter_context(patch.object(namespace, name, begun))
        stack.enter_context(mode)
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


_PYTHON = tuple(n for n in random.__all__ if n[0].islower() and n not in ("seed", "getstate", "setstate"))
_NUMPY = tuple(
    name
    for name in np.random.__all__
    if name[0].islower() and name not in ("seed", "get_state", "set_state", "default_rng") and hasattr(np.random, name)
)
_ENOUGH = 1000


def _begun_anew(namespace: Any, function: Callable[..., Any], seed: int) -> Callable[..., Any]:
    calls = 0

    @wraps(function)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= _ENOUGH:  # who draws until something fits must come to an end
            namespace.seed(seed)
        return function(*args, **kwargs)

    return drawn


class _AlikeMode(TorchDispatchMode):
    """Answers random operations with constants."""

    def __init__(self, draws: Constants) -> None:
        super().__init__()
        self._draws = draws
        self._known: dict[Any, Callable[..., Any] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._known:
            self._known[func] = _answer_to(func)
        answer = self._known[func]
        return func(*args, **kwargs) if answer is None else answer(self._draws, func, args, kwargs)


Named = Mapping[str, Any]


def _answer_to(func: Any) -> Callable[[Constants, Any, Any, Any], Any] | None:
    """How an operation is answered; None where it draws nothing."""
    schema = getattr(func, "_schema", None)
    if schema is None or "out" in (a.name for a in schema.arguments):
        return None
    name = schema.name.removeprefix("aten::")
    if name in _MADE:
        return lambda draws, func, args, kwargs: _MADE[name](draws, _named(schema, args, kwargs))
    if name.endswith("_") and name[:-1] in _VALUES:
        return lambda draws, func, args, kwargs: args[0].copy_(_VALUES[name[:-1]](draws, _named(schema, args, kwargs)))
    if name in _VALUES:
        return lambda draws, func, args, kwargs: _VALUES[name](draws, _named(schema, args, kwargs))
    if any(a.name in _RATES for a in schema.arguments):
        return _without_dropout
    return None


_RATES = ("dropout_p", "dropout")


def _without_dropout(draws: Constants, func: Any, args: Any, kwargs: Any) -> Any:
    """An operation with dropout of its own, with none."""
    names = [a.name for a in func._schema.arguments]
    args = tuple(0.0 if name in _RATES else x for name, x in zip(names, args, strict=False))
    return func(*args, **{name: 0.0 if name in _RATES else x for name, x in kwargs.items()})


def _named(schema: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    named.update(zip((a.name for a in schema.arguments), args, strict=False))
    return {**named, **kwargs}


def _like(named: Named, value: Any) -> Tensor:
    """Of the shape of ``self`` or of ``size``, as the operation would make it."""
    own, dtype, device = named.get("self"), named.get("dtype"), named.get("device")
    if isinstance(own, Tensor):
        made = own.new_empty(own.shape, dtype=dtype, device=device)
    else:
        made = torch.empty(tuple(named["size"]), dtype=dtype, device=device)
    return made.copy_(value) if isinstance(value, Tensor) else made.fill_(value)


def _normal_quantile(draws: Constants) -> float:
    return NormalDist().inv_cdf(draws.uniform)


def _coin(draws: Constants, named: Named) -> Tensor:
    p, own = named.get("p"), named["self"]
    p = own if p is None else p
    shown = p > draws.coin
    return _like({"self": own}, shown if isinstance(shown, Tensor) else float(shown))


def _normal(draws: Constants, named: Named) -> Any:
    mean, std = named["mean"], named["std"]
    value = mean + std * _normal_quantile(draws)
    if isinstance(value, Tensor) and "self" not in named:
        return value
    return _like(named, value)


def _integer(draws: Constants, named: Named) -> Tensor:
    low = named.get("low", named.get("from")) or 0
    high = named.get("high", named.get("to"))
    if high is None:
        high = low + 2**24
    if isinstance(high, Tensor):
        return _like(named, low + (draws.uniform * (high - low)).floor().long())
    if "self" not in named and not isinstance(named.get("dtype"), torch.dtype):
        named = {**named, "dtype": torch.int64}
    return _like(named, low + int(draws.uniform * (high - low)))


def _chosen(draws: Constants, named: Named) -> Tensor:
    weights, count = named["self"], named["num_samples"]
    if named["replacement"]:
        return weights.argmax(-1, keepdim=True).expand(*weights.shape[:-1], count).contiguous()
    return weights.topk(count, -1).indices


def _dropped(draws: Constants, named: Named) -> tuple[Tensor, Tensor]:
    x, p = named["input"], named["p"]
    if named["train"] is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = float(1 - p > draws.coin)
    return x * (kept / (1 - p) if p < 1 else 0.0), torch.full_like(x, kept, dtype=torch.bool)


def _random_slopes(draws: Constants, named: Named) -> Tensor:
    """``rrelu``: leaves the slopes in ``noise`` for backward."""
    x, noise = named["self"], named["noise"]
    slope = (named["lower"] + named["upper"]) / 2
    noise.copy_(torch.where(x <= 0, slope, 1.0))
    return x * noise


_VALUES: dict[str, Callable[[Constants, Named], Any]] = {
    "bernoulli": _coin,
    "uniform": lambda d, n: _like(n, n["from"] + d.uniform * (n["to"] - n["from"])),
    "normal": _normal,
    "exponential": lambda d, n: _like(n, -math.log(1 - d.uniform) / n["lambd"]),
    "geometric": lambda d, n: _like(n, math.ceil(math.log(1 - d.uniform) / math.log(1 - n["p"])) if n["p"] < 1 else 1),
    "cauchy": lambda d, n: _like(n, n["median"] + n["sigma"] * math.tan(math.pi * (d.uniform - 0.5))),
    "log_normal": lambda d, n: _like(n, math.exp(n["mean"] + n["std"] * _normal_quantile(d))),
    "random": _integer,
}
_MADE: dict[str, Callable[[Constants, Named], Any]] = {
    "rand": lambda d, n: _like(n, d.uniform),
    "rand_like": lambda d, n: _like(n, d.uniform),
    "randn": lambda d, n: _like(n, _normal_quantile(d)),
    "randn_like": lambda d, n: _like(n, _normal_quantile(d)),
    "randint": _integer,
    "randint_like": _integer,
    "randperm": lambda d, n: torch.arange(n["n"] - 1, -1, -1, device=n.get("device")),
    "multinomial": _chosen,
    "poisson": lambda d, n: n["self"].round(),
    "binomial": lambda d, n: (n["count"] * n["prob"]).round(),
    "_standard_gamma": lambda d, n: n["self"].clone(),
    "_sample_dirichlet": lambda d, n: n["self"] / n["self"].sum(-1, keepdim=True),
    "native_dropout": _dropped,
    "rrelu_with_noise": _random_slopes,
    "rrelu_with_noise_": lambda d, n: n["self"].copy_(_random_slopes(d, n)),
}
