"""`--smartmoe-spare-slots` and its kin: what is refused, with its whole text."""

from __future__ import annotations

import pytest

from tests.support.checks import Case, said_of

EP4 = "--expert-model-parallel-size 4"
ONE = f"--smartmoe {EP4} --smartmoe-spare-slots 1"
FLEX = "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend"
TE_EXPERTS = "--transformer-impl transformer_engine --moe-grouped-gemm --smartmoe-experts transformer_engine"
FUSER = "--use-transformer-engine-op-fuser"
NOT_WITH = "is not supported with --smartmoe-spare-slots"
OUT = "or remove --smartmoe-spare-slots."
CASES = {
    "all well": Case(flags=ONE, ranks=4, verdict=True),
    "exact, homes moving, virtual stages": Case(
        flags=f"{ONE} --smartmoe-replicas exact --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1 --num-layers 4",
        ranks=8,
    ),
    "expert tensor parallelism": Case(
        flags=f"{ONE} --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2", ranks=8
    ),
    "slots that stay empty": Case(flags=f"{ONE} --smartmoe-replicas off", ranks=4),
    "fewer than none": Case(
        flags=f"--smartmoe {EP4} --smartmoe-spare-slots -1",
        ranks=4,
        says="--smartmoe-spare-slots = -1: must be at least 0. Remove it, or pass 0, for no replicas.",
    ),
    "no slots": Case(
        flags=f"--smartmoe {EP4} --smartmoe-replicas exact",
        ranks=4,
        says="--smartmoe-replicas = 'exact': needs spare slots for the replicas. Add --smartmoe-spare-slots 1, or "
        "remove it.",
    ),
    "without --smartmoe": Case(
        flags=f"{EP4} --smartmoe-spare-slots 1",
        ranks=4,
        says="--smartmoe-spare-slots = 1: needs --smartmoe. Add --smartmoe, or remove it.",
    ),
    "a domain that no level has": Case(
        flags=f"{ONE} --smartmoe-replicas-scope rack",
        ranks=4,
        says="--smartmoe-replicas-scope = 'rack': is not auto, node, group or the name of a level in the file of "
        "--smartmoe-cluster. Known: auto, node, group.",
    ),
    "one rank": Case(
        flags="--smartmoe --smartmoe-spare-slots 1",
        says="--smartmoe-spare-slots = 1: needs expert parallelism: on one rank there is nothing to balance or to "
        "overlap. Pass --expert-model-parallel-size 2, for example, or remove it.",
    ),
    "more than there are experts": Case(
        flags=f"--smartmoe {EP4} --num-experts 8 --smartmoe-spare-slots 7",
        ranks=4,
        says="--smartmoe-spare-slots = 7: must be at most 6, the experts of the other ranks. Pass a smaller number; 1 "
        "or 2 is usually enough.",
    ),
    "allgather": Case(flags=f"{ONE} --moe-token-dispatcher-type allgather", ranks=4, verdict=True),
    "DeepEP": Case(flags=f"{ONE} --bf16 {FLEX} deepep", ranks=4, verdict=True),
    "HybridEP": Case(flags=f"{ONE} --bf16 {FLEX} hybridep", ranks=4, verdict=True),
    "slots that HybridEP cannot read": Case(
        flags=f"--smartmoe --expert-model-parallel-size 2 --smartmoe-spare-slots 1 --bf16 {FLEX} hybridep",
        ranks=2,
        says="--smartmoe-spare-slots = 1: makes 10 slots with the experts of 2 ranks, and HybridEP needs a multiple of "
        "4. Pass 2, or another dispatcher.",
    ),
    "TransformerEngine's experts, fused and in one tensor": Case(
        flags=f"{ONE} --bf16 {TE_EXPERTS} {FUSER} --moe-single-grouped-weight", ranks=4, te=True
    ),
    "weight gradients beside the dispatch": Case(
        flags=f"{ONE} --bf16 {TE_EXPERTS} --overlap-dispatch-backward-with-experts-wgrad", ranks=4, te=True
    ),
    "weight gradients beside the dispatch, of fused operations": Case(
        flags=f"{ONE} --bf16 {TE_EXPERTS} {FUSER} --overlap-dispatch-backward-with-experts-wgrad",
        ranks=4,
        te=True,
        says=f"--overlap-dispatch-backward-with-experts-wgrad = True: {NOT_WITH} and {FUSER}: fused operations compute "
        "the weight gradients of all slots together, and those of replicas are sent home in the backward pass. Remove "
        "one of the three.",
    ),
    "rows of unknown number": Case(
        flags=f"{ONE} --bf16 {FLEX} ncclep --moe-ncclep-static-shape",
        ranks=4,
        says=f"--moe-ncclep-static-shape = True: {NOT_WITH}: it hands experts rows of unknown number. Remove one of "
        "the two.",
    ),
    "padding to capacity": Case(
        flags=f"{ONE} --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity", ranks=4, verdict=True
    ),
    "planned on the device": Case(
        flags=f"{ONE} --smartmoe-replicas exact --smartmoe-replicas-margin 0 --smartmoe-plan-on device",
        ranks=4,
        verdict=True,
    ),
    "planned on the device, from history": Case(
        flags=f"{ONE} --smartmoe-replicas-margin 0 --smartmoe-plan-on device",
        ranks=4,
        says="--smartmoe-plan-on = 'device': needs --smartmoe-replicas exact, without a pool. Pass that, or "
        "--smartmoe-plan-on host.",
    ),
    "planned on the device, experts on two ranks": Case(
        flags=f"{ONE} --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2 "
        "--smartmoe-replicas exact --smartmoe-replicas-margin 0 --smartmoe-plan-on device",
        ranks=8,
        says="--smartmoe-plan-on = 'device': needs experts on one rank each, and they are on 2. Pass "
        "--expert-tensor-parallel-size 1, or --smartmoe-plan-on host.",
    ),
    "planned on the device, with a margin": Case(
        flags=f"{ONE} --smartmoe-replicas exact --smartmoe-plan-on device",
        ranks=4,
        says="--smartmoe-plan-on = 'device': leaves out no replica that does not pay. Pass "
        "--smartmoe-replicas-margin 0, or --smartmoe-plan-on host.",
    ),
    "a negative margin": Case(
        flags=f"{ONE} --smartmoe-replicas-margin -1",
        ranks=4,
        says="--smartmoe-replicas-margin = -1.0: must be at least 0. The default is 1.",
    ),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return said_of(CASES, tmp_path_factory.mktemp("checks"))


@pytest.mark.dist
@pytest.mark.fast
@pytest.mark.parametrize("name", CASES)
def test_each_rule_says_field_value_rule_and_way_out(name: str, said: dict[str, str | None]) -> None:
    assert said[name] == CASES[name].says
