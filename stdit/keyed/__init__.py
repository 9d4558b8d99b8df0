"""Keyed randomness: the same key gives the same numbers on any rank, at any time, in any order.

Noise, noise levels, tasks, captions, crops and start times of a run follow from SHA-256 of (seed, purpose, …), starting
weights from (seed, name). So a run that is resumed, or has another number of ranks, draws the same numbers as an
uninterrupted one. `seeds` has single numbers; `stream` has many of one key, of which a rank draws only those that it
holds; `weights` has those that parameters start with.
"""

from stdit.keyed.seeds import keyed_bits as keyed_bits
from stdit.keyed.seeds import keyed_generator as keyed_generator
from stdit.keyed.seeds import keyed_seed as keyed_seed
from stdit.keyed.seeds import keyed_uniform as keyed_uniform
from stdit.keyed.seeds import random_seed as random_seed

VERSION = 2  # of the numbers that training draws; checkpoints record it
