"""Small random models of every family, made by diffusers, and how each is called: the oracles of test_families.py."""

from references.base import Family
from references.base import in_fp64 as in_fp64
from references.base import randomise as randomise
from references.pixart_like import ALLEGRO, LATTE, PIXART
from references.texts import small_reason as small_reason
from references.video import COSMOS, LTX, WAN, WAN_IMAGE

FAMILIES: dict[str, Family] = {
    "Wan": WAN,
    "Wan I2V": WAN_IMAGE,
    "LTX-Video": LTX,
    "PixArt": PIXART,
    "Latte": LATTE,
    "Allegro": ALLEGRO,
    "Cosmos-Predict": COSMOS,
}
