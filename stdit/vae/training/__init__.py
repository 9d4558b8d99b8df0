"""What trains a VAE: losses, LPIPS, the discriminator, which parts are trained."""
