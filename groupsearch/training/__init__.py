"""Training a workload with a grouping, with differential privacy, over many steps."""

from groupsearch.training.loop import CurvePoint, DivergedError, OnStep, TrainResult, train
from groupsearch.training.settings import TrainSettings

__all__ = ["CurvePoint", "DivergedError", "OnStep", "TrainResult", "TrainSettings", "train"]
