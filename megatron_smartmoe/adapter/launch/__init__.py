"""The launcher behind scripts/pretrain_gpt_moe.sh: from one command line to running ranks, on any machine."""
