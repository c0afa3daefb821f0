"""Methods of PEFT, each against one example at a time."""

from __future__ import annotations

import pytest
import torch

from groupsearch.errors import UnsupportedModelError
from groupsearch.tracer.sites import observe_sites
from tests.support.adapters import ADAPTERS, Adapter
from tests.support.architecture_table import judge

pytestmark = pytest.mark.filterwarnings("ignore")
REFUSED = {
    "Lily": "depends on the others",  # a mean of the router's probabilities over the batch
    "OFT": "each example has a parameter of its own",  # at as many blocks as examples
    "CPT": "",
    "SHiRA": "not on tensors without values",  # which know no sparse ones: its sums are right, its memory is not traced
}
QUICK = {"LoRA", "FourierFT", "Prompt tuning", "P-tuning", "Prefix tuning"}


@pytest.mark.parametrize("adapter", [a for a in ADAPTERS if a.name in QUICK], ids=lambda a: a.name)
def test_a_sample_is_right(adapter: Adapter) -> None:
    verdict = judge(adapter)
    assert verdict.outcome == "right", verdict


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [a for a in ADAPTERS if a.name not in QUICK], ids=lambda a: a.name)
def test_every_other_one_is_right_or_refused_by_name(adapter: Adapter) -> None:
    verdict = judge(adapter)
    if adapter.name in REFUSED:
        assert verdict.outcome == "refused", verdict
        assert REFUSED[adapter.name] in verdict.says
    else:
        assert verdict.outcome == "right", verdict


def test_a_parameter_with_a_hook_on_its_gradient_is_refused_by_name() -> None:
    adapter = next(a for a in ADAPTERS if a.name == "CPT")
    model, batch = adapter.model(torch.float32), adapter.batch(torch.float32)
    with pytest.raises(UnsupportedModelError, match=r"delta_embedding\.weight' has a hook"):
        observe_sites(model, batch, adapter.loss)
