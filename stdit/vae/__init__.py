"""The causal video VAE in Wan's layout. `families/` has other autoencoders, `training/` the losses."""
