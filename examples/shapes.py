"""Writes pictures of three shapes as photos/{train,val}/SHAPE/NNN.jpg: something to try ferkd on where no photographs are at hand.

python examples/shapes.py photos
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path, help="the folder to write")
out = parser.parse_args().out

SIDES = {"circle": 40, "square": 4, "triangle": 3}
random = np.random.default_rng(0)

for split, count in (("train", 100), ("val", 40)):
    for shape, sides in SIDES.items():
        folder = out / split / shape
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            background = random.integers(0, 100, (16, 16, 3), np.uint8)
            picture = Image.fromarray(background).resize((96, 72), Image.Resampling.BICUBIC)
            radius = int(random.integers(14, 26))
            centre = (int(random.integers(radius, 96 - radius)), int(random.integers(radius, 72 - radius)), radius)
            colour = tuple(int(value) for value in random.integers(130, 256, 3))
            ImageDraw.Draw(picture).regular_polygon(centre, sides, rotation=int(random.integers(-20, 21)), fill=colour)
            picture.save(folder / f"{number:03d}.jpg", quality=90)
