"""A program that uses the public API with every kind of input, for type checkers to read.

Every line marked `# slip` has a mistake that a type checker has to find, and no other line has one.
"""

from pathlib import Path
from typing import assert_type

import numpy as np
from PIL import Image

from ldm_runtime import GenerationRequest, Generator, RequestFields, Result, Step

PROMPT = "a large red circle left of a small blue square on a white background"


def show(step: Step) -> None:
    step.previews[0].show()


def calls(generator: Generator, shared: RequestFields) -> None:
    assert_type(generator(PROMPT, seed=7, sampler="euler", schedule="karras"), Result)
    assert_type(generator.generate(PROMPT, negative_prompt=None, guidance_scale=5), Result)
    generator(prompt=PROMPT, deadline_seconds=60, progress=True, previews=True, on_step=show)
    generator(GenerationRequest(PROMPT), **shared)
    generator(generator(PROMPT).request, seed=8)
    for event in generator.stream(PROMPT, num_inference_steps=20, previews=True):
        assert_type(event, Step | Result)
    together = generator.run_many([PROMPT, GenerationRequest(PROMPT)], max_batch=2, height=64)
    assert_type(list(together), list[Result])
    generator.run_many([{"prompt": PROMPT, "seed": 7}, {"class_label": 3}], deadline_seconds=9.5)


def inputs() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    GenerationRequest(PROMPT, image="circle.png", strength=0.5)
    GenerationRequest(PROMPT, image=Path("circle.png"), mask_image=b"bytes of a file")
    GenerationRequest(PROMPT, image=pixels, mask_image=Image.new("L", (64, 64)))
    GenerationRequest(layout=[{"label": 3, "box": [0.1, 0.2, 0.5, 0.9]}])
    GenerationRequest(segmentation="map.png", embeddings=np.ones((1, 8), dtype=np.float32))
    GenerationRequest(PROMPT, depth_map="depth.png", image=pixels)
    GenerationRequest(PROMPT, sigmas=[14.6, 6.3, 2.5], guidance_interval=(0.3, 5), noise="numpy")
    GenerationRequest(PROMPT, sigmas=np.linspace(14, 1, 8), outpaint=[0, 0, 8, 8])
    GenerationRequest(PROMPT, original_size=(512, 768), crop_top_left=[0, 8], aesthetic_score=7)


def results(result: Result) -> None:
    assert_type(result.image, Image.Image)
    assert_type(result[0], Image.Image)
    assert_type(result.seeds, list[int])
    assert_type(result.save_all(Path("out")), list[Path])
    result.save("circle.png")
    for image in result:
        image.show()


def slips(generator: Generator) -> None:
    generator(PROMPT, num_inference_step=25)  # slip
    generator(PROMPT, num_inference_steps="many")  # slip
    generator(PROMPT, sampler="eulr")  # slip
    generator.generate(PROMPT, schedule="cosine")  # slip
    generator.stream(PROMPT, steps=3)  # slip
    generator.run_many([PROMPT], guidence_scale=3)  # slip
    generator.run_many([{"prompts": PROMPT}])  # slip
    generator(PROMPT, on_step=3)  # slip
    GenerationRequest(PROMPT, image=3.5)  # slip
    GenerationRequest(PROMPT, noise="philox")  # slip
    Generator("engines", backend="cpuu")  # slip


def opened() -> Generator:
    return Generator("engines", backend="cpu", threads=2)
