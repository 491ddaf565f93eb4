"""Stages, losses, self-sampling, distillation."""
