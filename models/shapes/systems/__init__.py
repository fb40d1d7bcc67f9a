"""The other systems of the latent-diffusion paper, small: trained here on the same scenes."""
