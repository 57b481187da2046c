"""FasterMoE shadowing: the hottest experts are broadcast to all ranks when a cost model says that it pays.

Method. A shadowed expert is computed where its tokens come from; nothing is sent for it but its weights (out) and its
gradients (back). Experts are considered in order of falling load, C_1 >= C_2 >= ..., B_i of the C_i tokens coming from
other ranks than expert i's home. With one token's transfer t_f, its forward GEMM t_c and one expert's weights t_m:

    T_0 = 3 t_c C_1 + 4 t_f B_1
    T_k = 3 t_c (C_{k+1} + tokens of the k shadows that start on the home of expert k+1) + 4 t_f B_{k+1} + k t_m

The scan over k ends when T_k is no better than T_0; the best k so far is taken. The model prices the busiest expert,
not at the busiest rank, which is right only with one expert per rank. Spare slots play no part: memory for the shadows
is taken as it comes. Source: He et al., "FasterMoE", PPoPP 2022, section 4; fmoe/fastermoe/shadow_policy.py of
laekov/fastmoe (Apache-2.0), in the version of the SmartMoE artifact, whose scan does not stop before it can gain.

Defaults are those of FastMoE's environment variables (hidden 2048, factor 2, 6.25 GB/s, 11.5 TFLOP/s). Weights cross
the network twice (out, and back as gradients) with 2 bytes each: FastMoE's 4 bytes once. The artifact's constant comes
to 8 times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, Sees
from megatron_smartmoe.simulate.baselines.slots import add_replicas
from megatron_smartmoe.spec.arrays import IntArray


@dataclass(frozen=True, kw_only=True)
class FasterMoE:
    """Shadowing of hot experts.

    Attributes:
        hidden: H (FMOE_FASTER_GLBPLC_DMODEL).
        ffn_factor: expert's inner size over H (FMOE_FASTER_GLBPLC_ALPHA).
        network_bytes_s: bandwidth of one rank (FMOE_FASTER_GLBPLC_NETBW).
        gpu_flops: arithmetic of one rank (FMOE_FASTER_GLBPLC_GPUTP).
        element_bytes: bytes of a weight or an activation.
        weight_transfers: how many times an expert's weights cross the network for one shadow.
    """

    name: str = "fastermoe"
    sees: Sees = "exact"
    hidden: int = 2048
    ffn_factor: float = 2.0
    network_bytes_s: float = 6.25e9
    gpu_flops: float = 11.5e12
    element_bytes: int = 2
    weight_transfers: float = 2.0

    @property
    def transfer_s(self) -> float:
        """t_f: one token, once over the network."""
        return self.hidden * self.element_bytes / self.network_bytes_s

    @property
    def compute_s(self) -> float:
        """t_c: forward GEMMs of one token."""
        return 4 * self.ffn_factor * self.hidden**2 / self.gpu_flops

    @property
    def shadow_s(self) -> float:
        """t_m: one expert's weights out and its gradients back."""
        weight_bytes = 2 * self.ffn_factor * self.hidden**2 * self.element_bytes
        return self.weight_transfers * weight_bytes / self.network_bytes_s

    def plan(self, problem: LayerProblem) -> LayerPlan:
        """Shadow the k hottest experts everywhere, k by the cost model."""
        home_E = problem.home_rank_E
        order_E = np.argsort(-problem.load_E, kind="stable")
        shadows = order_E[: self.num_shadows(problem.counts_RE, home_E, order_E)]
        replica_ER = np.zeros((problem.num_experts, problem.num_ranks), dtype=np.bool_)
        replica_ER[shadows] = True
        replica_ER[shadows, home_E[shadows]] = False
        return LayerPlan(slots_RS=add_replicas(problem, replica_ER), split="local", home_rank_E=home_E)

    def num_shadows(self, counts_RE: IntArray, home_E: IntArray, order_E: IntArray) -> int:
        """k of the smallest predicted time, scanned from 1 for as long as shadowing beats not shadowing."""
        best_k, best_s = 0, self._time_s(counts_RE, home_E, order_E, 0)
        without_s = best_s
        for k in range(1, len(order_E)):
            time_s = self._time_s(counts_RE, home_E, order_E, k)
            if time_s >= without_s:
                break
            if time_s < best_s:
                best_k, best_s = k, time_s
        return best_k

    def _time_s(self, counts_RE: IntArray, home_E: IntArray, order_E: IntArray, k: int) -> float:
        """T_k."""
        expert = order_E[k]
        home = home_E[expert]
        tokens = counts_RE[:, expert].sum()
        remote = tokens - counts_RE[home, expert]
        shadowed = counts_RE[home, order_E[:k]].sum()
        return float(3 * self.compute_s * (tokens + shadowed) + 4 * self.transfer_s * remote + k * self.shadow_s)
