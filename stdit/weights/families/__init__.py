"""One small file per family of open weights. Each says, in both directions, how the family's config becomes ours and how its
keys do:

    config_from(found: dict, shapes: dict[str, shape]) -> our config     # any dialect's config.json, our own among them;
                                                                         # `shapes`: the file's tensors, where {} must do
    config_to_diffusers(config) -> dict                                  # config.json as diffusers wants it
    dialect_of(shapes) -> "original" | "diffusers"                       # by the names alone
    keymap(config, dialect) -> KeyMap                                    # native names ↔ that dialect's
"""
