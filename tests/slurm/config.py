"""The slurm.conf of a cluster whose nodes are all this host, and the ports that it may name.

The network is a tree, so that Slurm tells tasks their switches: nodes with odd numbers are at one, the others at the
other.
"""

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

MEMORY_PER_NODE_MB = 2000  # what a node claims to have; CR_CPU hands out cores only, nothing enforces it
CREDENTIAL_EXPIRES_S = 5  # Slurm starts a requeued job no sooner than this after its end (120 by default)


def render_slurm_conf(
    *, root: Path, controller_port: int, node_ports: Mapping[str, int], cpus_per_node: int, kill_wait_s: int
) -> str:
    """Return the text of slurm.conf: all files under `root`, no accounting, no cgroups, cores shared by jobs."""
    host = socket.gethostname().split(".")[0]
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": controller_port,
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={root / 'munge.sock'},cred_expire={CREDENTIAL_EXPIRES_S}",
        "StateSaveLocation": root / "state",
        "SlurmdSpoolDir": root / "spool" / "%n",
        "SlurmctldPidFile": root / "slurmctld.pid",
        "SlurmdPidFile": root / "slurmd-%n.pid",
        "ProctrackType": "proctrack/pgid",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "TopologyPlugin": "topology/tree",
        "MpiDefault": "none",
        "MailProg": "/bin/true",
        "SchedulerType": "sched/backfill",
        # a job starts at once: by default batch jobs wait 3 s, and requeued ones for a round every 30 s
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",  # nodes have the cores written below, whatever the host has
        "ReturnToService": 2,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "MinJobAge": 7200,  # seconds for which `scontrol show job` knows a job that has ended
        "KillWait": kill_wait_s,  # from TERM to KILL of a job that is over its time or cancelled
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus_per_node} "
        f"RealMemory={MEMORY_PER_NODE_MB} State=UNKNOWN"
        for name, port in node_ports.items()
    ]
    lines += [
        "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8",
        "PartitionName=preemptible Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30",
        "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=off",
    ]
    return "\n".join(lines) + "\n"


def render_topology_conf(nodes: Sequence[str]) -> str:
    """Return the text of topology.conf, which lies beside slurm.conf."""
    leaves = {f"leaf{turn + 1}": names for turn, names in enumerate((nodes[0::2], nodes[1::2])) if names}
    lines = [f"SwitchName={leaf} Nodes={','.join(names)}" for leaf, names in leaves.items()]
    return "\n".join([*lines, f"SwitchName=spine Switches={','.join(leaves)}"]) + "\n"
