"""Graphs of the UNet in 8 bits: measured, chosen by what they cost images, added to a bundle."""
