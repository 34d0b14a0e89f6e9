"""Distillation: what a teacher computes of the same inputs, as a loss."""
