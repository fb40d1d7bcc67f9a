"""Train the shapes model: autoencoder, text encoder, UNet, then one CompVis checkpoint of all.

    python models/shapes/train.py autoencoder   # about 30 minutes on two cores
    python models/shapes/train.py text          # about 5 minutes on one core
    python models/shapes/train.py diffusion     # about 75 minutes
    python models/shapes/train.py pack          # writes models/shapes/shapes.ckpt and shapes.yaml
    python models/shapes/train.py unpack        # goes back from shapes.ckpt to where to go on

Every step goes on from its last saved state, seeds are fixed, and the loss goes to `log.jsonl`.
"""

import argparse

import torch

from ldm_export.detection.weight_assignment import ema_name
from models.shapes.catalog.noise import TOLD
from models.shapes.catalog.shapes_unet import UNET
from models.shapes.data import scenes
from models.shapes.training.autoencoder import AUTOENCODER, load_latents, train_autoencoder, under
from models.shapes.training.checkpoint_writer import (
    compvis_state,
    schedule_buffers,
    write_checkpoint,
)
from models.shapes.training.clip_text import (
    TEXT_ENCODER,
    load_text_encoder,
    train_text,
    unpacked_text,
)
from models.shapes.training.config_writer import write_config
from models.shapes.training.diffusion import train_diffusion
from models.shapes.training.trainer import HERE, WORK
from models.shapes.training.velocity import alphas_cumprod


def pack() -> None:
    """Write the trained weights as a CompVis-style checkpoint in fp16, and its configuration."""
    autoencoder = torch.load(WORK / "autoencoder.pt", weights_only=True)
    diffusion = torch.load(WORK / "diffusion.pt", weights_only=True)
    _, scale = load_latents()
    # `encoder.encoder.*` and `encoder.quant_conv.*` here, one level less in a checkpoint.
    halves = {name.split(".", 1)[1]: value for name, value in autoencoder["ema"].items()}
    state = compvis_state(
        halves,
        load_text_encoder().state_dict(),
        diffusion["model"],
        diffusion["ema"],
    )
    state |= schedule_buffers(alphas_cumprod(TOLD))
    state["scale_factor"] = torch.tensor(scale)
    write_checkpoint(HERE / "shapes.ckpt", state, diffusion["step"])
    write_config(
        HERE / "shapes.yaml",
        unet=UNET,
        autoencoder=AUTOENCODER,
        text_encoder=TEXT_ENCODER,
        schedule=TOLD.schedule,
        latent_size=scenes.SIZE // AUTOENCODER.factor,
    )


def unpack() -> None:
    """Write the states that the steps go on from, out of the packed checkpoint, in fp16.

    The state of the optimizer is not in a checkpoint: going on begins with a warm-up.
    """
    packed = torch.load(HERE / "shapes.ckpt", weights_only=True)
    state = {name: value.float() for name, value in packed["state_dict"].items()}
    encoders = ("encoder.", "quant_conv.")
    autoencoder = {
        f"{'encoder' if name.startswith(encoders) else 'decoder'}.{name}": value
        for name, value in under("first_stage_model.", state).items()
    }
    text = under("cond_stage_model.transformer.", state)
    unet = under("model.diffusion_model.", state)
    averages = {name: state[ema_name(f"model.diffusion_model.{name}")] for name in unet}
    WORK.mkdir(exist_ok=True)
    torch.save({"ema": autoencoder}, WORK / "autoencoder.pt")
    torch.save(unpacked_text(text), WORK / "text.pt")
    diffusion = {"model": unet, "ema": averages, "optimizer": None}
    torch.save(diffusion | {"step": packed["global_step"]}, WORK / "diffusion.pt")


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = {
        "autoencoder": train_autoencoder,
        "text": train_text,
        "diffusion": train_diffusion,
        "pack": pack,
        "unpack": unpack,
    }
    parser.add_argument("step", choices=steps)
    steps[parser.parse_args().step]()


if __name__ == "__main__":
    main()
