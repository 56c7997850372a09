"""`vcdeft` in a process of its own that also knows the family `tiny_unet`."""

from tiny_unet import NAME, TINY_UNET

from visualcloze_deft.backbones.table import BACKBONES
from visualcloze_deft.cli import main

if __name__ == "__main__":
    BACKBONES[NAME] = TINY_UNET
    main()
