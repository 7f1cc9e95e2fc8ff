"""Train the embedded base models from scratch on the corpora of `flora.corpus` (python -m flora.pretrain code|speech)."""
