"""How the layers are spread over processes."""

from s2moe.parallel.expert_parallel import ExpertParallel

__all__ = ["ExpertParallel"]
