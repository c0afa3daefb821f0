"""Training a workload with a grouping, with differential privacy, over many steps."""

from groupsearch.training.checkpoints import Checkpoints
from groupsearch.training.loop import OnEnd, OnStep, train
from groupsearch.training.settings import CurvePoint, DivergedError, StepRecord, TrainResult, TrainSettings

__all__ = [
    "Checkpoints",
    "CurvePoint",
    "DivergedError",
    "OnEnd",
    "OnStep",
    "StepRecord",
    "TrainResult",
    "TrainSettings",
    "train",
]
