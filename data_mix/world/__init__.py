"""The bundled world: a small short-video world with its exact truth, made on the spot. See make.py and view.py."""

from data_mix.world.make import make_world
from data_mix.world.view import view_world

__all__ = ["make_world", "view_world"]
