"""The codebook of the small VQ autoencoders: how it is laid out, follows, and what passes it."""

from dataclasses import replace

import pytest
import torch

from models.shapes.catalog.learning_rate import Cycle
from models.shapes.training import codebook, vq

SMALL = replace(vq.VQ, codebook_size=16)


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    return vq.Autoencoder(replace(SMALL, **changes))


def images(count=4):
    torch.manual_seed(5)
    blocks = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    return blocks.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def config(**changes):
    cycles = (Cycle(end=20),)
    known = dict(quantised_from=2, revived_until=10, whole_from=10, cycles=cycles)
    return vq.AutoencoderConfig(run="test", spec=SMALL, **(known | changes))


def test_the_nearest_code_is_the_one_at_the_smallest_distance():
    torch.manual_seed(1)
    latents, codes = torch.randn(5000, 3), torch.randn(40, 3)

    chosen = codebook.nearest(latents, codes)

    assert torch.equal(chosen, torch.cdist(latents, codes).argmin(1))


def test_the_codes_of_latents_are_what_the_exported_decoder_takes():
    model = small_model()
    latents = torch.randn(2, 3, 4, 6)
    chosen = codebook.nearest(latents.movedim(1, 3).flatten(0, 2), model.codebook)

    codes = codebook.codes_for(latents, model.codebook, chosen)

    torch.testing.assert_close(codes, model.decoder.quantize(latents))


def test_spread_codes_reach_small_clusters_that_random_ones_miss():
    torch.manual_seed(2)
    crowd = torch.randn(4000, 3) * 0.01
    few = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]])

    chosen = codebook.spread(torch.cat([crowd, few]), 16)

    assert chosen.shape == (16, 3)
    assert torch.cdist(few, chosen).min(1).values.max() < 1e-6


def test_codes_move_to_the_mean_of_what_chose_them():
    model = small_model()
    model.start()
    wanted = torch.tensor([[1.0, 2.0, 3.0], [1.2, 2.2, 3.2]])

    for _ in range(3000):
        model.follow(wanted, torch.tensor([4, 4]))

    torch.testing.assert_close(model.codebook[4], wanted.mean(0), atol=1e-4, rtol=0)


def test_a_dead_code_is_moved_to_the_latent_that_is_served_worst_and_living_ones_stay():
    model = small_model()
    model.start()
    model.codes.count[3] = 0.0
    before = model.codebook.clone()
    latents = torch.stack([model.codebook[0], torch.tensor([90.0, 0, 0])]).detach()

    model.revive(latents, torch.tensor([0, 1]))

    assert torch.equal(model.codebook[3], latents[1])
    living = [index for index in range(16) if index != 3]
    assert torch.equal(model.codebook[living], before[living])
    assert model.codes.count[3] > 0


@pytest.mark.parametrize("step", [0, 2, 12])
def test_the_encoder_learns_before_and_through_the_codebook(step):
    model = small_model()

    vq.vq_loss(model, config(), images(), step).backward()

    gradients = [parameter.grad for parameter in model.encoder.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert model.codebook.grad is None


def test_the_codebook_is_laid_out_once_when_quantisation_begins():
    model = small_model()
    before = model.codebook.clone()

    vq.vq_loss(model, config(), images(), 1)
    untouched = model.codebook.clone()
    vq.vq_loss(model, config(), images(), 2)

    assert torch.equal(untouched, before)
    assert not torch.equal(model.codebook, before)


def test_the_attention_free_one_takes_all_but_attention_from_the_other():
    plain = small_model(middle_attention=False).state_dict().keys()
    whole = small_model().state_dict().keys()

    assert plain < whole
    assert all(".attn_1." in name for name in whole - plain)


def test_both_halves_are_named_as_in_a_checkpoint():
    names = vq.halves_of(small_model()).keys()

    parts = {name.split(".")[0] for name in names}
    assert parts == {"encoder", "quant_conv", "quantize", "post_quant_conv", "decoder"}
    assert not any(name.startswith(("encoder.encoder", "codes")) for name in names)


def test_a_check_measures_what_comes_back_through_the_codebook():
    model = small_model()

    found = vq.check_vq(config(), model.state_dict(), images())

    assert found.keys() >= {"psnr", "shape_error", "readable", "continuous_psnr", "codes"}
    assert 0 < found["psnr"] < 20
    assert 1 <= found["codes"] <= 16
