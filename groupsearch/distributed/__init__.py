"""Training on several machines: processes that torchrun started, and methods that clip what each worker sends."""

from groupsearch.distributed.clip21 import METHODS, Setup, Trajectory, simulate
from groupsearch.distributed.workers import ClippedWorkers

__all__ = ["METHODS", "ClippedWorkers", "Setup", "Trajectory", "simulate"]
