"""Scenes for a real test of recognition, made of photographs that ship in three packages of Debian:
a cut-out object on a ground.

    spiketrain write stamps --out data/stamps-0 --size 160 --split 0
    data=spec(Beton, folder="data/stamps-0", classes=13, size=160)

What is tested was never seen: of each class a quarter of the objects, and a quarter of the grounds,
stand in the evaluation set alone. Which object a scene shows is kept beside the set, for statistics
over objects instead of images: `Beton.groups`.

    pictures.py   the pictures, their classes, and which of them train and which evaluate
    scenes.py     from a number to a scene
    write.py      train.beton and val.beton
"""
