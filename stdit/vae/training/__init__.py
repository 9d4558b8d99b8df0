"""Training a VAE: losses, LPIPS, the discriminator, and the choice of the part that trains."""
