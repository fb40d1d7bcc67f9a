"""The renaming of a component's tensors, of which none may be lost or take another's place."""

from collections.abc import Mapping

from ldm_export.checkpoint.stored_tensors import StoredTensor
from ldm_export.errors import CheckpointError
from ldm_export.hyperparameters.shapes import listed
from ldm_export.intake.component import StoredComponent


def renamed(
    component: StoredComponent, kind: str, names: Mapping[str, str | None]
) -> dict[str, StoredTensor]:
    """Return tensors under other names.

    Args:
        component: The tensors.
        kind: The component, in words.
        names: New names by old ones; None where a name is not known.

    Raises:
        CheckpointError: A name is not known, or two tensors would have one name.
    """
    if unknown := [name for name, new in names.items() if new is None]:
        raise CheckpointError(
            component.path,
            f"has {len(unknown)} tensors that are not of a known {kind} ({listed(unknown)}); an "
            "export without them could be wrong",
        )
    first: dict[str | None, str] = {}
    for name, new in names.items():
        if (other := first.setdefault(new, name)) != name:
            raise CheckpointError(
                component.path,
                f"has both {other} and {name}, which are one tensor of the {kind}; delete the one "
                "that does not belong to the model, and save it again",
            )
    return {new: component.tensors[name] for name, new in names.items() if new is not None}
