"""What encodes prompts, layouts, classes and maps, against diffusers and plain arithmetic."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ldm_export.networks.bert import BertTextEncoder
from ldm_export.networks.conditioners import ClassEmbedder, SpatialRescaler
from ldm_runtime.specs.networks import ClassEmbedderSpec, SegmentationEncoderSpec
from ldm_runtime.testing import text_encoder_spec
from tests.reference.bert_twin import load_bert
from tests.reference.test_networks_reference import randomised, relative_error

pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest value
PROMPTS = text_encoder_spec(
    kind="bert",
    width=96,
    num_layers=3,
    num_heads=2,
    feed_forward_dim=384,
    vocab_size=600,
    activation="gelu",
    pad_token_id=0,
)
BERTS = {
    "prompts": PROMPTS,
    "inner_width_above_its_own": replace(PROMPTS, width=64, num_heads=8, feed_forward_dim=256),
    "layouts": replace(PROMPTS, vocab_size=8192, max_tokens=92, num_layers=2),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def berts(spec, scale=1.0):
    ours = randomised(BertTextEncoder(spec), scale=scale)
    return ours, load_bert(spec, ours.state_dict())


@pytest.mark.parametrize("spec", BERTS.values(), ids=BERTS)
def test_bert_gives_the_context_of_diffusers_bert(spec):
    ours, theirs = berts(spec)
    tokens = torch.randint(spec.vocab_size, (2, spec.max_tokens))

    context = ours(tokens)

    expected = theirs(tokens).last_hidden_state
    assert context.shape == (2, spec.max_tokens, spec.width)
    assert relative_error(context, expected) <= TOLERANCE


def test_bert_agrees_where_the_epsilons_decide():
    ours, theirs = berts(PROMPTS, scale=0.02)
    tokens = torch.randint(PROMPTS.vocab_size, (1, 77))

    context = ours(tokens)

    assert relative_error(context, theirs(tokens).last_hidden_state) <= TOLERANCE


def test_every_token_of_bert_sees_every_other():
    network = randomised(BertTextEncoder(PROMPTS))
    tokens = torch.randint(1, PROMPTS.vocab_size, (1, 77))
    context = network(tokens)

    for place, seen_from in ((0, 76), (76, 0)):
        changed = tokens.clone()
        changed[0, place] = 0
        assert (network(changed)[0, seen_from] - context[0, seen_from]).abs().max() > 1e-3


def test_a_class_is_a_row_of_the_embedding():
    spec = ClassEmbedderSpec(num_classes=11, width=24, null_class=10)
    network = randomised(ClassEmbedder(spec))

    context = network(torch.tensor([10, 0, 3]))

    assert torch.equal(context, network.embedding.weight[[10, 0, 3]][:, None])


@pytest.mark.parametrize("size", [(16, 24), (8, 8), (22, 13), (4, 7)])
@pytest.mark.parametrize("halvings", [0, 1, 2])
def test_a_rescaled_map_is_the_convolution_of_its_halved_one_hot_map(halvings, size):
    spec = SegmentationEncoderSpec(num_classes=182, out_channels=3, num_downsampling_steps=halvings)
    network = randomised(SpatialRescaler(spec))
    segmentation = torch.randint(spec.num_classes, (2, *size))

    concat = network(segmentation)

    one_hot = F.one_hot(segmentation, spec.num_classes).permute(0, 3, 1, 2).float()
    for _ in range(halvings):
        one_hot = F.interpolate(one_hot, scale_factor=0.5, mode="bilinear")
    assert relative_error(concat, network.channel_mapper(one_hot)) <= TOLERANCE
