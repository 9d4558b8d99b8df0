"""What a clip's loss is: flow matching (and the other paths) for the transformer, reconstruction for the VAE.
Imports models, vae, diffusion and engine/optimizer."""
