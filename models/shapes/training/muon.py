"""Muon for the matrices inside a network and AdamW for everything else, as one optimizer.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that directions few images
pull into get as large a step as the others: Jordan et al. 2024, "Muon: an optimizer for hidden
layers in neural networks". Steps are scaled to the size of AdamW's (Liu et al. 2025,
arXiv:2502.16982, section 2.2), of which they stand more: a learning rate is Muon's, and AdamW
takes a share of it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_WEIGHT_DECAY = 0.01
_SHARE = 1 / 3  # of the learning rate, for AdamW next to Muon


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW as everything here uses it; the learning rate is set at every step."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=_WEIGHT_DECAY, fused=True)


def muon(network: nn.Module, ends: tuple[str, ...]) -> "MuonAndAdamW":
    """Return Muon for the matrices of a network, but for those whose names begin with `ends`.

    Those are its first and its last layer, and tables of embeddings.
    """
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        parts[parameter.ndim > 1 and not name.startswith(ends)].append(parameter)
    return MuonAndAdamW(matrices=parts[True], others=parts[False])


class MuonAndAdamW:
    """The part of an optimizer that `trainer.Trainer` uses."""

    def __init__(self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> None:
        """Take parameters of two or more dimensions, and the others.

        A convolution counts as the matrix that maps a patch to a pixel.
        """
        # Each flat one shares the memory of its convolution, so that a step on it is one on that.
        self._flat = [(each, nn.Parameter(each.detach().flatten(1))) for each in matrices]
        self._muon = torch.optim.Muon(
            [flat for _, flat in self._flat],
            weight_decay=_WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = adamw(others)
        self._adamw.param_groups[0]["share"] = _SHARE

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both; a group's "share" says which part of a learning rate it gets."""
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def step(self) -> None:
        """Take a step along the gradients that the parameters have."""
        for parameter, flat in self._flat:
            flat.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])
