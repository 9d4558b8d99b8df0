"""Text encoders, tokenizers and the captioner. Imports transformers, and no other part of stdit."""
