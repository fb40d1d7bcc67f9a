import re
import tracemalloc
from pathlib import Path

import pytest
import yaml

from ldm_export.detection.compvis_config import ConfigFields, config_fields, read_config
from ldm_export.detection.detect import detect
from ldm_export.errors import ExportError, WeightsError
from tests.export.sd_layout import (
    SD1,
    SD2,
    TINY,
    FakeTensor,
    checkpoint,
    sdxl_checkpoint,
    with_values,
)

SHAPES = Path(__file__).parents[2] / "models/shapes"
V1_INFERENCE = """
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    image_size: 64
    conditioning_key: crossattn
    scale_factor: 0.18215
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [ 4, 2, 1 ]
        num_res_blocks: 2
        channel_mult: [ 1, 2, 4, 4 ]
        num_heads: 8
        transformer_depth: 1
        context_dim: 768
    first_stage_config:
      params:
        embed_dim: 4
        ddconfig: {z_channels: 4, resolution: 256, in_channels: 3, ch: 128, ch_mult: [1, 2, 4, 4],
                   num_res_blocks: 2}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""


def of_params(**params):
    return {"model": {"params": params}}


def test_a_released_configuration_agrees_with_its_weights(tmp_path):
    path = tmp_path / "v1 inference.yaml"
    path.write_text(V1_INFERENCE)

    spec = detect(checkpoint(SD1), config=read_config(path)).spec

    by_source = {assumption.field: assumption.source for assumption in spec.assumptions}
    assert by_source["unet.num_heads"] == "config"
    assert by_source["autoencoder.latent_scale_factor"] == "config"
    assert by_source["defaults.height"] == "config"
    assert by_source["prediction_type"] == "config default"
    assert spec.defaults.height == 512


def test_facts_are_read_and_minus_one_leaves_them_open():
    config = of_params(
        parameterization="x0",
        scale_factor="1e-1",
        linear_start=0.0015,
        timesteps=500,
        unet_config={"params": {"num_heads": -1, "num_head_channels": 32}},
        cond_stage_config={"params": {"num_attention_heads": 4, "hidden_act": "gelu"}},
    )

    features = config_fields(config)

    assert features == ConfigFields(
        prediction_type="sample",
        latent_scale_factor=0.1,
        linear_start=0.0015,
        num_train_timesteps=500,
        num_head_channels=32,
        text_num_heads=4,
        text_activation="gelu",
    )


#: The part of sd_xl_v.yaml of AUTOMATIC1111's web UI that says what is predicted.
SGM_V = """
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    scale_factor: 0.13025
    denoiser_config:
      target: sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser
      params:
        num_idx: 1000
        weighting_config:
          target: sgm.modules.diffusionmodules.denoiser_weighting.EpsWeighting
        scaling_config:
          target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling
        discretization_config:
          target: sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization
    network_config:
      target: sgm.modules.diffusionmodules.openaimodel.UNetModel
      params: {num_head_channels: 64, model_channels: 320}
"""


def of_scaling(name):
    target = f"sgm.modules.diffusionmodules.denoiser_scaling.{name}"
    return of_params(denoiser_config={"params": {"scaling_config": {"target": target}}})


def test_a_configuration_of_generative_models_says_what_is_predicted_and_heads(tmp_path):
    path = tmp_path / "sd_xl_v.yaml"
    path.write_text(SGM_V)

    spec = detect(sdxl_checkpoint(), config=read_config(path)).spec

    stated = {each.field: (each.value, each.source) for each in spec.assumptions}
    assert stated["prediction_type"] == ("v_prediction", "config")
    assert stated["unet.num_head_channels"] == ("64", "config")


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ("EpsScaling", "epsilon"),
        ("VScaling", "v_prediction"),
        ("VScalingWithEDMcNoise", "v_prediction"),
        ("EDMScaling", "epsilon"),
    ],
)
def test_scalings_of_generative_models_say_what_is_predicted(scaling, expected):
    assert config_fields(of_scaling(scaling)).prediction_type == expected


def test_a_scaling_of_edm_is_of_a_model_of_edm():
    marked = sdxl_checkpoint() | {"edm_vpred.sigma_max": with_values(120.0)}
    config = of_scaling("VScalingWithEDMcNoise")

    assert detect(marked, config=config).spec.prediction_type == "v_prediction"
    with pytest.raises(WeightsError, match=r"says .*VScalingWithEDMcNoise.* no mark of EDM"):
        detect(sdxl_checkpoint(), config=config)


@pytest.mark.parametrize("target", ["my.RectifiedScaling", 7])
def test_an_unknown_scaling_is_an_error(target):
    config = of_params(denoiser_config={"params": {"scaling_config": {"target": target}}})

    with pytest.raises(ExportError, match=r"scaling_config.target is .*; choose from EpsScaling"):
        config_fields(config)


CLASS = "ldm.models.diffusion.ddpm.LatentDiffusion"


@pytest.mark.parametrize(
    ("target", "params", "expected"),
    [
        (CLASS, {"unet_config": {}}, "epsilon"),
        ("ldm.models.diffusion.ddpm_edit.LatentInpaintDiffusion", {"unet_config": {}}, "epsilon"),
        (CLASS, {"unet_config": {}, "parameterization": "v"}, None),
        (CLASS, {"timesteps": 1000}, None),
        ("sgm.models.diffusion.DiffusionEngine", {"unet_config": {}}, None),
        (None, {"unet_config": {}}, None),
    ],
)
def test_a_configuration_of_compvis_without_parameterization_usually_means_noise(
    target, params, expected
):
    config = {"model": {"target": target, "params": params}}

    assert config_fields(config).usual_prediction_type == expected


def test_what_a_configuration_usually_means_goes_behind_marks_and_measurements():
    config = {"model": {"target": CLASS, "params": {"unet_config": {}}}}
    marked = checkpoint(SD2) | {"v_pred": FakeTensor(shape=(0,))}

    usual = detect(checkpoint(SD2), config=config)
    by_mark = detect(marked, config=config).spec
    measured = detect(checkpoint(SD2), config=config, measured="v_prediction").spec

    assert (usual.spec.prediction_type, usual.spec.defaults.height) == ("epsilon", 512)
    assert usual.siblings == {"v_prediction"}
    assert (by_mark.prediction_type, by_mark.defaults.height) == ("v_prediction", 768)
    assert (measured.prediction_type, measured.defaults.height) == ("v_prediction", 768)


def test_averages_are_used_as_the_configuration_says():
    assert config_fields(of_params(use_ema=True)).weights == "ema"
    assert config_fields(of_params(use_ema=False)).weights == "model"


def test_no_configuration_says_nothing():
    assert config_fields(None) == ConfigFields()


def test_a_schedule_from_the_configuration_is_recorded_as_such():
    tensors = checkpoint(TINY, schedule=False)

    spec = detect(tensors, config=of_params(linear_end=0.02, timesteps=200)).spec

    recorded = {a.field: (a.value, a.source) for a in spec.assumptions}["alphas_cumprod"]
    assert recorded == ("scaled-linear from 0.00085 to 0.02 in 200 steps", "config")
    assert len(spec.alphas_cumprod) == 200


def test_heads_of_the_text_encoder_come_from_the_configuration():
    heads = of_params(cond_stage_config={"params": {"num_attention_heads": 4}})
    wrong = of_params(cond_stage_config={"params": {"num_attention_heads": 5}})

    spec = detect(checkpoint(TINY), config=heads).spec

    assert spec.networks["text_encoder"].num_heads == 4
    with pytest.raises(ExportError, match=r"num_attention_heads is 5, .* width 96"):
        detect(checkpoint(TINY), config=wrong)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"unet_config": {"params": {"model_channels": 64}}}, "model_channels is 64, .* have 32"),
        (
            {"unet_config": {"params": {"channel_mult": [1, 2, 4]}}},
            r"channel_mult is \[1, 2, 4\], .* have \(1, 2, 3\)",
        ),
        ({"unet_config": {"params": {"transformer_depth": 1}}}, "transformer_depth is 1"),
        ({"first_stage_config": {"params": {"embed_dim": 3}}}, "embed_dim is 3, .* have 4"),
        (
            {"first_stage_config": {"params": {"ddconfig": {"num_res_blocks": [1, 2]}}}},
            "num_res_blocks",
        ),
    ],
)
def test_a_configuration_of_another_model_is_an_error_that_shows_both(params, message):
    with pytest.raises(WeightsError, match=message):
        detect(checkpoint(TINY), config=of_params(**params))


def test_one_number_a_level_is_the_same_as_one_number():
    config = of_params(unet_config={"params": {"num_res_blocks": [1, 1, 1]}})

    assert detect(checkpoint(TINY), config=config).spec.unet.num_res_blocks == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"parameterization": "score"}, "'score'; choose from eps, v, x0"),
        ({"parameterization": ["eps"]}, "choose from eps"),
        ({"scale_factor": 0}, "scale_factor is 0; a positive number"),
        ({"scale_factor": "big"}, "scale_factor is 'big'"),
        ({"linear_start": float("inf")}, "linear_start is inf"),
        ({"timesteps": 10.5}, "timesteps is 10.5; a positive integer"),
        ({"timesteps": True}, "timesteps is True"),
        ({"timesteps": 10**9}, "timesteps is 1000000000; at most 100000"),
        ({"image_size": 10**9}, "image_size is 1000000000; at most 2048"),
        ({"beta_schedule": "cosine"}, "beta_schedule 'cosine'"),
    ],
)
def test_impossible_values_are_an_error_that_names_the_entry(params, message):
    with pytest.raises(ExportError, match=message):
        config_fields(of_params(**params))


def test_a_scale_by_std_configuration_leaves_the_scale_to_the_checkpoint():
    features = config_fields(of_params(scale_by_std=True, scale_factor=1.0))

    assert features.latent_scale_factor is None
    assert features.scale_by_std


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2", "is not a valid YAML file"),
        ("- 1\n- 2\n", "holds list"),
        ("", "holds NoneType"),
        ("model: {target: x}", "no `model: params:` mapping"),
        ("a: !!python/object/apply:os.system ['touch ran']", r"the tag .*os.system is not read"),
        ("[" * 5000, "is not a valid YAML file"),
        ("#" * (1 << 16 | 1), "the configuration of a model is smaller"),
    ],
)
def test_files_that_are_no_configuration_are_an_error(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text)

    with pytest.raises(ExportError, match=message):
        read_config(path)
    assert not (tmp_path / "ran").exists()


def test_a_configuration_that_is_not_there_or_not_text_is_an_error(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ExportError, match="cannot be read"):
        read_config(tmp_path / "absent.yaml")
    with pytest.raises(ExportError, match="is not a valid YAML file"):
        read_config(tmp_path / "binary.yaml")


def test_betas_that_a_configuration_lists_are_the_schedule():
    tensors = checkpoint(TINY, schedule=False)

    spec = detect(tensors, config=of_params(timesteps=1000, given_betas=[0.1, "2e-1", 0.5])).spec

    assert spec.alphas_cumprod == pytest.approx((0.9, 0.72, 0.36))
    assert {"alphas_cumprod": "config"}.items() <= {
        each.field: each.source for each in spec.assumptions
    }.items()


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 1.5], "given_betas has 1.5; every beta lies between 0 and 1"),
        ([0.1, -1], "a positive number was expected"),
        ([], "list of 1 to 100000 betas"),
        ("linear", "list of 1 to 100000 betas, got str"),
    ],
)
def test_betas_that_are_no_schedule_are_an_error(betas, message):
    with pytest.raises(ExportError, match=message):
        config_fields(of_params(given_betas=betas))


ALIASES = "\n".join(
    ["x0: &x0 [lol]", *(f"x{n}: &x{n} [{','.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 9))]
)
MERGES = "\n".join(
    [
        "x0: &x0 {a: 1}",
        *(f"x{n}: &x{n} {{<<: [{','.join([f'*x{n - 1}'] * 9)}]}}" for n in range(1, 9)),
    ]
)
PARAMS = "model: {params: {scale_factor: %s}}"
UNREADABLE = {
    "aliases": (f"{ALIASES}\nmodel: {{params: {{beta_schedule: *x8}}}}", "anchors and aliases"),
    "anchors alone": ("model: {params: &p {timesteps: 5}}", "anchors and aliases"),
    "merge keys through aliases": (MERGES, "anchors and aliases"),
    "merge keys": ("model: {params: {<<: {timesteps: 5}}}", "merge keys"),
    "an object of Python": (PARAMS % "!!python/object/apply:os.system [true]", "the tag"),
    "a long tag": (PARAMS % f"!{'x' * 500} 1", "the tag !xxx"),
    "hexadecimal of 500 digits": (PARAMS % f"0x{'F' * 500}", "a number of 502 characters"),
    "5,000 digits": (PARAMS % ("9" * 5000), "a number of 5000 characters"),
    "base 60": (PARAMS % ("1" + ":59" * 400), "a number of 1201 characters"),
    "base 60 with a fraction": (PARAMS % ("1" + ":59" * 400 + ".5"), "a number of 1203 char"),
    "a deep list": (PARAMS % ("[" * 20_000 + "]" * 20_000), "nests more than 32 deep"),
    "a deep mapping": (PARAMS % ("{a: " * 40 + "1" + "}" * 40), "nests more than 32 deep"),
    "too many bytes": ("# " + "x" * 65536, "more than 65536 bytes"),
    "an impossible date": (PARAMS % "2001-99-99", "not a valid YAML file"),
}


@pytest.mark.parametrize(("text", "fault"), UNREADABLE.values(), ids=UNREADABLE)
def test_yaml_that_costs_more_than_its_size_is_one_short_sentence(tmp_path, text, fault):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    tracemalloc.start()

    with pytest.raises(ExportError, match=re.escape(fault)) as caught:
        read_config(path)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < len(str(path)) + 250
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "name",
    [
        "scale_factor",
        "timesteps",
        "parameterization",
        "beta_schedule",
        "image_size",
        "use_ema",
        "unet_config.params.num_heads",
        "cond_stage_config.params.n_stages",
        "cond_stage_config.params.ucg_rate",
        "cond_stage_config.params.hidden_act",
    ],
)
@pytest.mark.parametrize("value", [["x" * 50_000], "\x1b" * 50_000, -int("9" * 40), -0.5, [[]]])
def test_a_value_that_makes_no_sense_is_cut_short_in_its_message(name, value):
    params = value
    for key in reversed(name.split(".")):
        params = {key: params}

    with pytest.raises(ExportError, match=re.escape(name.rpartition(".")[2])) as caught:
        config_fields({"model": {"params": params}})

    assert len(str(caught.value)) < 200


def test_the_configurations_of_the_shipped_models_are_plain():
    paths = sorted(SHAPES.glob("*.yaml"))

    assert len(paths) > 5
    for path in paths:
        assert read_config(path) == yaml.safe_load(path.read_text())
