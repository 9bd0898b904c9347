"""umedtrain: post-training for Llama-3 on plain PyTorch."""
