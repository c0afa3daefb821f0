"""Models with their data: from the text MODEL of the command line to something that can be trained."""

from groupsearch.workloads.batches import check_loss
from groupsearch.workloads.blocks import checkpoint_blocks, find_blocks
from groupsearch.workloads.catalogue import WorkloadInfo, list_workloads, load_workload
from groupsearch.workloads.workload import Data, TrainingDefaults, Workload

__all__ = [
    "Data",
    "TrainingDefaults",
    "Workload",
    "WorkloadInfo",
    "check_loss",
    "checkpoint_blocks",
    "find_blocks",
    "list_workloads",
    "load_workload",
]
