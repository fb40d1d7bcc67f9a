"""Muon next to AdamW: the step of a matrix, the parameters of the other, and going on."""

import copy

import pytest
import torch
from torch import nn

from models.shapes.catalog.models import MODELS
from models.shapes.training import task_model as training
from models.shapes.training.muon import MuonAndAdamW

RATE, DECAY, SIZE_OF_ADAMW = 1e-2, 0.01, 0.2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(16, 16))


def optimizer_of(model):
    matrices = [model[0].weight, model[2].weight]
    optimizer = MuonAndAdamW(matrices, [model[0].bias, model[2].bias])
    for group in optimizer.param_groups:
        group["lr"] = RATE
    return optimizer


def take_step(model, optimizer, seed):
    inputs = torch.randn(32, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    model.zero_grad(set_to_none=True)
    (model(inputs) - inputs.flatten(1)[:, :16]).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("layer", [0, 2])
def test_a_step_changes_a_matrix_by_a_nearly_orthogonal_one_of_adamws_size(layer):
    model = network()
    optimizer = optimizer_of(model)
    before = model[layer].weight.detach().flatten(1).clone()

    take_step(model, optimizer, 1)

    step = (before * (1 - RATE * DECAY) - model[layer].weight.detach().flatten(1)) / RATE
    scale = SIZE_OF_ADAMW * max(before.shape) ** 0.5
    singular = torch.linalg.svdvals(step) / scale
    assert 0.5 < singular.min() < singular.max() < 1.3


def test_biases_move_as_adamw_moves_them():
    model, reference = network(), network()
    optimizer = optimizer_of(model)
    before = model[2].bias.detach().clone()

    take_step(model, optimizer, 1)

    torch.testing.assert_close(before, reference[2].bias.detach())
    moved = (model[2].bias.detach() - before * (1 - RATE * DECAY)).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, RATE), rtol=1e-3, atol=0)


def test_what_was_saved_goes_on_as_if_it_had_not_stopped():
    model, other = network(), network()
    optimizer = optimizer_of(model)
    for seed in range(3):
        take_step(model, optimizer, seed)
    other.load_state_dict(model.state_dict())
    again = optimizer_of(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    take_step(model, optimizer, 3)
    take_step(other, again, 3)

    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_every_parameter_of_a_model_belongs_to_one_of_both(model):
    network = training.TaskModel(model)

    groups = network.optimizer().param_groups

    sizes = [sum(each.numel() for each in group["params"]) for group in groups]
    assert sum(sizes) == sum(each.numel() for each in network.parameters())
    assert sizes[0] > 0.9 * sum(sizes)
    assert [group.get("share", 1) for group in groups] == [1, pytest.approx(1 / 3)]
