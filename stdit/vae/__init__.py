"""The causal video VAE in Wan's layout: config, layers, autoencoder, streaming. Imports shapes and errors only."""
