"""SmartMoE for Megatron: expert-parallel GPT-MoE training whose load balancing never changes what is trained."""

__version__ = "0.1.0"
