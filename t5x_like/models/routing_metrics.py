"""What sparse layers add to a model's loss and metrics. Dense networks report nothing and add nothing."""

from collections.abc import Mapping

import jax.numpy as jnp

from t5x_like.layers.moe import RouterReport
from t5x_like.models.contract import LossAndMetrics, WeightedSum
from t5x_like.typing import Scalar

SCALARS = ("balance_loss", "z_loss", "entropy", "confidence", "dropped")


def with_routing(sums: LossAndMetrics, reports: Mapping[str, RouterReport]) -> LossAndMetrics:
    """A model's loss and metrics with those of its sparse layers."""
    loss = sums.loss
    total = loss.total + loss.weight * auxiliary_loss(reports)
    return LossAndMetrics(loss._replace(total=total), sums.metrics | routing_metrics(reports))


def auxiliary_loss(reports: Mapping[str, RouterReport]) -> Scalar:
    """The sum over layers of their auxiliary losses, each a mean over real tokens (Fedus et al. 2021, 2.2)."""
    losses = (WeightedSum(report.loss, report.tokens).mean() for report in reports.values())
    return sum(losses, start=jnp.zeros((), jnp.float32))


def routing_metrics(reports: Mapping[str, RouterReport]) -> dict[str, WeightedSum]:
    """Means over real tokens: `router/NAME` over all layers, `router/LAYER/NAME` of each.

    `load` is a vector: the share of tokens that each expert took. Entropy is in nats; `dropped` and `confidence` are
    shares too.
    """
    metrics: dict[str, WeightedSum] = {}
    for name in SCALARS if reports else ():
        totals = [getattr(report, name) for report in reports.values()]
        metrics[f"router/{name}"] = WeightedSum(sum(totals[1:], totals[0]), sum_tokens(reports))
    for layer, report in reports.items():
        for name in (*SCALARS, "load"):
            metrics[f"router/{layer}/{name}"] = WeightedSum(getattr(report, name), report.tokens)
    return metrics


def sum_tokens(reports: Mapping[str, RouterReport]) -> Scalar:
    """Tokens routed, in all layers together."""
    return sum((report.tokens for report in reports.values()), start=jnp.zeros((), jnp.float32))
