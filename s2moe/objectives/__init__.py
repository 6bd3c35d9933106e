"""Auxiliary losses: plain functions on tensors, for text and vision alike."""
