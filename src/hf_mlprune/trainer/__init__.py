"""Pruning in the stock Trainer."""
