"""What is computed once before training: clips to cached latents and embeddings, clips to captions. Imports data,
text, vae and weights."""
