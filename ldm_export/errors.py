"""Errors raised by ldm_export.

ldm_runtime.errors.LdmError
├── CheckpointError     a file is not a checkpoint, is damaged, or is made to do harm
├── UnknownModelError   the tensors are sound, but no family in the table matches them
├── WeightsError        a component misses a tensor, or a tensor belongs to no component
└── ExportError         a component cannot be turned into a graph, or its graph differs from it
    ├── PrecisionError      half precision cannot hold a network
    └── ForeignConfigError  a YAML file is sound, but not the configuration of a CompVis model

Every message says what was found, in which file or component, and what to do about it.
"""

from pathlib import Path

from ldm_runtime.errors import LdmError


class CheckpointError(LdmError):
    """A file cannot be read as a checkpoint.

    Attributes:
        path: The file.
        fault: What is wrong with it and what to do about it.
    """

    def __init__(self, path: Path, fault: str) -> None:
        self.path = path
        self.fault = fault
        super().__init__(f"{path}: {fault}")


class UnknownModelError(LdmError):
    """No family of models that can be exported has these tensors."""


class WeightsError(LdmError):
    """The tensors of a checkpoint and the networks they should fill do not match one to one."""


class ExportError(LdmError):
    """A component could not be exported, or what was exported computes something else."""


class PrecisionError(ExportError):
    """The fp16 graph of a network overflows, or differs from torch by more than its bound."""


class ForeignConfigError(ExportError):
    """A YAML file is sound, but not the configuration of a CompVis model."""
