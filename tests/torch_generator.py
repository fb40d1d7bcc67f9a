"""A checkpoint sampled by torch through the runtime's own loop, without an export."""

from types import SimpleNamespace

from ldm_export.graphs.torch_engine import TorchEngine
from ldm_export.intake.opening import open_model
from ldm_export.networks.loading import load_network
from ldm_export.source import ExportOptions, open_source
from ldm_export.steps import vocabulary_of
from ldm_runtime.conditioning import open_tokenizer
from ldm_runtime.specs.model import components_of
from tests.generated import drawn_by


class TorchGenerator:
    """A checkpoint opened by torch, with other files' components, called as a `Generator` is."""

    def __init__(self, path, **components):
        with open_model(path, **components) as checkpoint:
            options = ExportOptions(checkpoint=path, out=path, **components)
            source = open_source(options, checkpoint, hashed=False)
            self.spec = source.spec
            self.networks = {
                name: TorchEngine(name, load_network(name, source.spec, source.weights(name)))
                for name in components_of(source.spec)
            }
        vocabulary = vocabulary_of(self.spec)
        self.tokenizer = None if vocabulary is None else open_tokenizer(vocabulary, self.spec)

    def __call__(self, **fields):
        return SimpleNamespace(images=drawn_by(self.networks, self.tokenizer, self.spec, **fields))
