"""One small file per family of open weights: how its config becomes ours, and how its keys do, in both directions.

FAMILY                               what messages call it
CLASSES                              the classes that its config.json may name
config_from(found, shapes, place)    our config of a config.json in any dialect; where `found` is {}, of
                                     the tensors' shapes alone; `place` is for errors
config_to_diffusers(config)          config.json as diffusers wants it
config_to_original(config)           as the original release has it (where it has one)
dialect_of(shapes)                   "original" or "diffusers", by the names alone, "" for another family's
keymap(config, dialect)              a KeyMap, our names ↔ that dialect's
"""
