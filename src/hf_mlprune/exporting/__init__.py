"""Pruned models for the engines that serve them."""
