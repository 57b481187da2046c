"""Workloads of `smartmoe bench-imbalance`: token imbalance that is made, not recorded.

Two series. `compatible` follows the definitions of NVIDIA/Megatron-LM pull request 7488, whose numbers it reproduces;
`corrected` asks what those definitions cannot: heat apart from placement, sources that differ, hot spots that move.
"""
