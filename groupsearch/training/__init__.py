"""Training a workload with a grouping, with differential privacy, over many steps."""

from groupsearch.training.loop import OnStep, train
from groupsearch.training.result import CurvePoint, DivergedError, TrainResult
from groupsearch.training.settings import TrainSettings

__all__ = ["CurvePoint", "DivergedError", "OnStep", "TrainResult", "TrainSettings", "train"]
