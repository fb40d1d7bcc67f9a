"""The runtime's loop over any networks, without a bundle."""

from ldm_runtime.pipeline.passes import open_passes
from ldm_runtime.pipeline.sampling import sample_latents
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve


def drawn_by(networks, tokenizer, spec, **fields):
    """Return the images of a request that is drawn in one pass by networks of these names."""
    request = resolve(GenerationRequest(**fields), spec)
    passes = open_passes(networks.__getitem__, tokenizer, request, spec)
    pass_run = passes.run(range(request.num_images))
    wanted = next(pass_run)
    *_, last = sample_latents(
        networks["unet"], wanted.conditioning, request, spec, start=wanted.start
    )
    try:
        pass_run.send(last.latents)
    except StopIteration as end:
        return end.value.images
    raise AssertionError("there is a second pass")
