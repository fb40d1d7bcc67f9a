"""Shared UNet calls of real networks in ONNX Runtime, bit for bit.

What `run_together` promises on the CPU rests on what is measured here: two rows or more come out
the same whatever other rows are in the call. No kernel promises it, but those of ONNX Runtime do it
as long as weights are packed when the session opens, which is its default: else a matrix product
with more rows is divided among four threads another way and sums in another order.
"""

import json
from itertools import pairwise

import numpy as np
import pytest

import batching as benchmark
from ldm_runtime import GenerationRequest
from ldm_runtime.backends import get_backend
from ldm_runtime.backends.contract import EngineSource
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.conditioning import encode_conditioning, open_tokenizer
from ldm_runtime.pipeline.batching import run_together
from ldm_runtime.pipeline.sampling import sample_latents
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.testing import write_tiny_bundle

pytestmark = [pytest.mark.reference, pytest.mark.slow]

REQUESTS = (
    {"prompt": "a large red circle", "seed": 1, "num_inference_steps": 4},
    {"prompt": "a small blue square", "seed": 2, "guidance_scale": 1.0, "num_inference_steps": 3},
    {"prompt": "a cross", "seed": 3, "sampler": "euler_ancestral", "num_inference_steps": 5},
    {"prompt": "a green triangle", "negative_prompt": "red", "seed": 4, "sampler": "dpmpp_2m_sde"},
    {"prompt": "a red cross", "seed": 5, "sampler": "heun", "num_images": 2},
    {"prompt": "a blue circle", "seed": 6, "guidance_interval": (0.5, 5.0)},
    {"prompt": "two squares", "seed": 7, "sampler": "unipc", "height": 32, "width": 96},
    {"prompt": "a circle", "seed": 8, "sampler": "dpmpp_2m", "guidance_scale": 3.0},
)


@pytest.fixture(scope="module", params=["shapes", "small"])
def bundle(request):
    """Fp16 weights, widened by ONNX Runtime, and fp32 weights."""
    return request.getfixturevalue(
        {"shapes": "shapes_bundle", "small": "small_bundle_fp32"}[request.param]
    )


def open_engine(bundle, name, threads):
    manifest = load_manifest(bundle)
    source = EngineSource(
        bundle=bundle, manifest=manifest, component=manifest.component(name), threads=threads
    )
    return get_backend("onnxruntime").open_engine(source)


def random_rows(spec, rows, height, width):
    rng = np.random.default_rng(0)
    tokens = (spec.networks["text_encoder"].max_tokens, spec.unet.context_dim)
    return {
        "latents": rng.normal(size=(rows, spec.unet.in_channels, height, width)).astype("f4"),
        "timesteps": rng.uniform(0, 999, size=rows).astype("f4"),
        "context": rng.normal(size=(rows, *tokens)).astype("f4"),
    }


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_two_rows_or_more_are_the_same_in_any_company(bundle, threads):
    inputs = random_rows(load_manifest(bundle).spec, 8, 16, 12)

    with open_engine(bundle, "unet", threads) as unet:
        alone = [
            unet.run({name: array[i : i + 2] for name, array in inputs.items()})["prediction"]
            for i in range(0, 8, 2)
        ]
        for bounds in ((0, 8), (0, 2, 8), (0, 3, 8), (0, 4, 8), (0, 5, 8)):
            parts = [
                unet.run({name: array[slice(*part)] for name, array in inputs.items()})
                for part in pairwise(bounds)
            ]
            found = np.concatenate([part["prediction"] for part in parts])
            np.testing.assert_array_equal(found, np.concatenate(alone))


@pytest.mark.parametrize(("threads", "max_samples"), [(1, 8), (2, 4)])
def test_requests_get_together_bit_for_bit_what_they_get_alone(bundle, threads, max_samples):
    manifest = load_manifest(bundle)
    spec = manifest.spec
    tokenizer = open_tokenizer(bundle / manifest.tokenizer_file, spec)
    requests = [
        resolve(GenerationRequest(**{"num_inference_steps": 3} | each), spec) for each in REQUESTS
    ]
    with open_engine(bundle, "text_encoder", threads) as encoder:
        conditionings = [
            encode_conditioning(lambda _: encoder, tokenizer, each, spec) for each in requests
        ]

    def loop_of(request, conditioning):
        return lambda engine: sample_latents(engine, conditioning, request, spec)

    loops = [loop_of(*each) for each in zip(requests, conditionings, strict=True)]
    with open_engine(bundle, "unet", threads) as unet:
        together = [[] for _ in loops]
        for index, step in run_together(loops, unet, max_samples=max_samples, min_samples=2):
            together[index].append(step.latents)
        alone = [[step.latents for step in loop(unet)] for loop in loops]

    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_benchmark_prints_one_line_with_both_ways(tmp_path, capsys):
    write_tiny_bundle(tmp_path)

    code = benchmark.main(["--bundle", str(tmp_path), "--repetitions", "3", "--requests", "2"])

    line = json.loads(capsys.readouterr().out)
    assert code == 0
    assert line["identical"] is True
    assert [(row["name"], row["settings"]["clock"]) for row in line["rows"]] == [
        ("alone", "wall"),
        ("alone", "process"),
        ("together", "wall"),
        ("together", "process"),
    ]
    assert all(len(row["seconds"]) == 3 for row in line["rows"])
