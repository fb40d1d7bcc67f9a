"""The denoising UNet of latent diffusion, with or without a context to attend to.

Architecture: Rombach et al. 2022 (arXiv:2112.10752), section 3.3 and appendix E, on the UNet of
Dhariwal and Nichol 2021 (arXiv:2105.05233). Parameter names are those under
`model.diffusion_model.` in CompVis checkpoints. Two normalisation epsilons are part of the
trained models: 1e-5 in residual blocks, attention blocks and the output, 1e-6 at the entry of a
transformer.
"""

import torch
from torch import Tensor, nn

from ldm_export.networks.attention import AttentionBlock, SpatialTransformer
from ldm_export.networks.unet_blocks import (
    Downsample,
    Resampling,
    ResBlock,
    UNetBlock,
    Upsample,
    timestep_embedding,
)
from ldm_runtime.specs.networks import UNetSpec

_GROUPS = 32


def _embedding(channels: int, embedding_dim: int) -> nn.Sequential:
    """Return the two layers that a timestep's features, or a vector, pass."""
    return nn.Sequential(
        nn.Linear(channels, embedding_dim),
        nn.SiLU(),
        nn.Linear(embedding_dim, embedding_dim),
    )


class UNet(nn.Module):
    """Predicts the noise (or v, or x0) in latents, given a timestep and perhaps a context."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding_dim = 4 * spec.model_channels
        self.time_embed = _embedding(spec.model_channels, self.embedding_dim)
        if spec.vector_dim is not None:
            self.label_emb: nn.Module = nn.Sequential(
                _embedding(spec.vector_dim, self.embedding_dim)
            )
        elif spec.num_classes is not None:
            self.label_emb = nn.Embedding(spec.num_classes, self.embedding_dim)
        if spec.guidance_dim is not None:
            # These models are later than CompVis' code, and have the name that diffusers gave them.
            projection = nn.Linear(spec.guidance_dim, spec.model_channels, bias=False)
            self.time_embedding = nn.ModuleDict({"cond_proj": projection})
        self.input_blocks, widths = self._encoder()
        self.middle_block = UNetBlock(*self._middle(widths[-1]))
        self.output_blocks = self._decoder(widths)
        self.out = nn.Sequential(
            nn.GroupNorm(_GROUPS, spec.model_channels, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(spec.model_channels, spec.out_channels, 3, padding=1),
        )

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        vector: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict from noisy latents.

        Args:
            latents: (B, in_channels, h, w), h and w multiples of 2 ** (levels - 1). Channels of
                concatenated conditioning follow those of the latents.
            timesteps: (B,) float32, 0 to the length of the training schedule, may be fractional.
            context: (B, T, context_dim), or None for a UNet without cross-attention.
            vector: (B, vector_dim), or None for a UNet without.
            class_labels: (B,) int64, or None for a UNet without.
            guidance: Features of the guidance scale (B, guidance_dim), or None for a UNet without.

        Returns:
            Prediction (B, out_channels, h, w), and with `spec.shallow_blocks` the deep features
            (B, deep_channels, h, w) that enter as many output blocks, the last ones.
        """
        assert (context is None) == (self.spec.context_dim is None)
        features = timestep_embedding(timesteps, self.spec.model_channels).to(latents.dtype)
        embedding = self._embed(features, vector, class_labels, guidance)
        hidden, skips = self._down(latents, embedding, context)
        hidden = self.middle_block(hidden, embedding, context)
        deep = hidden
        for block in self.output_blocks:
            if len(skips) == self.spec.shallow_blocks:
                deep = hidden
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), embedding, context)
        prediction: Tensor = self.out(hidden)
        return prediction if self.spec.shallow_blocks is None else (prediction, deep)

    def _embed(
        self,
        features: Tensor,
        vector: Tensor | None,
        class_labels: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """Return the embedding of a timestep's features, vector or class, and guidance scale."""
        assert (vector is None) == (self.spec.vector_dim is None)
        assert (class_labels is None) == (self.spec.num_classes is None)
        assert (guidance is None) == (self.spec.guidance_dim is None)
        if guidance is not None:
            features = features + self.time_embedding["cond_proj"](guidance)
        embedding: Tensor = self.time_embed(features)
        label = class_labels if vector is None else vector
        return embedding if label is None else embedding + self.label_emb(label)

    def _down(
        self, latents: Tensor, embedding: Tensor, context: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the features after the way down, and those that are skipped to the way up."""
        hidden, skips = latents, []
        for block in self.input_blocks:
            hidden = block(hidden, embedding, context)
            skips.append(hidden)
        return hidden, skips

    def _encoder(self) -> tuple[nn.ModuleList, list[int]]:
        spec, channels = self.spec, self.spec.model_channels
        blocks = nn.ModuleList([UNetBlock(nn.Conv2d(spec.in_channels, channels, 3, padding=1))])
        widths = [channels]
        for level, mult in enumerate(spec.channel_mult):
            for depth in spec.input_depths(level):
                width = mult * spec.model_channels
                mixing = self._mixing(width, depth, level)
                blocks.append(UNetBlock(self._res(channels, width), *mixing))
                channels = width
                widths.append(channels)
            if level + 1 < len(spec.channel_mult):
                blocks.append(UNetBlock(self._resample(channels, "down")))
                widths.append(channels)
        return blocks, widths

    def _middle(self, channels: int) -> list[nn.Module]:
        """Return the layers of the middle block, which without any is the identity."""
        depth = self.spec.middle_depth
        layers = [] if depth is None else [self._res(channels, channels)]
        if depth:
            layers += [*self._mixing(channels, depth), self._res(channels, channels)]
        return layers

    def _decoder(self, widths: list[int]) -> nn.ModuleList:
        spec, channels = self.spec, widths[-1]
        skips, blocks = list(widths), nn.ModuleList()
        for level, mult in reversed(list(enumerate(spec.channel_mult))):
            depths = spec.output_depths(level)
            for index, depth in enumerate(depths, start=1):
                width = mult * spec.model_channels
                mixing = self._mixing(width, depth, level)
                layers = [self._res(channels + skips.pop(), width), *mixing]
                channels = width
                if level > 0 and index == len(depths):
                    layers.append(self._resample(channels, "up"))
                blocks.append(UNetBlock(*layers))
        return blocks

    def _res(
        self, in_channels: int, out_channels: int, resampling: Resampling | None = None
    ) -> nn.Module:
        return ResBlock(
            in_channels,
            out_channels,
            self.embedding_dim,
            scale_shift_norm=self.spec.scale_shift_norm,
            resampling=resampling,
        )

    def _resample(self, channels: int, direction: Resampling) -> nn.Module:
        if self.spec.resblock_updown:
            return self._res(channels, channels, direction)
        return Downsample(channels) if direction == "down" else Upsample(channels)

    def _mixing(self, channels: int, depth: int, level: int | None = None) -> list[nn.Module]:
        """Return the attention after a residual block of a level or the middle, if there is one."""
        if not depth:
            return []
        if self.spec.attention == "qkv":
            return [AttentionBlock(self.spec, channels)]
        to_itself = level not in self.spec.cross_attention_only
        return [SpatialTransformer(self.spec, channels, depth, to_itself=to_itself)]


class ShallowUNet(UNet):
    """The outermost blocks of a UNet, which take what is between them from an earlier call.

    Deep features change slowly from step to step of sampling, so that one call of the whole UNet
    serves several steps. Parameters have the names that they have in the whole.

    Source: Ma et al. 2023, DeepCache (arXiv:2312.00858).
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__(spec)
        assert spec.shallow_blocks is not None, "the component of a UNet that has a shallow graph"
        del self.middle_block
        self.input_blocks = self.input_blocks[: spec.shallow_blocks]
        last = dict(list(self.output_blocks.named_children())[-spec.shallow_blocks :])
        self.output_blocks = nn.ModuleDict(last)  # type: ignore[assignment]  # numbered as before

    def forward(  # noqa: PLR0913  (the inputs of the graph, in their order)
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        vector: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance: Tensor | None = None,
        deep_features: Tensor | None = None,
    ) -> Tensor:
        """Predict from noisy latents and deep features.

        Args:
            latents: As for `UNet.forward`, and likewise `timesteps`, `vector`, `class_labels` and
                `guidance`.
            timesteps: (B,).
            context: (B, T, context_dim), or None if none of these blocks attends to it.
            vector: (B, vector_dim), or None.
            class_labels: (B,), or None.
            guidance: (B, guidance_dim), or None.
            deep_features: (B, deep_channels, h, w), from a call of the whole.

        Returns:
            Prediction (B, out_channels, h, w).
        """
        assert deep_features is not None, "the last input of the graph"
        assert (context is None) == (self.spec.shallow_context_dim is None)
        features = timestep_embedding(timesteps, self.spec.model_channels).to(latents.dtype)
        embedding = self._embed(features, vector, class_labels, guidance)
        _, skips = self._down(latents, embedding, context)
        hidden = deep_features
        for block in self.output_blocks.children():
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), embedding, context)
        prediction: Tensor = self.out(hidden)
        return prediction
