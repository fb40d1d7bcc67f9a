"""A scene of three things and readings of images of it, for tests of their scoring."""

from models.shapes.data import scenes
from models.shapes.evaluation import detector

RED = scenes.Thing(kind="circle", color="red", size="large", x=16.0, y=20.0, radius=12.0)
BLUE = scenes.Thing(kind="square", color="blue", size="small", x=48.0, y=20.0, radius=6.5)
GREEN = scenes.Thing(kind="cross", color="green", size="small", x=16.0, y=52.0, radius=6.5)
SCENE = scenes.Scene(
    things=(RED, BLUE, GREEN), relations=("left of", "above"), background="white", gradient=False
)


def reading(*things, background="white", gradient=False):
    return detector.Reading(
        things=things, overlaps=(1.0,) * len(things), background=background, gradient=gradient
    )


def recolored(thing, color):
    return thing._replace(color=color)


def moved(thing, x, y):
    return thing._replace(x=x, y=y)
