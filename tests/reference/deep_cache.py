"""DeepCache over the modules of a UNet of diffusers, written as its paper has it.

Ma et al. 2023 (arXiv:2312.00858): a call of the whole UNet in every interval; the calls between
compute the first blocks of the first level and the last ones on the way up, which take the features
that the whole call had there.
"""

import torch
from diffusers import UNet2DConditionModel


class DeepCache:
    """The forward pass of a UNet, which it replaces.

    Args:
        unet: The UNet.
        interval: Calls from one of the whole to the next.
        blocks: Residual blocks on the way up that every call computes.
    """

    def __init__(self, unet: UNet2DConditionModel, interval: int, blocks: int):
        self.unet, self.interval, self.blocks = unet, interval, blocks
        self.calls, self.features, self.whole = 0, None, unet.forward
        unet.up_blocks[-1].resnets[-blocks].register_forward_pre_hook(self._keep)
        unet.forward = self

    def __call__(self, sample, timestep, encoder_hidden_states, **options):
        self.calls += 1
        if (self.calls - 1) % self.interval == 0:
            return self.whole(sample, timestep, encoder_hidden_states, **options)
        return (self._shallow(sample, timestep, encoder_hidden_states),)

    def _keep(self, _resnet, arguments):
        hidden = arguments[0]  # with the skip connection behind it, as wide as the first level
        self.features = hidden[:, : hidden.shape[1] - self.unet.config.block_out_channels[0]]

    def _shallow(self, sample, timestep, context):
        unet, number = self.unet, self.blocks
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
        hidden = unet.conv_in(sample)
        skips = [hidden]
        for index in range(number - 1):
            hidden = _layer(unet.down_blocks[0], index, hidden, embedding, context)
            skips.append(hidden)
        hidden, block = self.features, unet.up_blocks[-1]
        for index in range(len(block.resnets) - number, len(block.resnets)):
            joined = torch.cat([hidden, skips.pop()], dim=1)
            hidden = _layer(block, index, joined, embedding, context)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def _layer(block, index, hidden, embedding, context):
    hidden = block.resnets[index](hidden, embedding)
    if not hasattr(block, "attentions"):
        return hidden
    attention = block.attentions[index]
    return attention(hidden, encoder_hidden_states=context, return_dict=False)[0]
