"""What a pruned checkpoint carries: torch, transformers and the standard library only."""
