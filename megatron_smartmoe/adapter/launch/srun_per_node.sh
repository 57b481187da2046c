#!/usr/bin/env bash
# srun with one task on each of N nodes:
#
#   srun_per_node.sh N [options of srun...] PROGRAM [arguments...]
#
# Launchers on the nodes are started this way by the launcher itself and, where everything runs in a container, by
# scripts/pretrain_gpt_moe.slurm, whose host need not have a Python.
exec srun --nodes "$1" --ntasks "$1" --ntasks-per-node 1 --cpu-bind=none --kill-on-bad-exit=1 "${@:2}"
