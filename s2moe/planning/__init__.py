"""What a run would need on a cluster, and which parallel shape is the fastest there: see launcher/plan.py."""
