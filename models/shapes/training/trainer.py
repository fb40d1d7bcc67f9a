"""The training loop that every training run shares: an optimizer, an EMA, saved state and a log."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.shapes.catalog.learning_rate import Cycle
from models.shapes.training.muon import MuonAndAdamW, adamw

HERE = Path(__file__).resolve().parents[1]
WORK = HERE / "work"
EMA_DECAY = 0.999


class Trainer:
    """Warm-up and cosine decay, an EMA of the weights, saved state and a log; AdamW if not told."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *cycles: Cycle,
        optimizer: MuonAndAdamW | None = None,
    ) -> None:
        self.name, self.model, self.cycles, self.step = name, model, cycles, 0
        self.ema = {key: value.clone() for key, value in model.state_dict().items()}
        self.optimizer = optimizer or adamw(model.parameters())
        self.path = WORK / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            model.load_state_dict(state["model"])
            if state["optimizer"] is not None:  # none where weights come from a checkpoint
                self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step = state["ema"], state["step"]

    def run(self, loss_at: Callable[[int], Tensor], check: Callable[[], dict[str, float]]) -> None:
        """Take the steps that are left; `loss_at(step)` must depend on the step alone."""
        started, total, steps = time.monotonic(), 0.0, self.cycles[-1].end
        while self.step < steps:
            torch.manual_seed(1_000_000 + self.step)
            self._set_learning_rate()
            loss = loss_at(self.step)
            self.model.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step, total = self.step + 1, total + loss.item()
            self._update_ema()
            if self.step % 100 == 0 or self.step == steps:
                row = {"loss": total / 100, "seconds": time.monotonic() - started}
                total = 0.0
                if self.step % 500 == 0 or self.step == steps:
                    row |= check()
                    self.save()
                self.log(row)

    def save(self) -> None:
        """Write the whole state, then rename, so that a crash never loses it."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.path)

    def log(self, row: dict[str, float]) -> None:
        """Append one line to the log."""
        rounded = {key: float(f"{value:.4g}") for key, value in row.items()}
        line = json.dumps({"stage": self.name, "step": self.step} | rounded)
        with (HERE / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def _set_learning_rate(self) -> None:
        begun = [cycle for cycle in self.cycles if cycle.start <= self.step]
        for group in self.optimizer.param_groups:
            group["lr"] = begun[-1].rate_at(self.step) * group.get("share", 1.0)

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        for key, value in self.model.state_dict().items():
            self.ema[key].lerp_(value, 1 - decay)
