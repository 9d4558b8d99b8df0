"""Other families' autoencoders behind the interface of `vae.autoencoder`."""
