"""The sparse mixture-of-experts layer: routing, dispatch, experts, and S2MoE on top of them."""
