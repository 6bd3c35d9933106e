"""Figures that describe routing and experts: plain functions, for text and vision alike."""
