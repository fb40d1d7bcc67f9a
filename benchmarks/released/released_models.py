"""Every released model that is measured at its own size, in the order of the tables."""

from collections.abc import Mapping
from types import MappingProxyType

from released.paper_models import PAPER_MODELS
from released.records import ReleasedModel
from released.stable_diffusion_models import STABLE_DIFFUSION_MODELS

#: By name.
MODELS: Mapping[str, ReleasedModel] = MappingProxyType({**PAPER_MODELS, **STABLE_DIFFUSION_MODELS})
