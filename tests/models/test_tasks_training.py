"""How the models learn: their data, what conditions them, the loss, and what they are told."""

from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from models.shapes.catalog.models import BERT, LAYOUT, MODELS
from models.shapes.catalog.noise import NUM_TRAIN_TIMESTEPS
from models.shapes.data import scenes
from models.shapes.data.labels import NUM_LABELS, label_of, scene_map
from models.shapes.data.masks import random_mask
from models.shapes.evaluation.scores import EvaluationPrompt, image_of
from models.shapes.training import bert_text as words
from models.shapes.training import caption_encoder, conditions, corpus, velocity
from models.shapes.training import layouts as boxes
from models.shapes.training import task_model as training

ALL = list(MODELS.values())
NAMES = list(MODELS)
NOISES = sorted({each.noise for each in ALL}, key=lambda each: each.start)


def some_scenes(count, most=3):
    source = scenes.random_scenes(np.random.default_rng(4), held_out=False)
    return list(islice((each for each in source if len(each.things) <= most), count))


def small_corpus(model, count=6):
    sampled, masked = some_scenes(count, model.most_things), None
    masks = [None] * count
    if model.task == "inpainting":
        masks = [random_mask(np.random.default_rng(row)) for row in range(count)]
        latent_masks = torch.stack([corpus.latent_mask(mask) for mask in masks])
        masked = torch.cat([torch.randn(count, 3, 16, 16), latent_masks], dim=1)
    torch.manual_seed(0)
    return corpus.Corpus(
        rows=torch.arange(count),
        prompts=[EvaluationPrompt(scene=a, mask=b) for a, b in zip(sampled, masks, strict=True)],
        latents=torch.randn(count, 3, 16, 16),
        scale=0.5,
        masked=masked,
    )


@pytest.fixture
def conditions_of(monkeypatch):
    """A function that opens conditions, with encoders that have learned nothing."""
    torch.manual_seed(0)
    monkeypatch.setattr(conditions, "load_words", lambda: words.BertTextEncoder(BERT).eval())
    monkeypatch.setattr(conditions, "load_layouts", lambda: boxes.BertTextEncoder(LAYOUT).eval())
    return conditions.open_conditions


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_every_part_of_a_model_learns(model, conditions_of):
    data = small_corpus(model)
    network = training.TaskModel(model)
    rows = torch.arange(6)
    made = conditions_of(model, data)

    loss = training.task_loss(model, network, data.latents, made, rows, layout=True)
    loss.backward()

    assert loss.isfinite()
    silent = [name for name, each in network.named_parameters() if each.grad is None]
    assert silent == []


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_a_model_begins_by_predicting_the_same_for_everything(model, conditions_of):
    data = small_corpus(model)
    network = training.TaskModel(model)
    network.initialise()
    condition = conditions_of(model, data)(
        network.conditioner, torch.arange(6), torch.zeros(6, dtype=torch.bool)
    )

    predict = conditions.predict_with(network.unet, condition)

    found = predict(data.latents, torch.full((6,), 500.0))
    bias = network.unet.out[2].bias[None, :, None, None]
    torch.testing.assert_close(found, bias.expand_as(found), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "model", [each for each in ALL if each.drops], ids=[each.name for each in ALL if each.drops]
)
def test_dropped_rows_all_have_the_same_condition_and_others_have_not(model, conditions_of):
    data = small_corpus(model)
    network = training.TaskModel(model)
    made = conditions_of(model, data)
    rows = torch.arange(6)

    dropped = made(network.conditioner, rows, torch.ones(6, dtype=torch.bool)).context
    kept = made(network.conditioner, rows, torch.zeros(6, dtype=torch.bool)).context

    assert all(torch.equal(one, other) for one, other in pairwise(dropped))
    assert not any(torch.equal(one, other) for one, other in pairwise(kept))
    assert not torch.equal(kept[0], dropped[0])


def test_pixels_of_a_map_begin_as_their_colours():
    model = MODELS["semantic_synthesis"]
    data = small_corpus(model)
    network = training.TaskModel(model)
    network.initialise()
    made = conditions.open_conditions(model, data)
    with torch.no_grad():
        concat = made(network.conditioner, torch.tensor([2]), torch.tensor([False])).concat[0]

    wanted = image_of(data.prompts[2].scene).reshape(16, 4, 16, 4, 3).mean((1, 3))
    levels = 127.5 * (concat.movedim(0, 2).numpy() + 1)
    assert np.abs(levels - wanted).mean() < 20
    assert len(np.unique(scene_map(data.prompts[2].scene))) > 1


def test_classes_begin_as_the_labels_of_layouts_and_their_unet_as_that_of_those(monkeypatch):
    torch.manual_seed(0)
    encoder = boxes.BertTextEncoder(LAYOUT).eval()
    monkeypatch.setattr(boxes, "load_layouts", lambda: encoder)
    classes, layouts = (
        training.TaskModel(MODELS[name]) for name in ("class_to_image", "layout_to_image")
    )

    classes.begin_with(layouts.unet.state_dict())

    rows = classes.conditioner.embedding.weight
    nothing = encoder(boxes.tokens_of([[]]))[0, 0]
    assert MODELS["class_to_image"].begins_with == "layout_to_image"
    torch.testing.assert_close(rows[NUM_LABELS], nothing)
    assert len({tuple(row.tolist()) for row in rows}) == NUM_LABELS + 1
    for one, other in zip(classes.unet.parameters(), layouts.unet.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_low_resolution_is_what_a_request_would_bring():
    model = MODELS["super_resolution"]
    data = small_corpus(model)
    concat = conditions.open_conditions(model, data)(
        None, torch.tensor([1]), torch.tensor([False])
    ).concat

    wanted = image_of(data.prompts[1].scene).reshape(16, 4, 16, 4, 3).mean((1, 3))
    levels = 127.5 * (concat[0].movedim(0, 2).numpy() + 1)
    np.testing.assert_allclose(levels, wanted, atol=0.51)


def test_of_a_latent_pixel_of_the_mask_the_first_pixel_decides():
    mask = np.zeros((64, 64), np.bool_)
    mask[4, 8] = mask[13, 13] = True

    latent_mask = corpus.latent_mask(mask)

    assert latent_mask.shape == (1, 16, 16)
    assert latent_mask[0, 1, 2] == 1
    assert (latent_mask == 1).sum() == 1
    assert latent_mask.min() == -1


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_a_model_learns_from_scenes_of_as_many_things_as_it_says(model):
    sampled = some_scenes(50)

    rows = corpus.rows_of(sampled, model)

    few = [row for row, each in enumerate(sampled) if len(each.things) <= model.most_things]
    assert rows == few[: model.most_rows]


@pytest.mark.parametrize("noise", NOISES)
def test_a_perfect_prediction_has_no_loss(noise):
    clean = torch.randn(8, 3, 16, 16)

    def predict(noisy, timesteps):
        alpha = velocity.alphas_of(noise)[timesteps.long()][:, None, None, None]
        epsilon = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return alpha.sqrt() * epsilon - (1 - alpha).sqrt() * clean

    assert velocity.velocity_loss(predict, clean, noise, layout=False) < 1e-6


@pytest.mark.parametrize("noise", NOISES)
def test_ddim_arrives_at_what_is_always_predicted(noise):
    wanted = torch.randn(2, 3, 16, 16)

    def predict(noisy, timesteps):
        alpha = velocity.alphas_of(noise)[timesteps.long()][:, None, None, None]
        return (alpha.sqrt() * noisy - wanted) / (1 - alpha).sqrt()

    found = velocity.ddim(predict, torch.randn(2, 3, 16, 16), noise, 7)

    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_while_layout_is_learned_three_quarters_of_the_timesteps_are_noisy():
    torch.manual_seed(0)

    early = velocity.random_timesteps(20_000, layout=True)
    later = velocity.random_timesteps(20_000, layout=False)

    half = NUM_TRAIN_TIMESTEPS // 2
    assert (early >= half).float().mean() == pytest.approx(0.75, abs=0.02)
    assert (later >= half).float().mean() == pytest.approx(0.5, abs=0.02)
    assert early.min() >= 0
    assert early.max() < NUM_TRAIN_TIMESTEPS


def test_guidance_goes_beyond_the_difference_of_two_predictions():
    def unet(noisy, _timesteps, context):
        return noisy * 0 + context.mean()

    both = [conditions.Condition(context=torch.full((1, 1, 4), value)) for value in (3.0, 1.0)]
    predict = conditions.guided(unet, both, 2.5)

    assert predict(torch.zeros(1, 3, 4, 4), torch.zeros(1)).unique().item() == pytest.approx(6.0)


def test_captions_are_tokens_between_start_and_end_and_the_last_row_is_the_empty_one():
    captions = [scenes.caption(scene) for scene in some_scenes(20)]

    tokens = words.caption_tokens(captions)

    assert tokens.shape == (21, BERT.max_tokens)
    assert (tokens[:, 0] == 101).all()
    assert tokens[-1].tolist() == [101, 102] + 75 * [BERT.pad_token_id]
    assert ((tokens == 102).sum(1) == 1).all()


def test_nouns_are_found_behind_words_of_several_tokens():
    text = "a large cyan circle left of a small purple cross on a gray background"

    tokens = words.caption_tokens([text, "circle", "cross"])

    first, second = words.noun_places(text)
    assert tokens[0, first] == tokens[1, 1]
    assert tokens[0, second] == tokens[2, 1]
    assert first > 4  # "cyan" is more than one


def test_layouts_name_every_thing_in_another_order_for_another_seed():
    sampled = some_scenes(30)

    shuffled, again = boxes.shuffled_layouts(sampled, 0), boxes.shuffled_layouts(sampled, 1)

    asked = [sorted(label_of(thing) for thing in scene.things) for scene in sampled]
    assert [sorted(each.label for each in layout) for layout in shuffled] == asked
    assert shuffled != again
    assert boxes.tokens_of(shuffled).shape == (30, LAYOUT.max_tokens)


def test_neighbouring_points_begin_alike_and_far_ones_do_not():
    features = boxes.coordinate_features(LAYOUT.width)

    def likeness(first, second):
        return torch.cosine_similarity(features[first], features[second], dim=0)

    middle = 45 * 90 + 45
    assert likeness(middle, middle + 1) > 0.8
    assert likeness(middle, middle + 90) > 0.8
    assert likeness(middle, 0) < 0.5
    assert likeness(middle, middle + 30) < 0.6


def test_a_box_covers_the_cells_that_it_touches():
    layout = [boxes.LayoutObject(label=3, box=(0.0, 0.5, 0.26, 1.0))]

    labels, places, cells = boxes.answers_of([layout, []])

    assert labels[0, :2].tolist() == [3, NUM_LABELS]
    assert (labels[1] == NUM_LABELS).all()
    assert places[0, 0].tolist() == pytest.approx([0.0, 0.5, 0.26, 1.0])
    covered = cells[0, 0].reshape(8, 8)
    assert covered[4:, :3].all()
    assert covered.sum() == 4 * 3
    assert cells[1].sum() == 0


def test_a_trained_encoder_is_loaded_without_the_layers_of_its_training(tmp_path, monkeypatch):
    torch.manual_seed(0)
    trained = boxes.DescribingLayouts()
    torch.save({"ema": trained.state_dict()}, tmp_path / "layouts.pt")
    monkeypatch.setattr(caption_encoder, "WORK", tmp_path)

    loaded = boxes.load_layouts()

    for name, value in trained.text.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    assert not loaded.training
    assert not any(each.requires_grad for each in loaded.parameters())
