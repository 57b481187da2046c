"""Prices of the small model under a skewed load."""

from __future__ import annotations

from megatron_smartmoe.planner.load import LoadModel, scenarios_from_skew
from megatron_smartmoe.planner.pricing import Pricing
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from tests.support.models import CLUSTER, SMALL


def pricing(skew: float = 3.0, model: ModelSpec = SMALL, cluster: ClusterSpec = CLUSTER) -> Pricing:
    return Pricing(model, cluster, LoadModel(scenarios_from_skew(model, skew, "test")))
