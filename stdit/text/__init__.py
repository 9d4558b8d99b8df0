"""Text encoders, tokenizers and the captioner. Imports transformers when used, and no other part of stdit."""
