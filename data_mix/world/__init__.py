"""The bundled world: a small short-video world with its exact truth, made on the spot from one seed.

    world.json                    version, size, seed, counts, classes, held_out pairs
    clips/{train,test}/NAME.mp4   H.264 and stereo AAC; NAME.json: things, events, boxes and visible shares at the
                                  sampled frames, signs, sounds with onsets, title, comments, likes, series, topic
    stills/{train,test}/*.jpg     pictures of the eval rows
    items/item-0001{,-b}.jpg      the shop, two views each, with item-0001.json
    users.jsonl                   hidden taste, and what was watched and bought in order
    text/{text,text_chat}.jsonl   written descriptions, questions and answers
    sources/FAMILY/               training samples as source folders (data_mix.shards); those about videos hold,
                                  besides the clips, silent ones of only the frames that a model samples
    eval/TASK.jsonl               rows of split seen, unseen (held-out pairs), train (for probes)
    kc/{subsets/TASK.tsv,images/,ceilings.json}   six tasks shaped like KC-MMBench

words.py is the vocabulary and what is held out; scene.py, motion.py lay out and move things; paint.py, render.py
draw them; sound.py, encode.py make them heard and filed; truth.py tells what is really seen; text.py, stills.py,
tasks.py, documents.py ask about it; shop.py, kc.py are people, products and their tasks; make.py runs it all.
"""

from data_mix.world.make import make_world
from data_mix.world.view import view_world

__all__ = ["make_world", "view_world"]
