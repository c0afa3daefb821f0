"""digits-vit, digits-cnn and stdlib-gpt: shapes, determinism, and what makes them fit for private training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from groupsearch.workloads import check_loss, load_workload
from groupsearch.workloads.workload import Workload

BUILT_IN = ("digits-vit", "digits-cnn", "stdlib-gpt")


@pytest.fixture(params=BUILT_IN)
def workload(request: pytest.FixtureRequest) -> Workload:
    return load_workload(request.param)


def test_loss_and_metric_are_per_example(workload: Workload) -> None:
    batch = workload.make_batch(6)
    assert check_loss(workload.model, batch, workload.loss).shape == (6,)
    assert workload.metric is not None
    scores = workload.metric(workload.model, batch)
    assert scores.shape == (6,)
    assert bool(((scores >= 0) & (scores <= 1)).all())


def test_loss_of_an_example_does_not_depend_on_the_others(workload: Workload) -> None:
    model = _moved(workload.build())
    batch = workload.make_batch(4)
    together = workload.loss(model, batch)
    alone = torch.cat([workload.loss(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_same_seed_same_model_and_batch(workload: Workload) -> None:
    first, second, other = workload.build(3), workload.build(3), workload.build(4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    once, again = workload.make_batch(5), workload.make_batch(5)
    assert all(torch.equal(once[key], again[key]) for key in once)


def test_build_leaves_the_generator_alone(workload: Workload) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    workload.build(5)
    assert torch.equal(torch.rand(3), expected)


def test_builds_on_meta_without_real_tensors_and_batches_stay_on_cpu(workload: Workload) -> None:
    with torch.device("meta"):
        model = workload.build()
        batch = workload.make_batch(2)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {t.device.type for t in batch.values()} == {"cpu"}


def test_every_parameter_takes_part(workload: Workload) -> None:
    model = _moved(workload.build())
    workload.loss(model, workload.make_batch(8)).mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_batch_starts_over_when_examples_run_out() -> None:
    data = load_workload("digits-cnn").data
    assert data is not None
    batch = load_workload("digits-cnn").make_batch(data.train_size + 2)
    assert torch.equal(batch["image"][-2:], data.train["image"][:2])


def test_digits_split_is_stratified_and_disjoint() -> None:
    data = load_workload("digits-vit").data
    assert data is not None
    assert (data.train_size, data.validation_size) == (1437, 360)
    train = {image.numpy().tobytes() for image in data.train["image"]}
    assert sum(image.numpy().tobytes() in train for image in data.validation["image"]) == 0
    counts = torch.bincount(data.validation["label"], minlength=10)
    assert int(counts.min()) >= 34
    assert int(counts.max()) <= 38
    assert data.train["image"].shape[1:] == (1, 8, 8)
    assert data.train["image"].min() == -1
    assert data.train["image"].max() == 1


def test_digits_vit_has_bare_parameters_below_the_root_and_starts_as_identity() -> None:
    model = load_workload("digits-vit").model
    bare = {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] not in ("weight", "bias")}
    assert bare == {"embeddings.class_token", "embeddings.positions"}
    image = torch.rand(2, 1, 8, 8)
    tokens = model.get_submodule("embeddings")(image)
    assert torch.equal(model.get_submodule("blocks.0")(tokens), tokens)


def test_digits_cnn_has_a_strided_and_a_depthwise_convolution() -> None:
    convolutions = [m for m in load_workload("digits-cnn").model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 4
    assert any(c.stride == (2, 2) for c in convolutions)
    assert any(c.groups == c.in_channels > 1 for c in convolutions)


def test_stdlib_gpt_splits_by_module_and_predicts_the_next_byte() -> None:
    workload = load_workload("stdlib-gpt")
    assert workload.data is not None
    assert workload.data.train["tokens"].shape[1] == 129
    assert 1_000_000 <= workload.data.train["tokens"].numel() <= 2_000_000
    assert workload.data.validation_size == 512
    train = {row.numpy().tobytes() for row in workload.data.train["tokens"]}
    assert sum(row.numpy().tobytes() in train for row in workload.data.validation["tokens"]) == 0
    assert b"import" in bytes(workload.data.train["tokens"][:40].flatten().tolist())


def test_stdlib_gpt_is_causal() -> None:
    model = load_workload("stdlib-gpt").model
    ids = load_workload("stdlib-gpt").make_batch(1)["tokens"][:, :20]
    changed = ids.clone()
    changed[:, 10:] = 65
    torch.testing.assert_close(model(ids)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(ids)[:, 10:], model(changed)[:, 10:])


@pytest.mark.parametrize("name", ["digits-vit", "digits-cnn"])
def test_digits_learn_without_privacy(name: str) -> None:
    workload = load_workload(name)
    assert workload.data is not None
    assert workload.metric is not None
    model = workload.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for indices in torch.randperm(workload.data.train_size, generator=torch.Generator().manual_seed(0)).split(144) * 2:
        optimizer.zero_grad()
        workload.loss(model, {k: v[indices] for k, v in workload.data.train.items()}).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert workload.metric(model, workload.data.validation).mean() > 0.7


def _moved(model: nn.Module) -> nn.Module:
    """The model away from its zero-initialised branches, where much is equal for want of signal."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model
