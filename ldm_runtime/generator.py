"""The generator: an open bundle that turns requests into images.

Every phase is a separate function over anything with `run` (`conditioning.encode_conditioning`,
`pipeline.sampling.sample_latents`, `latents.codec.decode_latents`), so that one network at a time
can be in memory and the golden images of an export come from the same loop as the deployed ones.
"""

import collections.abc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, Unpack

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.adapters.merging import AdapterInput, Adapters
from ldm_runtime.backends import BackendName, get_backend
from ldm_runtime.backends.contract import Precision, RunOptions
from ldm_runtime.backends.turns import Turns
from ldm_runtime.bundle.manifest import PreviewRecord
from ldm_runtime.closing import Closing
from ldm_runtime.conditioning import conditioning_components
from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.reading import MAX_SIDE
from ldm_runtime.latents.codec import decode_latents, encode_image
from ldm_runtime.pipeline.continuous import ContinuousBatch, Sharing
from ldm_runtime.pipeline.deadline import Deadline
from ldm_runtime.pipeline.image_pipeline import ImagePipeline
from ldm_runtime.pipeline.opening import OpeningOptions, open_bundle, open_refiner
from ldm_runtime.pipeline.results import Result
from ldm_runtime.pipeline.sampling import Step, batches
from ldm_runtime.pipeline.step_reports import report_results, report_steps
from ldm_runtime.progress import reporting_to
from ldm_runtime.requests.call_arguments import request_from, requests_from
from ldm_runtime.requests.checks import check_positive, whole_number
from ldm_runtime.requests.input_types import (
    DecoderName,
    FileInput,
    ImageInput,
    PromptFields,
    RequestFields,
)
from ldm_runtime.requests.refiner import check_refiner
from ldm_runtime.requests.request import GenerationRequest, takes_fields
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import NoReuse, ResolvedRequest
from ldm_runtime.requests.task_checks import check_decoder
from ldm_runtime.specs.model import ModelSpec, components_of
from ldm_runtime.specs.tasks import samples_per_image, task_record

__all__ = ["Generator", "Result"]

Float32Array = npt.NDArray[np.float32]
#: A prompt, a whole request, or None for a request without a prompt.
Prompt: TypeAlias = str | GenerationRequest | ResolvedRequest | None


class Generator(Closing):
    """An open bundle that generates images from requests.

    Threads may share one; a request does not change it. The same request gives the same bytes
    from the same bundle, backend and machine, whatever else is being generated.

    Args:
        bundle: Folder made by `ldm-export`.
        refiner: Folder of a second bundle, whose model makes the last steps of every request, such
            as SDXL's refiner; `refiner_start` of a request says where it takes over. Its networks
            are opened when they are first needed. It is opened with the same options, but for
            `sha256`.
        backend: Backend that runs the networks; "auto" takes the best that can run here, and "cpu"
            is "onnxruntime".
        precision: Precision that networks compute in, of those that the backend has; None is the
            backend's own choice: fp16 on GPUs, bf16 in OpenVINO where the processor has it, else
            fp32. It is `precision` of the open generator.
        threads: Threads that compute; None is one per physical core that this process may use.
        batch_size: Images in one network call; with guidance the UNet sees twice as many. The
            default of 1 bounds memory, costs a CPU little, and makes every image independent of
            how many were asked for to the last bit, which larger batches promise only as far as
            the backend is batch-invariant.
        low_memory: Whether one network at a time is in memory: each is opened when it runs, and
            closed when another one is to run, which costs a request the time to open them. The
            images are the same. Threads that share the generator wait for each other.
        check_hashes: Whether to compare the files with the manifest's hashes, not only sizes.
        sha256: Hash that `manifest.json` must have, as `ldm inspect` prints it; since that file has
            the hashes of all others, it pins the whole bundle. None takes any bundle.
        trust_engines: Whether to run TensorRT engines that were not built on this machine. They
            are code: say so only of a bundle from a source you trust.
        options: Options of the engines, where the backend has the choice.
        textual_inversions: Words that prompts may use, each with its file of learned embeddings:
            a path, a `data:` URL or the bytes, in a format of AUTOMATIC1111's web UI or of
            diffusers.
        adapters: LoRAs and their relatives, each a file with the factor of its updates, merged into
            the weights in memory: of kohya's trainers, LyCORIS, PEFT or diffusers. The bundle and a
            refiner stay as they are. TensorRT's engines have their weights built in and take none.
        live_adapters: LoRAs by name that are not merged, but are inputs of the networks: each
            request of an open batch gives their scales, at most two at once, and requests with
            others share calls. They cost a call a little time, used or not. ONNX Runtime and
            OpenVINO on the CPU take them.

    Raises:
        RequestError: A textual inversion or an adapter cannot be read, or is for another model.
        BundleError: A bundle is incomplete or altered, or not the one with that hash; or the
            refiner has other latents.
        BackendError: The backend cannot run here.
    """

    def __init__(  # noqa: PLR0913  (options of the public constructor, all by name)
        self,
        bundle: str | Path,
        *,
        refiner: str | Path | None = None,
        backend: BackendName = "auto",
        precision: Precision | None = None,
        threads: int | None = None,
        batch_size: int | None = None,
        low_memory: bool = False,
        check_hashes: bool = True,
        sha256: str | None = None,
        trust_engines: bool = False,
        options: RunOptions | None = None,
        textual_inversions: Mapping[str, FileInput] | None = None,
        adapters: Adapters | None = None,
        live_adapters: Mapping[str, AdapterInput] | None = None,
    ) -> None:
        check_positive("threads", threads)
        check_positive("batch_size", batch_size)
        options = options or RunOptions()
        options = replace(
            options,
            trust_engines=trust_engines or options.trust_engines,
            precision=precision or options.precision,
        )
        opening = OpeningOptions(
            backend=backend,
            threads=threads,
            check_hashes=check_hashes,
            options=options,
            textual_inversions=textual_inversions or {},
            adapters=adapters or {},
            live_adapters=live_adapters or {},
            turns=Turns() if low_memory else None,
        )
        opened = open_bundle(bundle, opening, sha256=sha256)
        self._refiner = None if refiner is None else open_refiner(refiner, opening)
        if self._refiner is not None:
            check_refiner(opened.model.spec, self._refiner.model.spec)
        self.bundle, self.manifest, self.backend = opened.folder, opened.manifest, opened.backend
        self.precision = get_backend(self.backend).ABILITIES.precision_of(options)
        self.spec = opened.model.spec
        self.live_adapters = opened.model.live
        self.bundle_sha256 = opened.model.origin.bundle_sha256
        self._batch_size = batch_size or 1
        self._network = opened.networks
        self._pipeline = ImagePipeline(
            model=opened.model, refiner=None if self._refiner is None else self._refiner.model
        )
        self._open_networks()

    def __repr__(self) -> str:
        defaults = self.spec.defaults
        size = f"{defaults.width}x{defaults.height}"
        state = " closed," if self._network.is_closed else ""
        where = f"{self.backend} in {self.precision}"
        if self._refiner is not None:
            state = f" refined by {str(self._refiner.folder)!r},{state}"
        adapters = self._pipeline.model.origin.adapters
        merged = "".join(f", {each.name}@{each.scale:g}" for each in adapters)
        return f"Generator({str(self.bundle)!r},{state} {self.spec.task}, {size}, {where}{merged})"

    def encode(self, image: ImageInput) -> Float32Array:
        """Return the latents (1, C, h, w) of an image, in the UNet's scale.

        They are the autoencoder's, scaled: of a KL autoencoder the mean of the posterior, of a VQ
        autoencoder the vectors before the codebook.

        Args:
            image: Anything that `InputImage.read` can read; sides are multiples of the
                autoencoder's factor.

        Raises:
            RequestError: It is not an image, or has another size.
        """
        try:
            pixels = InputImage.read(image).pixels
            return encode_image(self._network("vae_encoder"), pixels[None], self.spec)
        except ValueError as error:
            raise RequestError("image", str(error)) from error

    def decode(
        self, latents: Float32Array, *, tile_size: int = 0, decoder: DecoderName = "full"
    ) -> list[Image.Image]:
        """Return the images of latents (N, C, h, w) in the UNet's scale, such as `encode` gives.

        A VQ autoencoder takes the nearest vectors of its codebook first.

        Args:
            latents: Latents to decode.
            tile_size: Decode in tiles of this many pixels, which bounds memory; 0 is in one piece.
            decoder: "tiny" is the one of `ldm-export --tiny-decoder`.

        Raises:
            RequestError: The latents are not those of this model, or are not finite; the tiles are
                too small, or the model decodes in patches instead; it has no such decoder.
        """
        array = _checked_latents(latents, self.spec)
        check_decoder(GenerationRequest(decoder=decoder), self.spec)
        tile_size = whole_number("tile_size", tile_size, low=0, high=MAX_SIDE)
        if tile_size and "tile_size" not in task_record(self.spec).takes:
            raise RequestError("tile_size", f"means nothing to a bundle for {self.spec.task}")
        try:
            network = self._network(self.spec.decoders[decoder])
            return decode_latents(network, array, self.spec, tile_size, decoder)
        except ValueError as error:
            raise RequestError("tile_size", str(error)) from error

    @takes_fields
    def generate(
        self,
        prompt: Prompt = None,
        *,
        previews: bool = False,
        deadline_seconds: float | None = None,
        on_step: Callable[[Step], object] | None = None,
        progress: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Result:
        """Generate the images of a request; calling the generator itself is the same.

        Args:
            prompt: The prompt, or a whole request.
            previews: Whether steps carry small images of the predicted x0.
            deadline_seconds: How long it may take, which is looked at between two steps.
            on_step: Called after every step. What it raises ends the request and is passed on.
            progress: Whether to report to the standard error stream: a bar on a terminal, a line
                per image elsewhere.
            **fields: The fields of a `GenerationRequest`; they replace those of a whole request.

        Raises:
            RequestError: A field is unknown, of the wrong type or out of range, or the model cannot
                do what the request asks for.
            BundleError: There should be previews, and the bundle was exported without.
            DeadlineError: It takes longer than it may.
        """
        request = self._resolve(request_from(prompt, fields))
        with ExitStack() as stack:
            events: Iterable[Step | Result] = stack.enter_context(
                closing(self.stream(request, previews=previews, deadline_seconds=deadline_seconds))
            )
            if progress:
                reporter = stack.enter_context(reporting_to(sys.stderr))
                parts = list(batches(request.num_images, self._batch_size))
                events = report_steps(events, parts, reporter)
            for event in events:
                if isinstance(event, Result):
                    return event
                if on_step is not None:
                    on_step(event)
        raise AssertionError("a stream ends with its result")

    __call__ = generate

    @takes_fields
    def stream(
        self,
        prompt: Prompt = None,
        *,
        previews: bool = False,
        deadline_seconds: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> collections.abc.Generator[Step | Result, None, None]:
        """Generate the images of a request, yielding a `Step` after each step, then the `Result`.

        Nothing runs between two items, so closing the stream cancels the rest.

        Args:
            prompt: The prompt, or a whole request.
            previews: Whether steps carry small images of the predicted x0.
            deadline_seconds: How long it may take from the first item on; no step is interrupted.
            **fields: The fields of a `GenerationRequest`; they replace those of a whole request.

        Raises:
            RequestError: At once, if a field is wrong or the model cannot do what the request asks
                for.
            BundleError: At once, if there should be previews and the bundle was exported without.
            DeadlineError: Between two steps, when time is up.
        """
        request = self._resolve(request_from(prompt, fields))
        record = self._preview_record() if previews else None
        deadline = Deadline(deadline_seconds)
        return self._pipeline.stream(request, record, deadline, batch_size=self._batch_size)

    @takes_fields
    def run_many(
        self,
        requests: Iterable[str | GenerationRequest | ResolvedRequest | PromptFields],
        *,
        max_batch: int = 4,
        deadline_seconds: float | None = None,
        progress: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Iterator[Result]:
        """Generate the images of several requests at once and yield their results in order.

        Requests share calls of the UNet, whatever their prompts, seeds, samplers and guidance,
        where their images have the same size. On the CPU every result is what `generate` returns
        at a `batch_size` of 1, bit for bit; there, a single sample of the UNet (guidance off, or a
        model without) is not shared. An autoencoder alone runs one request after the other.

        Args:
            requests: Prompts, requests, or dictionaries of fields.
            max_batch: Most images in one call of the UNet; with guidance it sees twice as many.
            deadline_seconds: How long each request may take from its first call of a network on,
                waiting for the others included.
            progress: Whether to report each request to the standard error stream.
            **fields: Fields that all requests have; they replace those of each.

        Raises:
            RequestError: At once, if a field is wrong or the model cannot do what one of them asks
                for.
            DeadlineError: Between two steps, when the time of a request is up.
        """
        check_positive("max_batch", max_batch)
        resolved = [self._resolve(each) for each in requests_from(requests, fields)]
        deadlines = [Deadline(deadline_seconds) for _ in resolved]
        if self.spec.unet is None:
            results: Iterator[Result] = map(self.generate, resolved)
        else:
            most = samples_per_image(self.spec, "unet") * max_batch
            fewest = get_backend(self.backend).ABILITIES.min_shared_samples
            results = self._pipeline.together(
                resolved, deadlines, max_samples=most, min_samples=fewest
            )
        return report_results(results, len(resolved), sys.stderr) if progress else results

    def open_batch(self, *, max_batch: int = 4) -> ContinuousBatch:
        """Return a batch to which requests can be added while others run, as a server does.

        The number of images in a call changes all the time. Where a backend compiles the UNet for
        each, and keeps fewer than `max_batch` of them, a call has one image, and as many images
        take turns at it as shapes are kept, which may be of as many sizes. With `low_memory` and a
        refiner the earliest request is served first.

        Args:
            max_batch: Most images in one call of the UNet; with guidance it sees twice as many.
                Others wait.
        """
        check_positive("max_batch", max_batch)
        abilities, kept = get_backend(self.backend).ABILITIES, max_batch
        if abilities.kept_shapes is not None and self.spec.unet is not None:
            kept = abilities.kept_shapes(self.manifest.compiled_bytes("unet", self.precision))
        return ContinuousBatch(
            self._pipeline,
            resolve=self._resolve,
            preview=self._preview_record,
            sharing=Sharing(
                max_shared=max_batch if kept >= max_batch else 1,
                max_begun=min(kept, max_batch),
                min_samples=abilities.min_shared_samples,
                # Or two requests, one with its base and one with its refiner, would have a whole
                # UNet opened for every call.
                takes_turns=not (self._network.takes_turns and self._refiner is not None),
            ),
        )

    def close(self) -> None:
        """Close the networks. Closing twice is harmless."""
        self._network.close()
        if self._refiner is not None:
            self._refiner.networks.close()

    def _needed_components(self) -> list[str]:
        """Return the networks that requests take; others wait until one asks for them.

        Those are the image encoder, mostly, a tiny decoder, and a UNet's outermost blocks alone.
        """
        waits = {"vae_encoder", "tiny_decoder", "unet_shallow"}.difference(
            conditioning_components(self.spec)
        )
        return [name for name in components_of(self.spec) if name not in waits]

    def _open_networks(self) -> None:
        """Open the networks that requests take; a refiner's wait until it has steps to make.

        Where networks take turns in memory, each waits until it runs.
        """
        if self._network.takes_turns:
            return
        with ExitStack() as opened:
            opened.push(self._network)
            for name in self._needed_components():
                self._network(name)
            opened.pop_all()

    def _resolve(self, request: GenerationRequest | ResolvedRequest) -> ResolvedRequest:
        refiner = None if self._refiner is None else self._refiner.model.spec
        resolved = resolve(request, self.spec, refiner)
        if self._network.takes_turns and not isinstance(resolved.reuse, NoReuse):
            raise RequestError(
                "reuse",
                "does not go with low_memory, which would open the whole UNet for each of its "
                "calls; leave one of them out",
            )
        return resolved

    def _preview_record(self) -> PreviewRecord:
        if self.manifest.preview is None:
            raise BundleError(f"{self.bundle} was exported without previews; export it again")
        return self.manifest.preview


def _checked_latents(latents: object, spec: ModelSpec) -> Float32Array:
    array, channels = np.asarray(latents), spec.autoencoder.embed_dim
    if array.dtype.kind not in "fiu" or array.ndim != 4 or array.shape[1] != channels:
        raise RequestError(
            "latents",
            f"are {array.dtype} of shape {array.shape}; this model has numbers of shape "
            f"(images, {channels}, height, width)",
        )
    if not np.isfinite(array).all():
        raise RequestError("latents", "hold NaN or infinity; only finite numbers can be decoded")
    return array.astype(np.float32, copy=False)
